"""Small pure helpers on conditioning, whatever its format (tensor, list, dict of lists)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldm.util import ConfigError


def cut_batch(value: Any, n: int | None) -> Any:
    """The first `n` samples of a condition or batch: tensors along dim 0, lists of strings by item, lists of tensors and dicts inside."""
    if n is None or value is None:
        return value
    if isinstance(value, Tensor):
        return value[:n]
    if isinstance(value, Mapping):
        return {key: cut_batch(item, n) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cut_batch(item, n) for item in value] if value and isinstance(value[0], Tensor) else value[:n]
    return value


def shift_embeddings(model: Any, batch: dict[str, Any], c: Any) -> dict[str, Any]:
    """Positional encodings of crops were never part of a published model; the option is refused rather than ignored."""
    raise ConfigError("use_positional_encodings is not supported: no published model uses it; set it to false")
