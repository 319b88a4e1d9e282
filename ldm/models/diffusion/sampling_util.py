"""Limits on a predicted x0 that keep strong guidance from blowing it up."""

from __future__ import annotations

from torch import Tensor


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """`x` with dimensions of size 1 added at the end until it has `target_dims`."""
    missing = target_dims - x.ndim
    if missing < 0:
        raise ValueError(f"a tensor of {x.ndim} dimensions cannot be given {target_dims}")
    return x.reshape(*x.shape, *([1] * missing))


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each sample down until its root mean square is at most `value`."""
    rms = x0.square().flatten(1).mean(1).sqrt().clamp(min=value)  # (B,)
    return x0 * (value / append_dims(rms, x0.ndim))


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each position down until the root mean square over its channels is at most `value`; x0 is (B, C, H, W)."""
    return x0 * (value / x0.square().mean(1, keepdim=True).sqrt().clamp(min=value))
