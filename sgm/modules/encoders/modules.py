"""Public address: the conditioner and its embedders."""

from ldm.modules.encoders.conditioner import (
    AbstractEmbModel,
    ClassEmbedder,
    ConcatTimestepEmbedderND,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
    GeneralConditioner,
    IdentityEncoder,
)

__all__ = [
    "AbstractEmbModel",
    "ClassEmbedder",
    "ConcatTimestepEmbedderND",
    "FrozenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder2",
    "GeneralConditioner",
    "IdentityEncoder",
]
