"""Denoisers: a network with its preconditioning, (noisy x, sigma) -> x0. Knows no solver and no guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.sampling_util import append_dims
from ldm.util import instantiate_from_config

__all__ = ["Denoiser", "DiscreteDenoiser"]
_HALF = (torch.float16, torch.bfloat16)


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (arXiv:2206.00364, Eq. 7) at any noise level."""

    def __init__(
        self,
        scaling_config: Any,  # {target, params} of the four coefficients
        *,
        weighting_config: Any = None,  # of the loss; only the first published configs have it here, later ones in their loss
    ) -> None:
        super().__init__()
        self.scaling = instantiate_from_config(scaling_config)
        self.weighting = instantiate_from_config(weighting_config)

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        """The noise level that is used for `sigma`."""
        return sigma

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        """What the network is told for `c_noise`."""
        return c_noise

    def w(self, sigma: Tensor) -> Tensor:
        """Weight of the loss at `sigma`."""
        return self.weighting(sigma)

    def forward(
        self,
        network: Callable[..., Tensor],  # (x, c_noise, cond) -> prediction, such as OpenAIWrapper
        input: Tensor,  # (B, C, H, W), x0 + sigma eps
        sigma: Tensor,  # (B,)
        cond: Mapping[str, Tensor],
        **additional_model_inputs: Any,
    ) -> Tensor:
        """The network's x0, of the shape of `input`."""
        sigma = self.possibly_quantize_sigma(sigma)  # (B,)
        c_skip, c_out, c_in, c_noise = self.scaling(append_dims(sigma, input.ndim))  # each (B, 1, 1, 1)
        c_noise = self.possibly_quantize_c_noise(c_noise.reshape(sigma.shape))
        return network(input * c_in, c_noise, cond, **additional_model_inputs) * c_out + input * c_skip


class DiscreteDenoiser(Denoiser):
    """For networks trained at `num_idx` noise levels: sigma goes to the nearest one, and the network is told its index.

    The levels are the buffer `sigmas`, cleanest first. They follow from the config and are kept in float32: in half precision
    neighbouring levels fall together.
    """

    sigmas: Tensor

    def __init__(
        self,
        scaling_config: Any,  # {target, params} of the four coefficients
        num_idx: int,  # noise levels
        discretization_config: Any,  # {target, params} of the noise levels
        do_append_zero: bool = False,  # sigma 0 is a level too
        quantize_c_noise: bool = True,  # tell the network the index, and not the level itself
        flip: bool = True,  # cleanest first, as timesteps count
        *,
        weighting_config: Any = None,
    ) -> None:
        super().__init__(scaling_config, weighting_config=weighting_config)
        self.num_idx, self.quantize_c_noise = num_idx, quantize_c_noise
        self.discretization = instantiate_from_config(discretization_config)
        self.register_buffer("sigmas", self.discretization(num_idx, do_append_zero=do_append_zero, flip=flip))

    def sigma_to_idx(self, sigma: Tensor) -> Tensor:
        """Index of the nearest level, of the shape of `sigma`."""
        return (sigma.reshape(1, -1) - self.sigmas[:, None]).abs().argmin(dim=0).reshape(sigma.shape)

    def idx_to_sigma(self, idx: Tensor) -> Tensor:
        """The levels at `idx`."""
        return self.sigmas[idx]

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest level."""
        return self.idx_to_sigma(self.sigma_to_idx(sigma))

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        """Its index, if that is what the network knows."""
        return self.sigma_to_idx(c_noise) if self.quantize_c_noise else c_noise

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiscreteDenoiser:
        kept = self.sigmas
        super()._apply(fn, recurse)
        if self.sigmas.dtype in _HALF:
            self.sigmas = kept.to(self.sigmas.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Stored levels are not taken: files in half precision have them rounded."""
        stored = state_dict.get(prefix + "sigmas")
        if stored is not None and stored.shape == self.sigmas.shape:
            state_dict = {**state_dict, prefix + "sigmas": self.sigmas}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
