"""Two ways to do one thing, timed in turn, so that what else a machine does slows both alike. Pure; knows no network.

Only ratios are worth reporting: times of one run depend on the machine, on its temperature and on its other work.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ldm.util import UserError

T = TypeVar("T")

CLOCKS = {
    "wall": time.perf_counter,
    "cpu": time.process_time,  # of all threads: for one thread on a machine with other work to do
}


@dataclass(frozen=True)
class Pair:
    """One thing done in two ways, with a number for how far the results are apart (relative)."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    difference: Callable[[Any, Any], float]


@dataclass(frozen=True)
class Row:
    """Measurements of a pair: entry k of both lists were taken next to each other."""

    name: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    difference: float  # of the results, relative
    unit: str = "s"

    @property
    def ratios(self) -> list[float]:
        """Theirs by ours, one a round: above 1 where ours needs less."""
        return [b / a for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the rounds' ratios; both are the ratio itself where there is one round."""
        if len(self.ours) == 1:
            return self.ratio, self.ratio
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high


def measure(
    pair: Pair,
    rounds: int,
    *,
    warmup: int = 1,  # calls of each that are not counted; the first of them is compared
    tolerance: float = float("inf"),  # largest relative difference of the results
    clock: Callable[[], float] = time.perf_counter,
    synchronize: Callable[[], None] = lambda: None,  # waits until the device has done what it was asked to
) -> Row:
    """Time both sides `rounds` times, in turn.

    Raises `UserError` if the results are further apart than `tolerance`: times of different work are not compared.
    """
    if rounds < 1 or warmup < 1:
        raise UserError(f"{rounds} rounds after {warmup} calls to warm up: give 1 or more of each")
    difference = pair.difference(pair.ours(), pair.theirs())
    if not difference <= tolerance:
        raise UserError(f"{pair.name}: the results differ by {difference:.2g}, more than {tolerance:.2g}: not the same work")
    for _ in range(warmup - 1):
        pair.ours()
        pair.theirs()

    def timed(run: Callable[[], Any]) -> float:
        synchronize()
        began = clock()
        run()
        synchronize()
        return clock() - began

    ours, theirs = alternate(rounds, lambda: timed(pair.ours), lambda: timed(pair.theirs))
    return Row(pair.name, tuple(ours), tuple(theirs), difference)


def alternate(rounds: int, ours: Callable[[], T], theirs: Callable[[], T]) -> tuple[list[T], list[T]]:
    """What both say in each round; who begins changes from round to round, so that a drift of the machine favours neither."""
    said: tuple[list[T], list[T]] = ([], [])
    for i in range(rounds):
        for side, ask in [(0, ours), (1, theirs)] if i % 2 == 0 else [(1, theirs), (0, ours)]:
            said[side].append(ask())
    return said


def markdown(rows: Sequence[Row]) -> str:
    """One line a row: medians, ratio with its quartiles, how far the results are apart."""
    lines = ["| what | ours | diffusers | diffusers / ours (quartiles) | results differ by |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in rows:
        ours, theirs = (_shown(statistics.median(times), row.unit) for times in (row.ours, row.theirs))
        low, high = row.spread
        lines.append(f"| {row.name} | {ours} | {theirs} | **{row.ratio:.2f}** ({low:.2f} to {high:.2f}) | {row.difference:.1g} |")
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    if unit == "s" and value < 1.0:
        return f"{1000 * value:.3g} ms"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
