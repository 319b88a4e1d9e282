"""Weights, inputs and comparison for the stored reference numbers (`tests/reference/npz`).

The numbers were made with weights that follow from parameter names, so that no weight file is needed: whoever has the
names of a published checkpoint can rebuild the very same network.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
FIRST_INPUT_SEED = 1234  # input i of a case comes from Philox(1234 + i)


def _philox(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(seed))
    return np.asarray(rng.standard_normal(tuple(int(s) for s in shape), dtype=np.float32), dtype=np.float32)


def W(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of the parameter `key` (full name below the root module of the case), float32 of `shape`."""
    n = _philox(zlib.crc32(key.encode()), shape)
    last = key.rpartition(".")[2]
    is_weight = last.endswith("weight")
    if key.endswith("norm.weight") or (n.ndim == 1 and is_weight):
        return (1 + 0.1 * n).astype(np.float32)
    if n.ndim >= 2 and is_weight:
        return (n / math.sqrt(math.prod(n.shape[1:]))).astype(np.float32)
    return np.asarray(0.05 * n, dtype=np.float32)


def fill(module: M, rename: Callable[[str], str] | None = None) -> M:
    """Give every parameter its `W`, put the module in eval mode and return it; buffers stay as computed.

    `rename` maps a live parameter name to the published one, where these differ.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            key = rename(name) if rename else name
            parameter.copy_(torch.from_numpy(W(key, tuple(parameter.shape))).reshape(parameter.shape))
    return module.eval()


def philox(index: int, shape: tuple[int, ...] | list[int], scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Input number `index` of a case: standard normal float32, times `scale`, plus `shift`."""
    a = _philox(FIRST_INPUT_SEED + index, tuple(shape))
    if scale != 1.0:
        a = a * np.float32(scale)
    if shift != 0.0:
        a = a + np.float32(shift)
    return torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32))


philox_input = philox


def as_numpy(value: object) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()
    return np.asarray(value)


def compare(got: object, want: object, rtol: float = 1e-4, atol: float = 1e-5, exact: bool = False) -> None:
    """Raise AssertionError unless |got - want| <= atol + rtol |want| everywhere; integers, bools and strings exactly."""
    a, b = as_numpy(got), as_numpy(want)
    assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
    if exact or b.dtype.kind in "iubUS":
        np.testing.assert_array_equal(a, b)
        return
    np.testing.assert_allclose(a.astype(np.float64), b.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True)
