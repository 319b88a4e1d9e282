"""Public address of the small parts that diffusion networks and samplers share.

The schedule functions live in `schedule.py`; they are re-exported because configs, notebooks and scripts name them here.
This file must not know a network, a sampler or a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ldm.modules.diffusionmodules.schedule import (
    betas_for_alpha_bar,
    extract_into_tensor,
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)
from ldm.util import ConfigError, instantiate_from_config, mean_flat

__all__ = [
    "GroupNorm32",
    "HybridConditioner",
    "SiLU",
    "avg_pool_nd",
    "betas_for_alpha_bar",
    "checkpoint",
    "conv_nd",
    "double_and_convolve",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "mean_flat",
    "noise_like",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]

SiLU = nn.SiLU


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool) -> Any:
    """func(*inputs), recomputing its activations in the backward pass when `flag` is set and gradients are wanted.

    params: kept for callers of the original signature; autograd finds the parameters by itself.
    """
    if flag and torch.is_grad_enabled():
        return torch_checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def timestep_embedding(
    timesteps: Tensor,  # (B,), integers or fractions
    dim: int,
    max_period: float = 10000,  # longest wave length over 2 pi
    repeat_only: bool = False,  # the bare timestep, `dim` times
) -> Tensor:
    """Sinusoidal embedding (B, dim): cosines, then sines (arXiv:1706.03762, section 3.5); a zero pads an odd dim."""
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponent)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2)) if dim % 2 else embedding


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero, so that a residual branch starts as the identity; returns the module."""
    for p in module.parameters():
        p.detach().zero_()
    return module


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters by `scale`; returns the module."""
    for p in module.parameters():
        p.detach().mul_(scale)
    return module


class GroupNorm32(nn.GroupNorm):
    """GroupNorm that computes in float32 and answers in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and dtype."""
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        if x.device.type == "cpu" and weight is not None:
            # With float32 weights the CPU kernel reads half inputs and computes in float32 by itself: the same
            # numbers 2.3 times as fast as through copies (bf16, 32x256x16x16).
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int, num_groups: int = 32) -> GroupNorm32:
    """The GroupNorm of residual and attention blocks (eps 1e-5)."""
    return GroupNorm32(num_groups, channels)


def _for_dims(kinds: Mapping[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in kinds:
        raise ConfigError(f"dims={dims} is not supported: use 1, 2 or 3")
    return kinds[dims]


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional convolution."""
    return _for_dims({1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}, dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional average pooling."""
    return _for_dims({1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}, dims)(*args, **kwargs)


# Below so many pixels, summing the weights costs more than it saves.
_LEAST_PIXELS = 512


def double_and_convolve(x: Tensor, conv: nn.Module) -> Tensor:
    """conv(x with height and width doubled by repetition): (B, C, H, W) -> (B, C', 2H, 2W).

    Every pixel of the result sees 2x2 different pixels of x through a 3x3 kernel. Drawing on the CPU therefore adds up the weights that
    meet the same pixel and convolves four times by 2x2, once for each parity of row and column: 2.25 times fewer multiplications, equal
    to rounding, 1.3 to 2 times as fast (256 channels, 32x32 and 64x64, float32 and bfloat16).
    """
    drawing = not torch.is_grad_enabled() and x.device.type == "cpu" and x.shape[0] * x.shape[2] * x.shape[3] >= _LEAST_PIXELS
    if not (drawing and _is_plain_3x3(conv)):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else conv.weight.dtype
    weight = conv.weight.to(kind).to(torch.promote_types(kind, torch.float32))
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    out: Tensor | None = None
    for i, rows in enumerate(_sums_of_taps(weight, 2)):
        for j, kernel in enumerate(_sums_of_taps(rows, 3)):
            part = F.conv2d(padded[:, :, i : i + height + 1, j : j + width + 1], kernel.to(kind), conv.bias)
            if out is None:
                inner = part.is_contiguous(memory_format=torch.channels_last)
                order = torch.channels_last if inner else torch.contiguous_format
                out = torch.empty((*part.shape[:2], 2 * height, 2 * width), dtype=part.dtype, memory_format=order)
            out[:, :, i::2, j::2] = part
    assert out is not None
    return out


def _is_plain_3x3(conv: nn.Module) -> bool:
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or conv.groups != 1:
        return False
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))


def _sums_of_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two taps along `dim` that even and odd outputs have, when every input counts twice."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """nn.Linear, under the name the original gives it."""
    return nn.Linear(*args, **kwargs)


class HybridConditioner(nn.Module):
    """Two conditioners side by side: one for channel concatenation, one for cross-attention."""

    def __init__(self, c_concat_config: Mapping[str, Any], c_crossattn_config: Mapping[str, Any]):
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Tensor]]:
        """The two conditions in the form that DiffusionWrapper takes."""
        return {
            "c_concat": [self.concat_conditioner(c_concat)],
            "c_crossattn": [self.crossattn_conditioner(c_crossattn)],
        }
