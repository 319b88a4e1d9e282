"""Samplers over noise levels: Euler and Heun (EDM), Adams-Bashforth, DPM-Solver++ 2M, and the ancestral Euler and DPM-Solver++ 2S.

One loop, `BaseDiffusionSampler.walk`, and one rule a method, `step`. Knows no network: a denoiser is any (x, sigma, cond) -> x0.
The solver computes in float32 or better, whatever the network does.

Sources: EDM (arXiv:2206.00364), Alg. 1 and 2; DPM-Solver++ (arXiv:2211.01095), Alg. 1 and 2; ancestral steps: DDPM (arXiv:2006.11239).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.sgm.guiders import IdentityGuider
from ldm.models.diffusion.sgm.sampling_utils import get_ancestral_step, linear_multistep_coeff, to_d, to_neg_log_sigma, to_sigma
from ldm.util import ConfigError, UserError, instantiate_from_config

__all__ = [
    "AncestralSampler",
    "BaseDiffusionSampler",
    "DPMPP2MSampler",
    "DPMPP2SAncestralSampler",
    "EDMSampler",
    "EulerAncestralSampler",
    "EulerEDMSampler",
    "HeunEDMSampler",
    "LinearMultistepSampler",
    "SingleStepDiffusionSampler",
]

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, one noise level for all samples) -> guided x0
Conditioning = Mapping[str, Any]


class BaseDiffusionSampler:
    """`sampler(denoiser, x, cond, uc)` draws samples from standard normal x (B, C, H, W); `walk` also shows the way there.

    denoiser: (x, sigma (B,), cond) -> x0. Random numbers come from the global generator through `noise_sampler`, which may be replaced.
    """

    def __init__(
        self,
        discretization_config: Any,  # {target, params} of the noise levels
        num_steps: int | None = None,  # sampling steps, unless the call gives them
        guider_config: Any = None,  # {target, params}; default: no guidance
        verbose: bool = False,  # show a progress bar
        device: torch.device | str | None = None,  # accepted for old configs; everything is computed where x is
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(f"{type(self).__name__} does not take {', '.join(sorted(unknown))}")
        self.num_steps, self.verbose = num_steps, verbose
        self.discretization = instantiate_from_config(discretization_config)
        self.guider = IdentityGuider() if guider_config is None else instantiate_from_config(guider_config)
        self.noise_sampler: Callable[[Tensor], Tensor] = torch.randn_like

    def prepare_sampling_loop(
        self, x: Tensor, cond: Conditioning, uc: Conditioning | None = None, num_steps: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor, int, Conditioning, Conditioning]:
        """x at the first noise level, ones (B,), the levels (on the CPU: they are numbers of the loop), their count, cond, uc."""
        steps = self.num_steps if num_steps is None else num_steps
        if steps is None:
            raise UserError(f"{type(self).__name__} needs num_steps, in its config or in the call")
        sigmas = self.discretization(steps)
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * torch.sqrt(1.0 + sigmas[0] ** 2.0)
        return x, x.new_ones(len(x)), sigmas, len(sigmas), cond, cond if uc is None else uc

    def denoise(self, x: Tensor, denoiser: Callable[..., Tensor], sigma: Tensor, cond: Conditioning, uc: Conditioning) -> Tensor:
        """Guided x0 of x at noise levels sigma (B,)."""
        return self.guider(denoiser(*self.guider.prepare_inputs(x, sigma, cond, uc)), sigma)

    def get_sigma_gen(self, num_sigmas: int) -> Iterable[int]:
        """Positions of the steps, with a progress bar if `verbose`."""
        if not self.verbose:
            return range(num_sigmas - 1)
        from tqdm.auto import tqdm

        return tqdm(range(num_sigmas - 1), desc=type(self).__name__)

    def walk(
        self,
        denoiser: Callable[..., Tensor],
        x: Tensor,
        cond: Conditioning,
        uc: Conditioning | None = None,
        num_steps: int | None = None,
    ) -> Iterator[Tensor]:
        """x after every step, noisiest first."""
        x, s_in, sigmas, num_sigmas, cond, uc = self.prepare_sampling_loop(x, cond, uc, num_steps)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return self.denoise(x, denoiser, s_in * sigma, cond, uc).to(x.dtype)

        past: list[Tensor] = []
        for i in self.get_sigma_gen(num_sigmas):
            x = self.step(x, i, sigmas, denoise, past)
            yield x

    def __call__(
        self,
        denoiser: Callable[..., Tensor],
        x: Tensor,  # standard normal; is not changed
        cond: Conditioning,
        uc: Conditioning | None = None,
        num_steps: int | None = None,
    ) -> Tensor:
        """The samples, as x0."""
        return deque(self.walk(denoiser, x, cond, uc, num_steps), maxlen=1)[0]

    def step(self, x: Tensor, i: int, sigmas: Tensor, denoise: Denoise, past: list[Tensor]) -> Tensor:
        """x at sigmas[i] -> x at sigmas[i + 1]. `past` belongs to the run: a multistep method keeps in it what it needs again."""
        raise NotImplementedError(f"{type(self).__name__} does not implement step()")


class SingleStepDiffusionSampler(BaseDiffusionSampler):
    """A sampler whose step needs nothing of the steps before."""

    def euler_step(self, x: Tensor, d: Tensor, dt: Tensor) -> Tensor:
        """x + dt d."""
        return x + dt * d


class EDMSampler(SingleStepDiffusionSampler):
    """EDM's stochastic sampler (Alg. 2): noise is added ("churn"), then an Euler step and perhaps a correction are taken."""

    def __init__(
        self,
        s_churn: float = 0.0,  # noise of a whole run; 0: deterministic (Alg. 1)
        s_tmin: float = 0.0,  # lowest and
        s_tmax: float = float("inf"),  # highest noise level at which it is added
        s_noise: float = 1.0,  # standard deviation of that noise
        **base: Any,  # of BaseDiffusionSampler
    ) -> None:
        super().__init__(**base)
        self.s_churn, self.s_tmin, self.s_tmax, self.s_noise = s_churn, s_tmin, s_tmax, s_noise

    def step(self, x: Tensor, i: int, sigmas: Tensor, denoise: Denoise, past: list[Tensor]) -> Tensor:
        """One iteration of Alg. 2."""
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        gamma = min(self.s_churn / (len(sigmas) - 1), 2**0.5 - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0
        sigma_hat = sigma * (gamma + 1.0)
        if gamma > 0:
            x = x + self.noise_sampler(x) * self.s_noise * (sigma_hat**2 - sigma**2).sqrt()
        d = to_d(x, sigma_hat, denoise(x, sigma_hat))
        dt = sigma_next - sigma_hat
        return self.correct(self.euler_step(x, d, dt), x, d, dt, sigma_next, denoise)

    def correct(self, x_next: Tensor, x: Tensor, d: Tensor, dt: Tensor, sigma_next: Tensor, denoise: Denoise) -> Tensor:
        """What becomes of the Euler step `x_next`."""
        raise NotImplementedError


class EulerEDMSampler(EDMSampler):
    """First order: the Euler step as it is."""

    def correct(self, x_next: Tensor, x: Tensor, d: Tensor, dt: Tensor, sigma_next: Tensor, denoise: Denoise) -> Tensor:
        """`x_next` itself."""
        return x_next


class HeunEDMSampler(EDMSampler):
    """Second order: the mean of the slopes at both ends, for a second call of the network; plain Euler to sigma 0."""

    def correct(self, x_next: Tensor, x: Tensor, d: Tensor, dt: Tensor, sigma_next: Tensor, denoise: Denoise) -> Tensor:
        """The trapezoidal step (Alg. 2, lines 9 to 11)."""
        if sigma_next == 0:
            return x_next
        d_next = to_d(x_next, sigma_next, denoise(x_next, sigma_next))
        return self.euler_step(x, (d + d_next) / 2.0, dt)


class AncestralSampler(SingleStepDiffusionSampler):
    """Steps to a level below the next one, and adds the noise that is missing. The noise is drawn in the last step too, unused."""

    def __init__(
        self,
        eta: float = 1.0,  # share of the noise that is renewed; 0: deterministic
        s_noise: float = 1.0,  # standard deviation of the renewed noise
        **base: Any,  # of BaseDiffusionSampler
    ) -> None:
        super().__init__(**base)
        self.eta, self.s_noise = eta, s_noise

    def step(self, x: Tensor, i: int, sigmas: Tensor, denoise: Denoise, past: list[Tensor]) -> Tensor:
        """One step down, one step up."""
        sigma_down, sigma_up = get_ancestral_step(sigmas[i], sigmas[i + 1], eta=self.eta)
        x = self.step_down(x, sigmas[i], sigma_down, denoise)
        noise = self.noise_sampler(x)
        return x + noise * self.s_noise * sigma_up if sigmas[i + 1] > 0 else x

    def ancestral_euler_step(self, x: Tensor, denoised: Tensor, sigma: Tensor, sigma_down: Tensor) -> Tensor:
        """The Euler step from sigma to sigma_down."""
        return self.euler_step(x, to_d(x, sigma, denoised), sigma_down - sigma)

    def step_down(self, x: Tensor, sigma: Tensor, sigma_down: Tensor, denoise: Denoise) -> Tensor:
        """The deterministic part."""
        raise NotImplementedError


class EulerAncestralSampler(AncestralSampler):
    """First order."""

    def step_down(self, x: Tensor, sigma: Tensor, sigma_down: Tensor, denoise: Denoise) -> Tensor:
        """An Euler step."""
        return self.ancestral_euler_step(x, denoise(x, sigma), sigma, sigma_down)


class DPMPP2SAncestralSampler(AncestralSampler):
    """DPM-Solver++ 2S (arXiv:2211.01095, Alg. 1 with r = 1/2): a second call of the network half-way in log sigma."""

    def step_down(self, x: Tensor, sigma: Tensor, sigma_down: Tensor, denoise: Denoise) -> Tensor:
        """A second-order step; Euler to sigma 0."""
        denoised = denoise(x, sigma)
        if sigma_down == 0:
            return self.ancestral_euler_step(x, denoised, sigma, sigma_down)
        t, t_down = to_neg_log_sigma(sigma), to_neg_log_sigma(sigma_down)
        h = t_down - t
        sigma_mid = to_sigma(t + 0.5 * h)
        x_mid = sigma_mid / sigma * x - (-0.5 * h).expm1() * denoised
        return sigma_down / sigma * x - (-h).expm1() * denoise(x_mid, sigma_mid)


class DPMPP2MSampler(BaseDiffusionSampler):
    """DPM-Solver++ 2M (arXiv:2211.01095, Alg. 2): second order with one call a step, from the x0 of the step before."""

    def step(self, x: Tensor, i: int, sigmas: Tensor, denoise: Denoise, past: list[Tensor]) -> Tensor:
        """First order at the start, and to sigma 0, where it gives the network's x0."""
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = denoise(x, sigma)
        previous = past.pop() if past else None
        past.append(denoised)
        if sigma_next == 0:
            return denoised
        t, t_next = to_neg_log_sigma(sigma), to_neg_log_sigma(sigma_next)
        h = t_next - t
        if previous is not None:
            r = (t - to_neg_log_sigma(sigmas[i - 1])) / h
            denoised = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * previous
        return sigma_next / sigma * x - (-h).expm1() * denoised


class LinearMultistepSampler(BaseDiffusionSampler):
    """Adams-Bashforth of up to `order`, with coefficients for the uneven levels."""

    def __init__(
        self,
        order: int = 4,  # derivatives that a step uses; the first steps have fewer
        **base: Any,  # of BaseDiffusionSampler
    ) -> None:
        if order < 1:
            raise ConfigError(f"LinearMultistepSampler: order {order} is too low: use 1 or more")
        super().__init__(**base)
        self.order = order

    def step(self, x: Tensor, i: int, sigmas: Tensor, denoise: Denoise, past: list[Tensor]) -> Tensor:
        """x plus the weighted sum of the last derivatives."""
        past.append(to_d(x, sigmas[i], denoise(x, sigmas[i])))
        del past[: -self.order]
        levels = sigmas.tolist()
        return x + sum(linear_multistep_coeff(len(past), levels, i, j) * d for j, d in enumerate(reversed(past)))
