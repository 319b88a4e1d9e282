"""Noise levels of a sampling run: EDM's spacing (arXiv:2206.00364, Eq. 5) and that of a DDPM schedule. Pure."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules.schedule import make_beta_schedule
from ldm.util import ConfigError, UserError

__all__ = ["Discretization", "EDMDiscretization", "LegacyDDPMDiscretization", "generate_roughly_equally_spaced_steps"]

_LEAST_ABAR = 2.0**-24  # stands for pure noise, whose level is infinite: sigma 4096


def generate_roughly_equally_spaced_steps(num_substeps: int, max_step: int) -> np.ndarray:
    """`num_substeps` integers (int64), ascending, evenly spaced and ending at max_step - 1."""
    return np.linspace(max_step - 1, 0, num_substeps, endpoint=False).astype(np.int64)[::-1]


class Discretization:
    """`discretization(n)` gives n noise levels, float32, noisiest first, and a 0 at the end."""

    def __call__(
        self,
        n: int,
        do_append_zero: bool = True,
        device: torch.device | str = "cpu",
        flip: bool = False,  # cleanest first
    ) -> Tensor:
        """(n + 1,), or (n,) without the zero."""
        if n < 1:
            raise UserError(f"{n} sampling steps are too few: use 1 or more")
        sigmas = self.get_sigmas(n, device=device)
        if do_append_zero:
            sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        return sigmas.flip(0) if flip else sigmas

    def get_sigmas(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """The n noise levels, noisiest first."""
        raise NotImplementedError(f"{type(self).__name__} does not implement get_sigmas()")


class EDMDiscretization(Discretization):
    """From sigma_max to sigma_min, evenly spaced in sigma^(1 / rho)."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not 0 < sigma_min < sigma_max or rho <= 0:
            raise ConfigError(f"EDMDiscretization needs 0 < sigma_min < sigma_max and rho > 0; got {sigma_min}, {sigma_max}, {rho}")
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def get_sigmas(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """The n noise levels, noisiest first."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        ramp = torch.linspace(0, 1, n, dtype=torch.float32, device=device)
        return (high + ramp * (low - high)) ** self.rho  # Eq. 5


class LegacyDDPMDiscretization(Discretization):
    """The levels sqrt((1 - abar) / abar) of evenly spaced timesteps of Stable Diffusion's schedule; starts at the noisiest one."""

    def __init__(
        self,
        linear_start: float = 0.00085,
        linear_end: float = 0.0120,
        num_timesteps: int = 1000,
        rescale_betas_zero_snr: bool = False,  # zero terminal SNR (arXiv:2305.08891); not in generative-models
    ) -> None:
        betas = make_beta_schedule("linear", num_timesteps, linear_start, linear_end, zero_terminal_snr=rescale_betas_zero_snr)
        self.num_timesteps = num_timesteps
        self.alphas_cumprod = np.cumprod(1.0 - betas)  # float64 (T,)

    def get_sigmas(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """The n noise levels, noisiest first; n may be 1 to num_timesteps."""
        if n > self.num_timesteps:
            raise UserError(f"{n} sampling steps are more than the {self.num_timesteps} timesteps of the schedule")
        steps = generate_roughly_equally_spaced_steps(n, self.num_timesteps) if n < self.num_timesteps else slice(None)
        abar = np.maximum(self.alphas_cumprod[steps], _LEAST_ABAR)
        return torch.tensor((1 - abar) / abar, dtype=torch.float32, device=device).sqrt().flip(0)
