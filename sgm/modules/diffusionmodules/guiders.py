"""Public address: guidance."""

from ldm.models.diffusion.sgm.guiders import Guider, IdentityGuider, VanillaCFG

__all__ = ["Guider", "IdentityGuider", "VanillaCFG"]
