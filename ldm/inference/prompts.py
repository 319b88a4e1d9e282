"""What is to be drawn, in which order, with which seed: prompt files and the plan of a run. Pure: knows no model and no torch.

A prompt file is UTF-8 text with one picture a line; blank lines and lines that start with # are skipped. In a file named *.jsonl every
line is a JSON object, with "prompt" and any of the flags in `LINE_FLAGS`, which hold for that picture alone:

    {"prompt": "a red circle", "seed": 7, "negative_prompt": "blue", "scale": 5}
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from ldm.util import UserError

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class LineFlag:
    """What a flag of a JSONL line may be."""

    kind: type  # str, int or float
    low: float = -math.inf
    high: float = math.inf
    count: int | None = None  # so many numbers in a list, instead of one

    def complaint(self, value: Any) -> str | None:
        """What is wrong with `value`, None if nothing."""
        if isinstance(value, int) and self.kind is float and abs(value) > sys.float_info.max:
            return "is too large for a number"
        if self.count is None:
            return None if self._fits(value) else f"must be {self._wanted()}"
        if isinstance(value, list) and len(value) == self.count and all(map(self._fits, value)):
            return None
        return f"must be a list of {self.count}, each {self._wanted()}"

    def _fits(self, value: Any) -> bool:
        if isinstance(value, str) or self.kind is str:
            return isinstance(value, str) and self.kind is str
        number = isinstance(value, (int,) if self.kind is int else (int, float)) and not isinstance(value, bool)
        return number and (isinstance(value, int) or math.isfinite(value)) and self.low <= value <= self.high  # isfinite takes no huge int

    def _wanted(self) -> str:
        if self.kind is str:
            return "text in quotes"
        bounds = [f"from {self.low:g}"] if math.isfinite(self.low) else []
        bounds += [f"to {self.high:.10g}"] if math.isfinite(self.high) else []
        return " ".join(["a whole number" if self.kind is int else "a number", *bounds])


LINE_FLAGS = {
    "negative_prompt": LineFlag(str),
    "seed": LineFlag(int, 0, MAX_SEED),
    "scale": LineFlag(float),
    "guidance_rescale": LineFlag(float, 0, 1),
    "steps": LineFlag(int, 1),
    "sampler": LineFlag(str),
    "spacing": LineFlag(str),
    "ddim_eta": LineFlag(float, 0),
    "H": LineFlag(int, 1),
    "W": LineFlag(int, 1),
    "strength": LineFlag(float, 0, 1),
    "clip_skip": LineFlag(int, 1),
    "prompt_syntax": LineFlag(str),
    "original_size": LineFlag(int, 1, count=2),
    "crop": LineFlag(int, 0, count=2),
    "target_size": LineFlag(int, 1, count=2),
    "aesthetic_score": LineFlag(float),
    "negative_aesthetic_score": LineFlag(float),
    "refiner_start": LineFlag(float, 0, 1),
}
_SAME_AS = {"ddim_steps": "steps"}  # as on the command line; so are dashes and underscores
_MOST_PROBLEMS = 5  # told at once of a file
_LONGEST_SHOWN = 80  # characters of a wrong value


@dataclass(frozen=True)
class PromptLine:
    """One picture of a prompt file."""

    prompt: str
    overrides: Mapping[str, Any] = field(default_factory=dict)  # flags that hold for this picture, under the names of LINE_FLAGS
    line: int = 0  # in its file, from 1; 0: from no file


@dataclass(frozen=True)
class Batch:
    """Pictures that go through the network together."""

    start: int  # number of the first picture within the run
    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]  # seed of each picture: its line's own, or the run's seed + its number within the run
    overrides: Mapping[str, Any] = field(default_factory=dict)  # flags of its lines, the same for all; without seed and negative_prompt

    def __len__(self) -> int:
        return len(self.prompts)


# -- files ---------------------------------------------------------------------------------------------------------------
def read_prompts(
    path: str | Path,
    allowed: Collection[str] = LINE_FLAGS.keys(),  # flags that a JSONL line may set; those not in LINE_FLAGS are the caller's to check
) -> list[PromptLine]:
    """The pictures of a prompt file, in order; see the head of this file.

    Raises `UserError` for a missing, unreadable or empty file, and for JSONL lines that are not as they must be.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompt file {str(path)!r} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"prompt file {str(path)!r} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read: {error.strerror}") from None
    rows = [(number, row.strip()) for number, row in enumerate(text.split("\n"), 1)]
    rows = [(number, row) for number, row in rows if row and not row.startswith("#")]
    if not rows:
        raise UserError(f"prompt file {str(path)!r} holds no prompt: write one a line (blank lines and # lines are skipped)")
    if Path(path).suffix.lower() == ".jsonl":
        return _read_jsonl(str(path), rows, allowed)
    return [PromptLine(row, line=number) for number, row in rows]


