"""Public address: denoisers."""

from ldm.models.diffusion.sgm.denoiser import Denoiser, DiscreteDenoiser

__all__ = ["Denoiser", "DiscreteDenoiser"]
