"""Public address: the samplers' maths."""

from ldm.models.diffusion.sgm.sampling_utils import (
    NoDynamicThresholding,
    get_ancestral_step,
    linear_multistep_coeff,
    to_d,
    to_neg_log_sigma,
    to_sigma,
)

__all__ = ["NoDynamicThresholding", "get_ancestral_step", "linear_multistep_coeff", "to_d", "to_neg_log_sigma", "to_sigma"]
