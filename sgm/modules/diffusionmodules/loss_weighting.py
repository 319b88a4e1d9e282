"""Public address: weights of the loss."""

from ldm.models.diffusion.sgm.loss_weighting import EDMWeighting, EpsWeighting, UnitWeighting, VWeighting

__all__ = ["EDMWeighting", "EpsWeighting", "UnitWeighting", "VWeighting"]
