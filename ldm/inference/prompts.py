"""What is to be drawn, in which order, with which seed: prompt files and the plan of a run. Pure: knows no model and no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.util import UserError

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Batch:
    """Pictures that go through the network together."""

    start: int  # number of the first picture within the run
    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]  # seed of each picture: the run's seed + its number within the run

    def __len__(self) -> int:
        return len(self.prompts)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines and lines that start with # are skipped.

    Raises `UserError` for a missing, unreadable or empty file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"prompt file {str(path)!r} does not exist") from None
    except UnicodeDecodeError:
        raise UserError(f"prompt file {str(path)!r} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"prompt file {str(path)!r} cannot be read: {error.strerror}") from None
    prompts = [line.strip() for line in text.splitlines()]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"prompt file {str(path)!r} holds no prompt: write one a line (blank lines and # lines are skipped)")
    return prompts


def plan(
    prompts: Sequence[str],  # the pictures of one iteration, in order
    negative: str,  # what none of them should show; "" for nothing
    seed: int,  # of picture 0; picture k of the run gets seed + k
    n_iter: int,
    batch_size: int,
) -> Iterator[Batch]:
    """The batches of a run: every iteration draws all prompts in order; its last batch may be smaller."""
    for iteration in range(n_iter):
        for first in range(0, len(prompts), batch_size):
            chunk = tuple(prompts[first : first + batch_size])
            start = iteration * len(prompts) + first
            seeds = tuple((seed + start + i) % (MAX_SEED + 1) for i in range(len(chunk)))
            yield Batch(start, chunk, (negative,) * len(chunk), seeds)
