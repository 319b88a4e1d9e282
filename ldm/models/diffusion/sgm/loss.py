"""The training loss of generative-models: the weighted error of x0 at random noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.sampling_util import append_dims
from ldm.util import ConfigError, instantiate_from_config

__all__ = ["StandardDiffusionLoss"]
_ERRORS: dict[str, Callable[[Tensor], Tensor]] = {"l2": torch.square, "l1": torch.abs}


class StandardDiffusionLoss(nn.Module):
    """E w(sigma) |D(x0 + sigma eps; sigma) - x0|^p (arXiv:2206.00364, Eq. 2 and Sec. 5), one value a sample."""

    def __init__(
        self,
        sigma_sampler_config: Any,  # {target, params}: noise levels of a batch
        loss_weighting_config: Any,  # {target, params}: w
        loss_type: str = "l2",  # or l1
        offset_noise_level: float = 0.0,  # noise that is the same over a whole channel, for very dark and very bright pictures
        batch2model_keys: str | Sequence[str] | None = None,  # batch entries that the network takes as arguments
    ) -> None:
        super().__init__()
        if loss_type not in _ERRORS:
            raise ConfigError(f"loss_type {loss_type!r} is unknown; allowed are {', '.join(_ERRORS)}")
        self.sigma_sampler = instantiate_from_config(sigma_sampler_config)
        self.loss_weighting = instantiate_from_config(loss_weighting_config)
        self.loss_type, self.offset_noise_level = loss_type, offset_noise_level
        keys = batch2model_keys or ()
        self.batch2model_keys = {keys} if isinstance(keys, str) else set(keys)

    def forward(
        self,
        network: nn.Module,
        denoiser: nn.Module,
        conditioner: Callable[[Mapping[str, Any]], dict[str, Tensor]],
        input: Tensor,  # x0 (B, C, H, W)
        batch: Mapping[str, Any],
    ) -> Tensor:
        """The loss of every sample (B,). Draws the noise levels, then the noise."""
        cond = conditioner(batch)
        extra = {key: batch[key] for key in self.batch2model_keys.intersection(batch)}
        sigmas = self.sigma_sampler(len(input)).to(input)  # (B,)
        noise = torch.randn_like(input)
        if self.offset_noise_level > 0.0:
            offset = torch.randn(input.shape[:2], device=input.device, dtype=input.dtype)
            noise = noise + self.offset_noise_level * append_dims(offset, input.ndim)
        noisy = input + noise * append_dims(sigmas, input.ndim)
        output = denoiser(network, noisy, sigmas, cond, **extra)
        weight = append_dims(self.loss_weighting(sigmas), input.ndim)
        return (weight * _ERRORS[self.loss_type](output - input)).flatten(1).mean(1)
