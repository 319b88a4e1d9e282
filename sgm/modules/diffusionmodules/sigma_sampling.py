"""Public address: noise levels of a training batch."""

from ldm.models.diffusion.sgm.sigma_sampling import DiscreteSampling, EDMSampling

__all__ = ["DiscreteSampling", "EDMSampling"]
