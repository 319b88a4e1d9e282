"""Public address: the diffusion model."""

from ldm.models.diffusion.sgm.engine import DiffusionEngine

__all__ = ["DiffusionEngine"]
