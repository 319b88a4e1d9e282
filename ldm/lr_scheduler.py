"""Learning-rate factors as pure functions of the step number, for `torch.optim.lr_scheduler.LambdaLR`.

A schedule holds numbers only: the factor of step n never depends on calls made before, so resuming needs no state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ldm.util import ConfigError

log = logging.getLogger(__name__)


def _ramp(n: float, steps: float, start: float, end: float) -> float:
    """Straight line from `start` at 0 to `end` at `steps`."""
    return start + (end - start) * n / steps


def _cosine(t: float, high: float, low: float) -> float:
    """Half a cosine from `high` at t=0 to `low` at t=1 and after (arXiv:1608.03983, Eq. 5)."""
    return low + 0.5 * (high - low) * (1 + math.cos(math.pi * min(t, 1.0)))


class LambdaWarmUpCosineScheduler:
    """Linear warm-up from lr_start to lr_max, then one cosine down to lr_min, which is kept. Use a base lr of 1."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,  # the step at which lr_min is reached, warm-up included
        verbosity_interval: int = 0,  # log the factor every so many steps; 0: never
    ):
        if max_decay_steps <= warm_up_steps:
            raise ConfigError(f"max_decay_steps={max_decay_steps} must be greater than warm_up_steps={warm_up_steps}")
        self.lr_warm_up_steps = warm_up_steps
        self.lr_start = lr_start
        self.lr_min = lr_min
        self.lr_max = lr_max
        self.lr_max_decay_steps = max_decay_steps
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int, **kwargs: Any) -> float:
        """The factor of step n >= 0. Keywords are accepted for callers of the original signature and change nothing."""
        warm = self.lr_warm_up_steps
        if n < warm:
            lr = _ramp(n, warm, self.lr_start, self.lr_max)
        else:
            lr = _cosine((n - warm) / (self.lr_max_decay_steps - warm), self.lr_max, self.lr_min)
        _report(n, lr, self.verbosity_interval)
        return lr

    def __call__(self, n: int, **kwargs: Any) -> float:
        """As `schedule`, the form LambdaLR calls."""
        return self.schedule(n, **kwargs)


class LambdaWarmUpCosineScheduler2:
    """Cycles, each of a linear warm-up from f_start to f_max and a cosine down to f_min. After the last: its end value.

    All arguments but the last are lists with one entry for each cycle.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],  # steps, warm-up included
        verbosity_interval: int = 0,
    ):
        lists = {
            "warm_up_steps": warm_up_steps,
            "f_min": f_min,
            "f_max": f_max,
            "f_start": f_start,
            "cycle_lengths": cycle_lengths,
        }
        if len({len(values) for values in lists.values()}) != 1 or not len(cycle_lengths):
            lengths = ", ".join(f"{name} has {len(values)}" for name, values in lists.items())
            raise ConfigError(f"a schedule needs one entry for each cycle in every list, but {lengths}")
        self.lr_warm_up_steps = list(warm_up_steps)
        self.f_start = list(f_start)
        self.f_min = list(f_min)
        self.f_max = list(f_max)
        self.cycle_lengths = list(cycle_lengths)
        self.cum_cycles = list(accumulate(self.cycle_lengths, initial=0))
        self.verbosity_interval = verbosity_interval

    def find_in_interval(self, n: int) -> int:
        """Index of the cycle that step n falls in; a boundary belongs to the earlier one, later steps to the last."""
        inside = (i for i, end in enumerate(self.cum_cycles[1:]) if n <= end)
        return next(inside, len(self.cycle_lengths) - 1)

    def schedule(self, n: int, **kwargs: Any) -> float:
        """The factor of step n >= 0. Keywords are accepted for callers of the original signature and change nothing."""
        cycle = self.find_in_interval(n)
        step = min(n - self.cum_cycles[cycle], self.cycle_lengths[cycle])
        warm = self.lr_warm_up_steps[cycle]
        f = _ramp(step, warm, self.f_start[cycle], self.f_max[cycle]) if step < warm else self._decay(step, cycle)
        _report(n, f, self.verbosity_interval)
        return f

    def _decay(self, step: int, cycle: int) -> float:
        warm = self.lr_warm_up_steps[cycle]
        t = (step - warm) / max(self.cycle_lengths[cycle] - warm, 1)
        return _cosine(t, self.f_max[cycle], self.f_min[cycle])

    def __call__(self, n: int, **kwargs: Any) -> float:
        """As `schedule`, the form LambdaLR calls."""
        return self.schedule(n, **kwargs)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """As LambdaWarmUpCosineScheduler2, with a straight line, f_max at the cycle's first step to f_min at its last."""

    def _decay(self, step: int, cycle: int) -> float:
        length = self.cycle_lengths[cycle]
        return _ramp(length - step, length, self.f_min[cycle], self.f_max[cycle])


def _report(n: int, factor: float, interval: int) -> None:
    if interval > 0 and n % interval == 0:
        log.info("step %d: learning-rate factor %g", n, factor)
