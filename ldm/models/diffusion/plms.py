"""PLMS: pseudo linear multistep sampling (PNDM, arXiv:2202.09778).

eps is extrapolated from the last four model calls; the first step, which has no history, is a pseudo improved Euler step of two calls.
From pure noise, where eps is x itself and no blend of it leads to an x0, the first step follows the predicted x0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.sampler import Denoise, Grid, Mover, Rule, Sampler, Timestep

__all__ = ["PLMSRule", "PLMSSampler", "adams_bashforth"]

# Weights of the newest eps and of those before it, by how many there are (PNDM, Eq. 9 and 12, and the two orders between).
_WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def adams_bashforth(eps: Sequence[Tensor]) -> Tensor:
    """eps for the step to come, from one to four values on an even grid, newest first."""
    return sum((w * e for w, e in zip(_WEIGHTS[len(eps) - 1], eps, strict=True)), torch.zeros_like(eps[0]))


class PLMSRule:
    """The solver of one walk; `history` holds up to three eps, newest first."""

    def __init__(self, history: Sequence[Tensor] = ()) -> None:
        self.history = list(history)[:3]

    def __call__(self, x: Tensor, t: Timestep, t_next: Timestep, denoise: Denoise, move: Mover) -> tuple[Tensor, Tensor]:
        """Order 2, 3, then 4 once there is history; two model calls at first, one after."""
        prediction = denoise(x, t)
        eps = prediction.eps
        if move.abar == 0.0:
            self.history = [eps]
            return move(x, *prediction)
        if self.history:
            blend = adams_bashforth([eps, *self.history])
        else:
            guess, _ = move(x, eps)
            blend = (eps + denoise(guess, t_next).eps) / 2
        self.history = [eps, *self.history][:3]
        return move(x, blend)


class PLMSSampler(Sampler):
    """PLMS with the signatures of the published samplers; deterministic, so `eta` must stay 0."""

    name = "PLMS"
    draws_unused = True
    shifted_levels = True

    def rule(self, grid: Grid) -> Rule:
        """An empty history for every walk."""
        return PLMSRule()

    def calls(self, grid: Grid) -> int:
        """The first step takes two, unless it starts from pure noise."""
        return len(grid) + int(len(grid) > 0 and grid.abar[0] > 0.0)

    def plms_sampling(self, cond: Any, shape: Sequence[int], **options: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Run the schedule of `make_schedule` for noise of `shape` (B, C, H, W); options as of `sample`, and the legacy `timesteps`."""
        return self._sampling(cond, shape, **options)

    @torch.no_grad()
    def p_sample_plms(
        self,
        x: Tensor,
        c: Any,
        t: Tensor,
        index: int,
        use_original_steps: bool = False,
        old_eps: Sequence[Tensor] | None = None,  # of the steps before, newest last
        t_next: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step at timesteps t (B,): (x one level cleaner, predicted x0, eps to append to `old_eps`)."""
        rule = PLMSRule(list(old_eps or ())[::-1])
        x, pred_x0 = self._single(rule, x, c, t, t if t_next is None else t_next, index, use_original_steps, **options)
        return x, pred_x0, rule.history[0]
