"""Public address: samplers."""

from ldm.models.diffusion.sgm.sampling import (
    AncestralSampler,
    BaseDiffusionSampler,
    DPMPP2MSampler,
    DPMPP2SAncestralSampler,
    EDMSampler,
    EulerAncestralSampler,
    EulerEDMSampler,
    HeunEDMSampler,
    LinearMultistepSampler,
    SingleStepDiffusionSampler,
)

__all__ = [
    "AncestralSampler",
    "BaseDiffusionSampler",
    "DPMPP2MSampler",
    "DPMPP2SAncestralSampler",
    "EDMSampler",
    "EulerAncestralSampler",
    "EulerEDMSampler",
    "HeunEDMSampler",
    "LinearMultistepSampler",
    "SingleStepDiffusionSampler",
]
