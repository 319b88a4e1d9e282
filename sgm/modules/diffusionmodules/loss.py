"""Public address: the training loss."""

from ldm.models.diffusion.sgm.loss import StandardDiffusionLoss

__all__ = ["StandardDiffusionLoss"]
