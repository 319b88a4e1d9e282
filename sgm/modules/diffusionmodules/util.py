"""Public address: small parts of networks."""

from ldm.modules.diffusionmodules.util import (
    checkpoint,
    conv_nd,
    extract_into_tensor,
    linear,
    make_beta_schedule,
    normalization,
    timestep_embedding,
    zero_module,
)

__all__ = [
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "normalization",
    "timestep_embedding",
    "zero_module",
]
