"""Guidance: what a denoiser is called with, and how its answers become one x0 (arXiv:2207.12598). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import join_conditioning
from ldm.util import UserError, instantiate_from_config

__all__ = ["Guider", "IdentityGuider", "VanillaCFG"]
Call = tuple[Tensor, Tensor, dict[str, Any]]  # x, sigma, conditioning
_BATCHED = ("vector", "crossattn", "concat")  # the entries of a conditioning that hold one row a sample


class Guider:
    """`prepare_inputs` makes the denoiser's arguments, calling the guider on its answer gives x0."""

    def __call__(self, x: Tensor, sigma: Tensor | None) -> Tensor:
        """The denoiser's answer -> x0 (B, C, H, W)."""
        raise NotImplementedError

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Mapping[str, Any], uc: Mapping[str, Any]) -> Call:
        """Arguments of the denoiser for x (B, C, H, W) at noise levels s (B,)."""
        raise NotImplementedError


class IdentityGuider(Guider):
    """No guidance: the conditional answer alone."""

    def __call__(self, x: Tensor, sigma: Tensor | None) -> Tensor:
        """`x` itself."""
        return x

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Mapping[str, Any], uc: Mapping[str, Any]) -> Call:
        """The arguments as they are; `uc` is not used."""
        return x, s, dict(c)


class VanillaCFG(Guider):
    """uncond + scale (cond - uncond), on x0; both halves in one call, the unconditional first."""

    def __init__(
        self,
        scale: float,  # 1: conditional only
        dyn_thresh_config: Any = None,  # {target, params} of the rule, in the first published configs
    ) -> None:
        self.scale = scale
        self.rule = instantiate_from_config(dyn_thresh_config)

    def __call__(self, x: Tensor, sigma: Tensor | None) -> Tensor:
        """(2B, C, H, W) -> (B, C, H, W)."""
        uncond, cond = x.chunk(2)
        if self.rule is not None:
            return self.rule(uncond, cond, self.scale)
        return uncond + self.scale * (cond - uncond)

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Mapping[str, Any], uc: Mapping[str, Any]) -> Call:
        """x and s twice, and both conditionings one after the other; other entries of theirs must be equal."""
        joined = {}
        for key, value in c.items():
            if key not in uc:
                raise UserError(f"the unconditional conditioning lacks {key!r}; it has {', '.join(uc)}")
            if key in _BATCHED:
                joined[key] = join_conditioning(uc[key], value, key)
            elif value is uc[key] or (not isinstance(value, Tensor) and value == uc[key]):
                joined[key] = value
            else:
                raise UserError(f"conditional and unconditional {key!r} differ, but only {', '.join(_BATCHED)} may: pass the same object")
        return torch.cat([x, x]), torch.cat([s, s]), joined
