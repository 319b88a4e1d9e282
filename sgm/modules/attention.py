"""Public address: attention and transformer blocks."""

from ldm.modules.attention import (
    GEGLU,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)

__all__ = ["GEGLU", "BasicTransformerBlock", "CrossAttention", "FeedForward", "SpatialTransformer"]
