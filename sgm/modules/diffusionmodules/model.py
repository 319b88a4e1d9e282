"""Public address: encoder and decoder of the first stage."""

from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, Normalize, ResnetBlock

__all__ = ["AttnBlock", "Decoder", "Encoder", "Normalize", "ResnetBlock"]
