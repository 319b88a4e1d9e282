"""Public address of the diffusion models; each lives in a file of its own."""

from ldm.models.diffusion.latent import LatentDiffusion
from ldm.models.diffusion.pixel import DDPM
from ldm.models.diffusion.variants import (
    ImageEmbeddingConditionedLatentDiffusion,
    LatentDepth2ImageDiffusion,
    LatentFinetuneDiffusion,
    LatentInpaintDiffusion,
    LatentUpscaleDiffusion,
    LatentUpscaleFinetuneDiffusion,
)
from ldm.models.diffusion.wrapper import DiffusionWrapper

__all__ = [
    "DDPM",
    "DiffusionWrapper",
    "ImageEmbeddingConditionedLatentDiffusion",
    "LatentDepth2ImageDiffusion",
    "LatentDiffusion",
    "LatentFinetuneDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscaleDiffusion",
    "LatentUpscaleFinetuneDiffusion",
]
