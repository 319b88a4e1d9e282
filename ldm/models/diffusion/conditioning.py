"""Small helpers on conditioning, whatever its format (tensor, list, dict of lists): out of a batch, for nothing, cut, as a map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.util import ConfigError

TEXT_KEYS = ("caption", "txt")  # the empty text is their empty condition
RAW_KEYS = (*TEXT_KEYS, "coordinates_bbox")  # batch entries handed to the cond stage as they are
CLASS_KEYS = ("class_label", "cls")  # the cond stage gets the whole batch


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


def depth_channel(depth: Tensor, size: Sequence[int]) -> Tensor:
    """Relative inverse depth (B, 1, H, W) as the network sees it: resized to the latent, (B, 1, h, w) in [-1, 1)."""
    return to_unit_range(F.interpolate(depth, size=tuple(size), mode="bicubic", align_corners=False))


def to_unit_range(depth: Tensor) -> Tensor:
    """(B, 1, H, W) of any range -> [-1, 1), sample by sample; the 0.001 keeps a flat one from dividing by zero."""
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    return 2.0 * (depth - low) / (high - low + 0.001) - 1.0


def raw_conditioning(model: Any, batch: dict[str, Any], cond_key: str, x: Tensor | None, k: str) -> Any:
    """What the cond stage gets of a batch, whose images x (B, 3, H, W) are under `k` (None with cached latents)."""
    if cond_key == k:
        if x is None:
            raise ConfigError(f"the cond stage needs the batch's {k!r}, and a batch with cached latents has only z")
        return x
    if cond_key in CLASS_KEYS:
        return batch
    if cond_key not in batch:
        raise ConfigError(f"the batch has no {cond_key!r}; it has {', '.join(sorted(batch))}: set cond_stage_key")
    if cond_key in RAW_KEYS:
        return batch[cond_key]
    return channels_first(batch[cond_key]).to(model.device)


def cached_conditioning(model: Any, c: Tensor) -> Tensor:
    """Embeddings (B, L, D) that came with the batch, so that the cond stage need not run."""
    if model.cond_stage_trainable:
        raise ConfigError("the batch brings cached embeddings ('c'), and cond_stage_trainable is true: drop the data's text_encoder")
    return c.to(model.device).float()


def empty_conditioning(model: Any, batch_size: int, null_label: Any = None) -> Any:
    """Conditioning that stands for "nothing" (or for `null_label`), repeated `batch_size` times."""
    if null_label is not None:
        labels = list(null_label) if isinstance(null_label, (list, tuple)) else [null_label]
        c = null_label if isinstance(null_label, Tensor) else model.get_learned_conditioning(labels)
    elif model.cond_stage_key in CLASS_KEYS:
        label = model.cond_stage_model.get_unconditional_conditioning(batch_size, device=model.device)
        return model.get_learned_conditioning(label)
    elif model.cond_stage_key in TEXT_KEYS:
        c = model.get_learned_conditioning([""])
    else:
        raise ConfigError(f"no empty condition is known for cond_stage_key {model.cond_stage_key!r}: give one as null_label")
    if isinstance(c, list):
        return [ci.expand(batch_size, *ci.shape[1:]) for ci in c]
    return c.expand(batch_size, *c.shape[1:]).to(model.device)


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) or (B, H, W) -> float32 (B, C, H, W), contiguous."""
    x = x[..., None] if x.ndim == 3 else x
    return x.permute(0, 3, 1, 2).to(memory_format=torch.contiguous_format).float()
