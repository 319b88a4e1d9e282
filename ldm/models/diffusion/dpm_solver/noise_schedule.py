"""Noise schedules in continuous time, as DPM-Solver wants them. Source: arXiv:2206.00927, App. D."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.util import UserError

__all__ = ["NoiseScheduleVP", "choice", "interpolate_fn"]


def choice(value: Any, allowed: Sequence[Any], what: str) -> Any:
    """`value`, or `UserError` unless it is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{what} {value!r} is unknown: use one of {', '.join(map(str, allowed))}")
    return value


def interpolate_fn(x: Tensor, xp: Tensor, yp: Tensor) -> Tensor:
    """The polyline through (xp, yp), xp (K,) ascending, at x (N,); beyond the ends its outermost pieces go on straight."""
    right = torch.searchsorted(xp, x.contiguous()).clamp(1, len(xp) - 1)
    x0, x1, y0, y1 = xp[right - 1], xp[right], yp[right - 1], yp[right]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)


class NoiseScheduleVP:
    """alpha_t, sigma_t and lambda_t as functions of continuous time, for a discrete schedule or two analytic ones.

    Methods take tensors of any shape and device, compute in float64 and answer in the dtype they were asked in.
    """

    def __init__(
        self,
        schedule: str = "discrete",  # discrete, linear or cosine
        betas: Tensor | None = None,  # discrete: (T,)
        alphas_cumprod: Tensor | None = None,  # discrete: (T,), instead of betas
        continuous_beta_0: float = 0.1,  # linear
        continuous_beta_1: float = 20.0,
    ) -> None:
        self.schedule = choice(schedule, ("discrete", "linear", "cosine"), "noise schedule")
        self.T, self.total_N = 1.0, 1000
        self.beta_0, self.beta_1 = continuous_beta_0, continuous_beta_1
        self.cosine_s = 0.008
        self.cosine_log_alpha_0 = math.log(math.cos(self.cosine_s / (1.0 + self.cosine_s) * math.pi / 2.0))
        if schedule == "cosine":
            self.T = 0.9946  # where the published implementation ends it, short of infinite beta
        if schedule == "discrete":
            if (betas is None) == (alphas_cumprod is None):
                raise UserError("a discrete NoiseScheduleVP needs betas or alphas_cumprod, one of the two")
            abar = torch.cumprod(1.0 - betas.double(), 0) if alphas_cumprod is None else alphas_cumprod.double()  # type: ignore[union-attr]
            self.log_alpha_array = 0.5 * torch.log(abar.detach().cpu())  # (T,)
            self.total_N = len(abar)
            self.t_array = torch.arange(1, self.total_N + 1, dtype=torch.float64) / self.total_N

    def marginal_log_mean_coeff(self, t: Tensor) -> Tensor:
        """log(alpha_t)."""
        return self._double(self._log_alpha, t)

    def marginal_alpha(self, t: Tensor) -> Tensor:
        """alpha_t, the factor on x0."""
        return self._double(lambda s: self._log_alpha(s).exp(), t)

    def marginal_std(self, t: Tensor) -> Tensor:
        """sigma_t, the factor on eps."""
        return self._double(lambda s: (1.0 - (2.0 * self._log_alpha(s)).exp()).sqrt(), t)

    def marginal_lambda(self, t: Tensor) -> Tensor:
        """lambda_t = log(alpha_t / sigma_t)."""

        def lambda_(s: Tensor) -> Tensor:
            log_alpha = self._log_alpha(s)
            return log_alpha - 0.5 * torch.log(1.0 - (2.0 * log_alpha).exp())

        return self._double(lambda_, t)

    def inverse_lambda(self, lamb: Tensor) -> Tensor:
        """The time at which lambda is `lamb`."""
        return self._double(self._time_of_lambda, lamb)

    @staticmethod
    def _double(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        return function(t.detach().to("cpu").double()).to(t.dtype).to(t.device)  # not every device has float64

    def _log_alpha(self, t: Tensor) -> Tensor:
        if self.schedule == "linear":
            return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        if self.schedule == "cosine":
            return torch.log(torch.cos((t + self.cosine_s) / (1.0 + self.cosine_s) * math.pi / 2.0)) - self.cosine_log_alpha_0
        return interpolate_fn(t.reshape(-1), self.t_array, self.log_alpha_array).reshape(t.shape)

    def _time_of_lambda(self, lamb: Tensor) -> Tensor:
        log_alpha = -0.5 * torch.logaddexp(torch.zeros_like(lamb), -2.0 * lamb)
        if self.schedule == "linear":
            slope = self.beta_1 - self.beta_0
            return -4.0 * log_alpha / ((self.beta_0**2 - 4.0 * slope * log_alpha).sqrt() + self.beta_0)
        if self.schedule == "cosine":
            angle = torch.arccos((log_alpha + self.cosine_log_alpha_0).exp())
            return angle * 2.0 * (1.0 + self.cosine_s) / math.pi - self.cosine_s
        return interpolate_fn(log_alpha.reshape(-1), self.log_alpha_array.flip(0), self.t_array.flip(0)).reshape(lamb.shape)