def _read_jsonl(path: str, rows: Sequence[tuple[int, str]], allowed: Collection[str]) -> list[PromptLine]:
    lines, problems = [], []
    for number, row in rows:
        try:
            lines.append(_read_line(row, number, allowed))
        except UserError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        more = f" (and {len(problems) - _MOST_PROBLEMS} more)" if len(problems) > _MOST_PROBLEMS else ""
        raise UserError(f"prompt file {path!r}: {'; '.join(problems[:_MOST_PROBLEMS])}{more}")
    return lines


def _read_line(row: str, number: int, allowed: Collection[str]) -> PromptLine:
    try:
        entries = json.loads(row, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise UserError('is nested too deeply: it must be a flat object, such as {"prompt": "a red circle", "seed": 7}') from None
    except UserError:  # of the hooks
        raise
    except ValueError:  # Python reads no more than 4300 digits
        raise UserError("has a whole number of too many digits") from None
    if not isinstance(entries, dict):
        raise UserError('must be a JSON object, such as {"prompt": "a red circle", "seed": 7}')
    prompt = entries.pop("prompt", None)
    if not isinstance(prompt, str):
        raise UserError('needs "prompt", the text to draw')
    unknown = [key for key in entries if key not in allowed]
    if unknown:
        raise UserError(f"unknown key {', '.join(map(repr, unknown))}; allowed are prompt, {', '.join(sorted(allowed))}")
    wrong = [f"{key} {_shown(value)} {why}" for key, value in entries.items() if (why := _complaint(key, value))]
    if wrong:
        raise UserError(", ".join(wrong))
    return PromptLine(prompt, entries, number)


def _complaint(key: str, value: Any) -> str | None:
    return LINE_FLAGS[key].complaint(value) if key in LINE_FLAGS else None


def _shown(value: Any) -> str:
    """As it stands in the file; its start where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [_SAME_AS.get(name, name) for name in (key.replace("-", "_") for key, _ in pairs)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"gives {', '.join(twice)} twice")
    return dict(zip(names, (value for _, value in pairs), strict=True))


def _refuse_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is not a number that JSON knows")


# -- the plan of a run ---------------------------------------------------------------------------------------------------
def plan(
    prompts: Sequence[str | PromptLine],  # the pictures of one iteration, in order
    negative: str,  # what none of them should show, "" for nothing; a line's own stands in its place
    seed: int,  # of picture 0; picture k of the run gets seed + k
    n_iter: int,
    batch_size: int,
) -> Iterator[Batch]:
    """The batches of a run: every iteration draws all prompts in order; its last batch may be smaller.

    Neighbours go into one batch as far as their lines' flags agree. A line with a seed of its own gets it when it is drawn first, and
    seed + 1, seed + 2, ... when it is drawn again.
    """
    lines = [PromptLine(p) if isinstance(p, str) else p for p in prompts]
    drawn: Counter[int] = Counter()  # how often a line has been
    for iteration in range(n_iter):
        start = iteration * len(lines)
        for _, same in groupby(lines, key=_shared):
            group = list(same)
            for first in range(0, len(group), batch_size):
                chunk = group[first : first + batch_size]
                yield _batch(chunk, negative, seed, start, drawn)
                start += len(chunk)


def _shared(line: PromptLine) -> dict[str, Any]:
    """The flags of a line that pictures of one batch must have in common."""
    return {key: value for key, value in line.overrides.items() if key not in ("seed", "negative_prompt")}


def _batch(lines: Sequence[PromptLine], negative: str, seed: int, start: int, drawn: Counter[int]) -> Batch:
    seeds = []
    for i, line in enumerate(lines):
        own = line.overrides.get("seed")
        seeds.append((seed + start + i if own is None else own + drawn[id(line)]) % (MAX_SEED + 1))
        drawn[id(line)] += 1
    negatives = tuple(str(line.overrides.get("negative_prompt", negative)) for line in lines)
    return Batch(start, tuple(line.prompt for line in lines), negatives, tuple(seeds), _shared(lines[0]))
