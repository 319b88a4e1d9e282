"""DPM-Solver++(2M) behind the signatures of the published samplers (arXiv:2211.01095, Algorithm 2).

In the shared loop it is DDIM with another x0: the last two predictions, extrapolated to the middle of the step in log-SNR. So masks,
img2img starts, callbacks and intermediates work as they do there. It walks in continuous time: timesteps are fractions.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import Denoise, Mover, Rule, Sampler, Timestep
from ldm.modules.diffusionmodules.schedule import Grid, NoiseSchedule, check_steps
from ldm.util import UserError

__all__ = ["DPMSolverRule", "DPMSolverSampler"]

SPACINGS = ("uniform", "time_uniform", "time_quadratic", "logSNR")
_FEW_STEPS = 15  # below this many steps the last one is of first order, which is stabler


def half_log_snr(abar: float) -> float:
    """lambda = log(alpha / sigma) = log(SNR) / 2; minus infinity for pure noise, infinity for none."""
    if abar in (0.0, 1.0):
        return math.inf if abar else -math.inf
    return 0.5 * math.log(abar / (1.0 - abar))


class DPMSolverRule:
    """The solver of one walk of `steps` steps; remembers the last prediction and the lambda it was made at."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.few = steps < _FEW_STEPS
        self.last: tuple[float, Tensor] | None = None

    def __call__(self, x: Tensor, t: Timestep, t_next: Timestep, denoise: Denoise, move: Mover) -> tuple[Tensor, Tensor]:
        """One model call; second order once there is a step to look back on."""
        prediction, here, there = denoise(x, t), half_log_snr(move.abar), half_log_snr(move.abar_prev)
        last, self.last, self.left = self.last, (here, prediction.x0), self.left - 1
        first_order = last is None or last[0] == here or (self.few and self.left == 0)
        if first_order or last is None or math.isinf(there) or move.abar == 1.0:
            return move(x, prediction.eps, prediction.x0)
        ratio = (there - here) / (here - last[0])  # this step's length in lambda over the one's before
        x0 = prediction.x0 + 0.5 * ratio * (prediction.x0 - last[1])
        return move(x, (x - move.abar**0.5 * x0) / (1.0 - move.abar) ** 0.5, x0)


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M): about 20 steps do what 50 of DDIM do. Deterministic, so `eta` must stay 0.

    `ddim_discretize` may be "uniform" (even in time, the published choice), "time_quadratic" or "logSNR".
    """

    name = "DPM-Solver"
    draws_unused = False

    def rule(self, steps: int) -> Rule:
        """A fresh history for a walk of `steps` steps."""
        return DPMSolverRule(steps)

    def check(self, eta: float) -> None:
        """Noise would spoil the history."""
        if eta != 0:
            raise UserError(f"DPM-Solver is deterministic and cannot use eta {eta}: leave eta at 0, or use DDIM")

    def make_grid(self, steps: int, eta: float, spacing: str, final: str) -> Grid:
        """From timestep T - 1 to 0 in `steps` steps that need not be whole timesteps."""
        if spacing not in SPACINGS:
            raise UserError(f"timestep spacing {spacing!r} is unknown to DPM-Solver: use one of {', '.join(SPACINGS)}")
        if final not in ("first", "clean"):
            raise UserError(f"final {final!r} is unknown: use first (abar of timestep 0) or clean (abar 1)")
        schedule = self.noise_schedule
        t = continuous_timesteps(schedule, check_steps(steps, schedule.T), spacing)  # (steps + 1,)
        abar = np.array([schedule.abar_at(s) for s in t.tolist()])
        if final == "clean":
            abar[-1] = 1.0
        return Grid(t[:-1], abar[:-1], abar[1:], np.zeros(steps))


def continuous_timesteps(schedule: NoiseSchedule, steps: int, spacing: str) -> np.ndarray:
    """Both ends of each of `steps` steps, float64 (steps + 1,), from T - 1 down to 0; even in time, its root, or log-SNR."""
    T = schedule.T
    if spacing == "time_quadratic":  # time runs from 1 / T to 1, timestep t is time (t + 1) / T
        return np.linspace(1.0, T**-0.5, steps + 1) ** 2 * T - 1
    if spacing == "logSNR":
        lambdas = np.array([half_log_snr(a) for a in schedule.abar])
        if math.isinf(lambdas[-1]):
            raise UserError("spacing logSNR needs a schedule that does not end in pure noise: use uniform")
        log_abar = -np.logaddexp(0.0, -2.0 * np.linspace(lambdas[-1], lambdas[0], steps + 1))
        t = np.interp(log_abar, np.log(schedule.abar[::-1]), np.arange(T)[::-1])
        t[0], t[-1] = T - 1, 0
        return t
    return np.linspace(T - 1, 0.0, steps + 1)
