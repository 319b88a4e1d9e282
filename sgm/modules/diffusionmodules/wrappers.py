"""Public address: Adapters of the network."""

from ldm.models.diffusion.sgm.wrappers import IdentityWrapper, OpenAIWrapper

__all__ = ["IdentityWrapper", "OpenAIWrapper"]
