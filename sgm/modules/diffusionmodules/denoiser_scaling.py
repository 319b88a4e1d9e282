"""Public address: preconditioning."""

from ldm.models.diffusion.sgm.denoiser_scaling import (
    EDMScaling,
    EpsScaling,
    Scaling,
    VScaling,
    VScalingWithEDMcNoise,
)

__all__ = ["EDMScaling", "EpsScaling", "Scaling", "VScaling", "VScalingWithEDMcNoise"]
