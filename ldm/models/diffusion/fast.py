"""The recommended sampler for few model calls: what measured best from 5 to 30 of them (docs/samplers.md, scripts/plot_samplers.py).

Solver: DPM-Solver in eps, multistep, of three points, without lower orders at the end. What changes with the number of steps:

| steps | levels | last one | weights |
|---|---|---|---|
| to 6 | even in log-SNR | first noise level | as usually coded |
| 7 to 10 | Karras | first noise level | as usually coded |
| 11 to 19 | Karras | clean picture, extrapolated from the last two predictions of it | as usually coded |
| from 20 | Karras | the same | of third order |

The usual weights are of second order; their error is the larger one only where steps are short.
"""

from __future__ import annotations

from typing import Any

from ldm.models.diffusion.dpm_solver.sampler import DPMSolverSampler
from ldm.models.diffusion.sampler import Grid

__all__ = ["FastSampler"]

_KARRAS, _CLEAN, _THIRD_ORDER = 7, 11, 20  # from so many steps on


class FastSampler(DPMSolverSampler):
    """Deterministic; one model call a step."""

    name = "fast"
    spacing, final = "by steps", "by steps"

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None, noise: Any = None, **base: Any) -> None:
        solver: dict[str, Any] = {"algorithm": "dpmsolver", "order": 3, "solver_type": "taylor"}
        super().__init__(model, schedule, device, noise, **solver, lower_order_final=False, extrapolate=True, **base)

    def make_grid(self, steps: int, eta: float, spacing: str, final: str) -> Grid:
        """As DPM-Solver's; spacing and end are chosen here unless they are given."""
        spacing = ("karras" if steps >= _KARRAS else "logSNR") if spacing == "by steps" else spacing
        final = ("clean" if steps >= _CLEAN else "first") if final == "by steps" else final
        return super().make_grid(steps, eta, spacing, final)

    def options_for(self, grid: Grid) -> dict[str, Any]:
        """As DPM-Solver's, with the weights for so many steps."""
        return {**super().options_for(grid), "exact_weights": len(grid) >= _THIRD_ORDER}
