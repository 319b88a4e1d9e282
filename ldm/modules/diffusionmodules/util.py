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
