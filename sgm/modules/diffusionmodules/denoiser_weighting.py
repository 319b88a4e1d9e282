"""Public address: weights of the loss, at the address of the first published configs."""

from ldm.models.diffusion.sgm.loss_weighting import EDMWeighting, EpsWeighting, UnitWeighting, VWeighting

__all__ = ["EDMWeighting", "EpsWeighting", "UnitWeighting", "VWeighting"]
