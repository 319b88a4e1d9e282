"""Public address: the UNet."""

from ldm.modules.diffusionmodules.openaimodel import (
    Downsample,
    ResBlock,
    Timestep,
    TimestepEmbedSequential,
    UNetModel,
    Upsample,
)

__all__ = ["Downsample", "ResBlock", "Timestep", "TimestepEmbedSequential", "UNetModel", "Upsample"]
