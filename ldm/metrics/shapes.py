"""The oracle of the shapes world: reads a picture back and says whether it is what its prompt demands.

Owns the reading rules and the report. Knows no model: it takes pictures and specs. numpy only, deterministic.
The table follows GenEval (arXiv:2310.11513): correct pictures by kind of prompt, overall as the mean over kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, permutations
from typing import Any, Protocol

import numpy as np

from ldm.data.shapes_text import Part, Spec
from ldm.data.shapes_world import BACKGROUNDS, CANVAS, COLORS, HALF_WIDTHS, KINDS, OUTLINES, SHAPES

CHECKS = ("background", "count", "color", "shape", "size", "relation")
# in pixels and levels of the 256 x 256 picture
OFF_BACKGROUND = 40  # an object's pixel differs by more than this from the background in some channel
LEAST_AREA = 200  # px; smaller components are specks, not objects
LEAST_IOU = 0.6  # of the best shape template, after the penalty for a wrong aspect ratio
SIZE_THRESHOLD = 38.0  # half-height at and above which an object is large
RELATION_MARGIN = 10.0  # a relation must hold by more than this, centre to centre
_TEMPLATE = 64  # side of the templates
_MOST_MATCHED = 6  # objects, largest first, that are tried against the parts of a prompt


@dataclass(frozen=True)
class Found:
    """An object read from a picture, in pixels of the 256 x 256 canvas. `shape` is None if no template fits."""

    shape: str | None
    color: str
    size: str
    radius: float
    cx: float
    cy: float
    iou: float  # of the best template, after the penalty for a wrong aspect ratio
    area: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows; objects from the largest to the smallest."""

    background: str
    objects: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is what a spec demands. A check is None where the spec leaves it open.

    The relation is None, too, where the two objects to compare are not there.
    """

    correct: bool
    checks: dict[str, bool | None]
    reasons: tuple[str, ...]  # one line for each check that failed
    reading: Reading


class Record(Protocol):
    """What `score` needs to know of a prompt; `ldm.data.shapes.EvalPrompt` is one."""

    spec: Spec
    kind: str
    paraphrased: bool
    unseen: bool


# --- reading ---------------------------------------------------------------------------------------------------------


def read_picture(image: np.ndarray) -> Reading:
    """Read a square picture back: uint8 (H, W, 3), or float (H, W, 3) in [-1, 1].

    Other sides are resized to 256 first, so that the rules stay those of the world.
    """
    pixels = _as_levels(image)  # (256, 256, 3) int16
    ring = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    back = np.median(np.concatenate([r.reshape(-1, 3) for r in ring]), axis=0)
    off = (np.abs(pixels - back.astype(np.int16)) > OFF_BACKGROUND).any(-1)  # (256, 256)
    labels, areas = label_components(off)
    large_enough = [int(k) for k in np.argsort(-areas, kind="stable") if areas[k] >= LEAST_AREA]
    objects = tuple(_read_object(pixels, labels == k + 1) for k in large_enough)
    return Reading(_nearest(back, BACKGROUNDS), objects)


def _as_levels(image: np.ndarray) -> np.ndarray:
    """Any picture that can be read, as levels 0..255 of the canvas: int16 (256, 256, 3)."""
    image = np.asarray(image)
    is_float = image.dtype.kind == "f"
    square = image.ndim == 3 and image.shape[2] == 3 and image.shape[0] == image.shape[1] > 0
    if not square or not (is_float or image.dtype == np.uint8):
        from ldm.util import UserError

        raise UserError(
            f"a picture of shape {image.shape} and type {image.dtype} cannot be read: "
            "give a square one (H, W, 3), as uint8 or as float in [-1, 1]"
        )
    if is_float:
        levels = np.rint((np.nan_to_num(image.astype(np.float32)) + 1) * 127.5)
        image = np.clip(levels, 0, 255).astype(np.uint8)
    if image.shape[0] != CANVAS:
        from PIL import Image

        image = np.asarray(Image.fromarray(image).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR))
    return image.astype(np.int16)


def _nearest(rgb: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(((np.asarray(palette[name]) - rgb) ** 2).sum()))


def _read_object(pixels: np.ndarray, mask: np.ndarray) -> Found:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y0, y1, x0, x1 = ys[0], ys[-1] + 1, xs[0], xs[-1] + 1
    box = mask[y0:y1, x0:x1]
    core = _eroded(box)  # without the soft edge, whose colour is mixed with the background
    color = np.median(pixels[y0:y1, x0:x1][core if core.any() else box], axis=0)
    shape, iou = _best_shape(box)
    radius = float(y1 - y0) / 2
    return Found(
        shape=shape if iou >= LEAST_IOU else None,
        color=_nearest(color, COLORS),
        size="large" if radius >= SIZE_THRESHOLD else "small",
        radius=radius,
        cx=float(x0 + x1) / 2,
        cy=float(y0 + y1) / 2,
        iou=iou,
        area=float(box.sum()),
    )


def _eroded(mask: np.ndarray) -> np.ndarray:
    """Pixels whose four neighbours are set too."""
    m = np.pad(mask, 1)
    return mask & m[:-2, 1:-1] & m[2:, 1:-1] & m[1:-1, :-2] & m[1:-1, 2:]


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Every shape filling its bounding box, (8, 64, 64) bool, and the aspect ratios width / height (8,)."""
    grid = (np.arange(_TEMPLATE, dtype=np.float32) + 0.5) / (_TEMPLATE / 2) - 1
    aspects = np.array([HALF_WIDTHS[s] for s in SHAPES])
    masks = [OUTLINES[s](grid[None] * np.float32(a), grid[:, None]) <= 0 for s, a in zip(SHAPES, aspects, strict=True)]
    return np.stack(masks), aspects


