"""Public address: noise levels of a sampling run."""

from ldm.models.diffusion.sgm.discretizer import (
    Discretization,
    EDMDiscretization,
    LegacyDDPMDiscretization,
    generate_roughly_equally_spaced_steps,
)

__all__ = ["Discretization", "EDMDiscretization", "LegacyDDPMDiscretization", "generate_roughly_equally_spaced_steps"]
