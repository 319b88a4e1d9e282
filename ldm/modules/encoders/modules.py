"""Public address of the conditioning encoders: configs name `ldm.modules.encoders.modules.*`."""

from ldm.modules.encoders.label import ClassEmbedder
from ldm.modules.encoders.text import (
    AbstractEncoder,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    IdentityEncoder,
)

__all__ = [
    "AbstractEncoder",
    "ClassEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder",
    "IdentityEncoder",
]