def _best_shape(box: np.ndarray) -> tuple[str, float]:
    """Best template for a mask cut out at its bounding box, and its intersection over union times the aspect penalty."""
    templates, aspects = _templates()
    h, w = box.shape
    rows, cols = np.arange(_TEMPLATE) * h // _TEMPLATE, np.arange(_TEMPLATE) * w // _TEMPLATE
    mask = box[rows[:, None], cols[None]]  # (64, 64)
    iou = (templates & mask).sum((1, 2)) / (templates | mask).sum((1, 2))
    ratio = (w / h) / aspects
    fit = iou * np.minimum(ratio, 1 / ratio)
    best = int(fit.argmax())
    return SHAPES[best], float(fit[best])


def label_components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-connected components of a bool mask (H, W): labels (H, W) with 0 for unset, and areas, areas[k] of label k + 1.

    Union-find over horizontal runs: each row's runs are joined with those of the row above that they touch.
    """
    h, w = mask.shape
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)  # (H, W + 1)
    row, start = np.nonzero(steps == 1)
    stop = np.nonzero(steps == -1)[1]  # one past the last pixel
    parent = list(range(len(row)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    first = np.searchsorted(row, np.arange(h + 1)).tolist()  # runs of row y: first[y] to first[y + 1]
    starts, stops = start.tolist(), stop.tolist()
    for y in range(1, h):
        i, j = first[y - 1], first[y]
        while i < first[y] and j < first[y + 1]:
            if starts[i] <= stops[j] and starts[j] <= stops[i]:
                a, b = root(i), root(j)
                parent[max(a, b)] = min(a, b)
            if stops[i] < stops[j]:
                i += 1
            else:
                j += 1
    _, group = np.unique([root(k) for k in range(len(row))], return_inverse=True)
    areas = np.bincount(group.astype(np.int64), weights=stop - start).astype(np.int64)
    labels = np.zeros((h, w), np.int32)
    for r, a, b, g in zip(row.tolist(), starts, stops, group.tolist(), strict=True):
        labels[r, a:b] = g + 1
    return labels, areas


# --- judging ---------------------------------------------------------------------------------------------------------


def judge(image: np.ndarray | Reading, spec: Spec) -> Verdict:
    """Is this picture (or what was read from it) what `spec` demands?"""
    reading = image if isinstance(image, Reading) else read_picture(image)
    checks: dict[str, bool | None] = dict.fromkeys(CHECKS)
    if spec.background is not None:
        checks["background"] = reading.background == spec.background
    checks["count"] = len(reading.objects) == spec.count
    checks |= _best_match(reading.objects[:_MOST_MATCHED], spec)
    failed = [name for name in CHECKS if checks[name] is False]
    shown = ", ".join(f"{o.size} {o.color} {o.shape or 'unknown shape'}" for o in reading.objects) or "nothing"
    shown += f" on {reading.background}"
    reasons = tuple(f"{name}: asked for {_asked(name, spec)}, found {shown}" for name in failed)
    return Verdict(not failed, checks, reasons, reading)


def _asked(check: str, spec: Spec) -> str:
    if check in ("color", "shape", "size"):
        return " and ".join(str(getattr(p, check) or "any size") for p in spec.parts)
    return str(getattr(spec, check))


def _best_match(objects: Sequence[Found], spec: Spec) -> dict[str, bool | None]:
    """Checks of colour, shape, size and relation, with objects given to parts so that most of them fit."""
    n = len(spec.wanted)
    pool = [*objects, *[None] * (n - len(objects))]
    choose = combinations if len(spec.parts) == 1 else permutations  # alike: the order makes no difference
    return max((_fit(chosen, spec) for chosen in choose(pool, n)), key=lambda fit: fit[:2])[2]


def _fit(chosen: Sequence[Found | None], spec: Spec) -> tuple[int, bool, dict[str, bool | None]]:
    """How many properties fit, whether the relation holds, and the checks, with objects given to parts in this order."""
    fits = [_properties(o, p) for o, p in zip(chosen, spec.wanted, strict=True)]
    color, shape, size = (all(column) for column in zip(*fits, strict=True))
    checks: dict[str, bool | None] = {"color": color, "shape": shape, "size": None, "relation": None}
    if any(p.size for p in spec.parts):
        checks["size"] = size
    holds = spec.relation is not None and _holds(spec.relation, chosen[0], chosen[1])
    if spec.relation is not None and color and shape:  # between other objects it would say nothing
        checks["relation"] = holds
    return sum(map(sum, fits)), holds, checks


def _properties(found: Found | None, part: Part) -> tuple[bool, bool, bool]:
    """Whether colour, shape and size are as asked for."""
    if found is None:
        return False, False, part.size is None
    return found.color == part.color, found.shape == part.shape, part.size in (None, found.size)


def _holds(relation: str, a: Found | None, b: Found | None) -> bool:
    """Whether a stands in `relation` to b by more than the margin, centre to centre."""
    if a is None or b is None:
        return False
    lead = {"left of": b.cx - a.cx, "right of": a.cx - b.cx, "above": b.cy - a.cy, "below": a.cy - b.cy}
    return lead[relation] > RELATION_MARGIN


# --- reporting -------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """So many correct out of so many."""

    correct: int = 0
    total: int = 0

    @property
    def share(self) -> float | None:
        """Correct share, or None of nothing."""
        return self.correct / self.total if self.total else None

    def add(self, correct: bool) -> None:
        """Count one more."""
        self.correct += bool(correct)
        self.total += 1


@dataclass
class Table:
    """Scores of a set of pictures. Unseen combinations count in their own row only."""

    kinds: dict[str, Tally] = field(default_factory=lambda: {k: Tally() for k in KINDS})
    wording: dict[str, Tally] = field(default_factory=lambda: {"canonical": Tally(), "paraphrased": Tally()})
    unseen: Tally = field(default_factory=Tally)
    checks: dict[str, Tally] = field(default_factory=lambda: {c: Tally() for c in CHECKS})
    unseen_checks: dict[str, Tally] = field(default_factory=lambda: {c: Tally() for c in CHECKS})

    @property
    def overall(self) -> float | None:
        """Mean of the shares of the kinds, so that each kind weighs the same."""
        shares = [t.correct / t.total for t in self.kinds.values() if t.total]
        return sum(shares) / len(shares) if shares else None

    def add(self, verdict: Verdict, record: Record) -> None:
        """Count one picture."""
        if record.unseen:
            self.unseen.add(verdict.correct)
        else:
            self.kinds[record.kind].add(verdict.correct)
            self.wording["paraphrased" if record.paraphrased else "canonical"].add(verdict.correct)
        checks = self.unseen_checks if record.unseen else self.checks
        for name, passed in verdict.checks.items():
            if passed is not None:
                checks[name].add(passed)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, ready for JSON."""

        def plain(rows: dict[str, Tally]) -> dict[str, dict[str, Any]]:
            return {k: {"correct": t.correct, "total": t.total, "share": t.share} for k, t in rows.items()}

        return {
            "overall": self.overall,
            "kinds": plain(self.kinds),
            "wording": plain(self.wording),
            "unseen": plain({"unseen": self.unseen})["unseen"],
            "checks": plain(self.checks),
            "unseen_checks": plain(self.unseen_checks),
        }

    def markdown(self) -> str:
        """The report as two Markdown tables: correct pictures, and the single checks."""
        rows = [(k, t) for k, t in self.kinds.items() if t.total]
        lines = ["| prompts | correct | of | share |", "|---|---:|---:|---:|"]
        lines += [_row(name, tally) for name, tally in rows]
        if rows:
            seen = Tally(sum(t.correct for _, t in rows), sum(t.total for _, t in rows))
            lines.append(f"| **overall** (mean of kinds) | {seen.correct} | {seen.total} | {self.overall:.1%} |")
        lines += [_row(name, tally) for name, tally in self.wording.items() if tally.total]
        lines += [_row("unseen combinations", self.unseen)] if self.unseen.total else []
        lines += ["", "| check | correct | unseen |", "|---|---:|---:|"]
        for name in CHECKS:
            shares = (self.checks[name].share, self.unseen_checks[name].share)
            lines.append(f"| {name} | " + " | ".join("-" if s is None else f"{s:.1%}" for s in shares) + " |")
        return "\n".join(lines) + "\n"


def _row(name: str, tally: Tally) -> str:
    return f"| {name} | {tally.correct} | {tally.total} | {tally.share:.1%} |"


def score(images: Sequence[np.ndarray], records: Sequence[Record]) -> Table:
    """Judge picture k against record k and report by kind of prompt."""
    if len(images) != len(records):
        from ldm.util import UserError

        raise UserError(f"{len(images)} pictures for {len(records)} prompts: there must be one for each")
    table = Table()
    for image, record in zip(images, records, strict=True):
        table.add(judge(image, record.spec), record)
    return table
