"""DPM-Solver and DPM-Solver++ behind the signatures of the published samplers: one rule in the shared loop for all of them.

Four algorithms (dpmsolver integrates eps, dpmsolver++ x0, "sde-" adds noise), orders 1 to 3, multistep and singlestep. A singlestep
solver takes its steps in stages of one model call; each stage is a step of the walk, and the grid says which of them belong together. So
a walk has as many model calls as it was asked for, and masks, img2img starts, callbacks and intermediates work as they do with DDIM.

Sources: DPM-Solver (arXiv:2206.00927), DPM-Solver++ (arXiv:2211.01095). What is usually called order 3 is of order 2, see `exact_weights`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from ldm.models.diffusion.dpm_solver.noise_schedule import choice
from ldm.models.diffusion.dpm_solver.updates import (
    ALGORITHMS,
    SOLVER_TYPES,
    Coefficients,
    coefficients,
    extrapolated_x0,
    multistep_update,
    singlestep_update,
)
from ldm.models.diffusion.sampler import Denoise, Grid, Mover, Rule, Sampler, Timestep
from ldm.models.diffusion.sigmas import half_log_snr, nodes, steps_between
from ldm.modules.diffusionmodules.schedule import check_steps
from ldm.util import UserError

__all__ = ["METHODS", "DPMSolverRule", "DPMSolverSampler", "singlestep_orders"]

METHODS = ("multistep", "singlestep")
SPACINGS = ("uniform", "time_uniform", "time_quadratic", "logSNR", "karras", "exponential", "linspace", "leading", "trailing")
_FEW_STEPS = 15  # below this many steps the last ones are of lower order, which is stabler


def singlestep_orders(calls: int, order: int, low_end: bool = True) -> list[int]:
    """The orders of single steps that take `calls` model calls together.

    What does not divide by three ends in steps of order 2 and 1, as published. Without `low_end` no step of a third-order walk is below
    order 2, and a few of those do not lower the order of the whole.
    """
    if order < 3:
        return [order] * (calls // order) + [1] * (calls % order)
    whole, rest = divmod(calls, 3)
    if calls > 1 and not low_end:
        return [[3] * whole, [3] * (whole - 1) + [2, 2], [3] * whole + [2]][rest]
    return [3] * (whole - 1) + [2, 1] if rest == 0 else [3] * whole + [rest]


class DPMSolverRule:
    """The solver of one walk along `grid`; keeps the outputs of the steps before, and those of the stages of this one."""

    def __init__(
        self,
        grid: Grid,
        algorithm: str = "dpmsolver++",
        order: int = 2,
        method: str = "multistep",
        solver_type: str = "dpm_solver",
        lower_order_final: bool = True,
        exact_weights: bool = False,
        extrapolate: bool = False,
        eta: float = 1.0,  # of the stochastic algorithms
    ) -> None:
        assert grid.group is not None
        self.algorithm, self.order, self.solver_type, self.eta = algorithm, order, solver_type, eta
        self.third = 2.0 if exact_weights else 1.0
        self.multistep, self.extrapolate = method == "multistep", extrapolate
        self.group = grid.group.tolist()
        self.low_end = lower_order_final and len(grid) < _FEW_STEPS
        self.i = 0
        self.past: list[tuple[float, Tensor]] = []  # lambda and output where earlier steps began, newest first
        self.stages: list[tuple[float, Tensor]] = []  # the same within this step, oldest first
        self.start: Tensor | None = None  # x and
        self.abar = 0.0  # abar where this step began
        self.last_x0: tuple[float, Tensor] | None = None  # lambda and x0 of the last call

    def __call__(self, x: Tensor, t: Timestep, t_next: Timestep, denoise: Denoise, move: Mover) -> tuple[Tensor, Tensor]:
        """One model call: a multistep update, or a stage of a single step."""
        i, self.i = self.i, self.i + 1
        prediction = move.limited(x, denoise(x, t))
        here, there = half_log_snr(move.abar), half_log_snr(move.abar_prev)
        last, self.last_x0 = self.last_x0, (here, prediction.x0)
        if math.isinf(here) or math.isinf(there):  # from pure noise, to or from a clean picture: the first order is the limit
            self.start = None
            if self.extrapolate and last is not None and there == math.inf and here > last[0]:
                return (extrapolated_x0(prediction.x0, last[1], here - last[0]),) * 2
            return move(x, *prediction)
        output = prediction.x0 if self.algorithm.endswith("++") else prediction.eps
        if self.start is None or self.group[i] != self.group[i - 1]:
            self.start, self.abar, self.stages = x, move.abar, []
        self.stages.append((here, output))
        c = coefficients(self.algorithm, self.abar, move.abar_prev, self.eta)
        size = self.group.count(self.group[i])
        x_next = self._multistep(x, c, len(self.group) - i) if size == 1 else self._stage(self.start, c, size)
        if self.multistep and len(self.stages) == size and here != there:
            self.past = [self.stages[0], *self.past][:2]
        noise = move.noise(x, c.noise)
        return (x_next if noise is None else x_next + noise), prediction.x0

    def _multistep(self, x: Tensor, c: Coefficients, left: int) -> Tensor:
        known = [*self.stages, *self.past][: min(self.order, left) if self.low_end else self.order]
        if c.h == 0.0:
            return x
        back = [(newer[0] - older[0]) / c.h for newer, older in pairwise(known)]
        return multistep_update(x, c, [m for _, m in known], back, self.solver_type, self.third)

    def _stage(self, x: Tensor, c: Coefficients, size: int) -> Tensor:
        """To the next stage, or with the last one to the end of the step; always from where the step began."""
        if c.h == 0.0:
            return x
        at = [(where - self.stages[0][0]) / c.h for where, _ in self.stages[1:]]
        inner = len(self.stages) < size
        return singlestep_update(x, c, [m for _, m in self.stages], at, "taylor" if inner else self.solver_type)


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M) in even time steps, as published, unless told otherwise: about 20 steps do what 50 of DDIM do."""

    name = "DPM-Solver"

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",
        device: Any = None,
        noise: Any = None,
        *,
        algorithm: str = "dpmsolver++",  # dpmsolver, dpmsolver++, sde-dpmsolver or sde-dpmsolver++
        order: int = 2,  # 1, 2 or 3
        method: str = "multistep",  # or singlestep
        solver_type: str = "dpm_solver",  # of the second order, and of the third in single steps: dpm_solver or taylor
        lower_order_final: bool = True,  # end with lower orders: multistep if there are less than 15 steps, singlestep as its orders go
        exact_weights: bool = False,  # multistep of order 3: the weights of third order, and not the usual ones
        second_order_start: bool = False,  # multistep: begin with a single step of order 2, for a model call more
        extrapolate: bool = False,  # the step to a clean picture goes on from the last two x0, and not to the last one
        **base: Any,  # of Sampler
    ) -> None:
        super().__init__(model, schedule, device, noise, **base)
        if method == "singlestep" and (exact_weights or second_order_start):
            raise UserError("exact_weights and second_order_start are for multistep: singlestep has them, leave them out")
        self.stochastic = algorithm.startswith("sde")
        self.invertible, self.default_eta = not self.stochastic, 1.0 if self.stochastic else 0.0
        self.second_order_start = second_order_start
        self._options: dict[str, Any] = {
            "algorithm": choice(algorithm, ALGORITHMS, "algorithm"),
            "order": choice(order, (1, 2, 3), "order"),
            "method": choice(method, METHODS, "method"),
            "solver_type": choice(solver_type, SOLVER_TYPES, "solver_type"),
            "lower_order_final": lower_order_final,
            "exact_weights": exact_weights,
            "extrapolate": extrapolate,
        }

    def rule(self, grid: Grid) -> Rule:
        """A fresh history."""
        return DPMSolverRule(grid, **self.options_for(grid), eta=getattr(self, "eta", self.default_eta))

    def options_for(self, grid: Grid) -> dict[str, Any]:
        """Of the solver, for a walk along `grid`."""
        return self._options

    def check(self, eta: float) -> None:
        """Only the stochastic algorithms add noise."""
        if not self.stochastic:
            super().check(eta)
        elif not 0.0 < eta <= 1.0:
            raise UserError(
                f"eta {eta} is out of range for {self._options['algorithm']}: above 0 (little noise) to 1; without noise use dpmsolver++"
            )

    def make_grid(self, steps: int, eta: float, spacing: str, final: str) -> Grid:
        """`steps` model calls; they need not be at whole timesteps. Here "uniform" means even in time."""
        if spacing not in SPACINGS:
            raise UserError(f"timestep spacing {spacing!r} is unknown to DPM-Solver: use one of {', '.join(SPACINGS)}")
        spacing = "time_uniform" if spacing == "uniform" else spacing
        calls, source = check_steps(steps, self.noise_schedule.T), self.noise_schedule
        sizes = self._sizes(calls, bool(source.abar[-1] == 0.0), final == "clean")
        if self._options["method"] == "singlestep" and spacing.startswith("time_"):  # as published: stages on the fine grid
            grid = steps_between(source, nodes(source, calls, spacing, final), eta)
            return replace(grid, group=np.repeat(np.arange(len(sizes)), sizes))
        return steps_between(source, nodes(source, len(sizes), spacing, final), eta, sizes)

    def _sizes(self, calls: int, pure: bool, clean: bool) -> list[int]:
        """How many stages each step has. Steps from pure noise and to a clean picture have one."""
        if self._options["method"] == "singlestep":
            outer = min(pure + clean, calls - 1)
            inner = singlestep_orders(calls - outer, self._options["order"], self._options["lower_order_final"])
            return [1] * (outer - clean) + inner + [1] * min(outer, clean)
        if self.second_order_start and calls > 1 + pure + clean:
            return [1] * pure + [2] + [1] * (calls - 2 - pure)
        return [1] * calls
