"""Public address of the conditioning encoders: configs name `ldm.modules.encoders.modules.*`."""

from ldm.modules.encoders.bert import BERTEmbedder, BERTTokenizer, TransformerEmbedder
from ldm.modules.encoders.image import (
    CLIPEmbeddingNoiseAugmentation,
    ClipImageEmbedder,
    FrozenOpenCLIPImageEmbedder,
)
from ldm.modules.encoders.label import ClassEmbedder
from ldm.modules.encoders.spatial import SpatialRescaler
from ldm.modules.encoders.text import (
    AbstractEncoder,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    IdentityEncoder,
)

__all__ = [
    "AbstractEncoder",
    "BERTEmbedder",
    "BERTTokenizer",
    "CLIPEmbeddingNoiseAugmentation",
    "ClassEmbedder",
    "ClipImageEmbedder",
    "FrozenCLIPEmbedder",
    "FrozenOpenCLIPEmbedder",
    "FrozenOpenCLIPImageEmbedder",
    "IdentityEncoder",
    "SpatialRescaler",
    "TransformerEmbedder",
]
