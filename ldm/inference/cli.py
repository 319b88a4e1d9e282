"""The shell around a run: parse, check, draw, write, and say what was done. Exit code 2 and one line for anything the user can mend."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.inference.args import build_parser, parse
from ldm.inference.options import Options
from ldm.inference.output import OutputFolder, command_line, write_new
from ldm.inference.sharding import Share, share_of, take_own_device
from ldm.processes import label
from ldm.util import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.inference.session import Picture

log = logging.getLogger(__name__)
_LARGEST_GRID = 2**30  # bytes; what is more fits into no viewer, and hardly into memory


def say(line: str) -> None:
    """One line for the user, on standard output; what its encoding cannot say is escaped, and nobody need be listening any more."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guarded(run: Callable[[], object]) -> int:
    """Run, and turn what the user can mend into `error: ...` and exit code 2."""
    try:
        run()
    except UserError as error:
        sys.stderr.write(f"error{label()}: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0


def main(task: str, argv: Sequence[str] | None = None) -> int:
    """The script of that name with `argv` (default: the command line); gives the exit code."""
    return guarded(lambda: draw(parse(task, argv)))


@dataclass
class Summary:
    """What a run left behind."""

    samples: list[Path] = field(default_factory=list)
    films: list[Path] = field(default_factory=list)
    grid: Path | None = None
    too_many: bool = False  # pictures for a grid
    drawn: int = 0
    flagged: int = 0
    unreadable: int = 0
    too_small: int = 0
    share: Share | None = None  # of a run of several processes, or one that goes on


@dataclass
class Page:
    """The pictures of a grid; none any more once they are too many."""

    room: int  # bytes
    images: list[np.ndarray] = field(default_factory=list)  # uint8 (H, W, 3)
    text: str = ""  # the parameters of the first

    def add(self, picture: Picture) -> None:
        """One more, as long as there is room."""
        self.room -= picture.image.nbytes
        self.text = self.text or picture.texts["parameters"]
        if self.room >= 0:
            self.images.append(picture.image)
        else:
            self.images.clear()


def draw(options: Options) -> Summary:
    """Draw all of `options`, write files, and say what was done."""
    began = time.perf_counter()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    folder = OutputFolder(options.outdir)
    folder.check(options.H * options.W * 3)
    if not options.verbose:
        _hush()
    share = share_of(options)
    if share is not None:
        say(share.told)
        if not share.batches:
            return Summary(share=share)
        take_own_device()
    from ldm.inference.session import Session

    session = Session(options, progress=True)
    if share is not None:
        session.weights = share.weights  # hashed once, and what is drawn is recorded with what the pictures there were compared with
    summary, page = Summary(share=share), Page(_LARGEST_GRID)
    wants_grid = not options.skip_grid and share is None and not options.reproduce
    for batch in session.batches() if share is None else share.batches:
        for picture in session.pictures(batch):
            _count(picture, summary)
            if not options.skip_save:
                path = folder.save_sample(picture.image, picture.texts) if share is None else share.save(batch, picture)
                if path is None:
                    continue
                summary.samples.append(path)
                if options.save_progress and (film := picture.film(options.save_progress)) is not None:
                    summary.films.append(write_new(summary.samples[-1].with_suffix(f".{options.save_progress}"), film))
            if wants_grid:
                page.add(picture)
    if page.images:
        from ldm.imaging import image_grid

        summary.grid = folder.save_grid(image_grid(page.images, options.columns), {"parameters": page.text})
    summary.too_many = page.room < 0
    _report(options, summary, time.perf_counter() - began)
    return summary


def _hush() -> None:
    """Silence what libraries say on import that no user of a picture needs."""
    import warnings

    for name in ("pytorch_lightning", "lightning.pytorch", "transformers", "open_clip"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _count(picture: Picture, summary: Summary) -> None:
    summary.drawn += 1
    if picture.flagged:
        summary.flagged += 1
        assert picture.verdict is not None
        log.warning("picture %d: flagged by the safety check (score %+.3f)", summary.drawn, max(picture.verdict.scores))
    if picture.mark == "unreadable":
        summary.unreadable += 1
        log.warning("picture %d: its watermark cannot be read back", summary.drawn)
    if picture.mark == "too small":
        if summary.too_small == 0:
            log.warning("no watermark: it needs pictures of at least 256x256 pixels")
        summary.too_small += 1


def _report(options: Options, summary: Summary, seconds: float) -> None:
    if summary.samples:
        names = str(summary.samples[0]) if len(summary.samples) == 1 else f"{summary.samples[0]} ... {summary.samples[-1].name}"
        say(f"samples: {names}")
    if summary.films:
        say(f"progress: {summary.films[0]}" + (f" ... {summary.films[-1].name}" if len(summary.films) > 1 else ""))
    if summary.grid is not None:
        say(f"grid: {summary.grid}")
    if summary.too_many:
        say("no grid: the pictures are too many for one")
    told = [f"{summary.drawn} picture{'s' if summary.drawn != 1 else ''} in {seconds:.1f} s"]
    if options.safety == "off":
        told.append("no safety check")
    else:
        replaced = " and replaced" if summary.flagged and options.safety == "card" else ""
        told.append(f"{summary.flagged} flagged by the safety check{replaced}")
    if options.watermark == "none" or summary.too_small == summary.drawn:
        told.append("no watermark")
    else:
        told.append(f"{summary.unreadable} without a readable watermark")
    say(", ".join(told))
    say(f"again: {again(options)}")


# What the closing command says even where the defaults were taken.
_PINNED = ("sampler", "steps", "scale", "H", "W", "seed", "n_samples", "n_iter")


def again(options: Options) -> str:
    """The command line that draws the same pictures, whatever the defaults become."""
    script = f"scripts/{options.task}.py"
    if options.reproduce:
        return command_line(script, {"reproduce": options.reproduce, "outdir": options.outdir})
    flags = build_parser(options.task).names
    pinned = {name: getattr(options, name) for name in _PINNED if name in flags}
    source = {"prompt": options.prompt} if "prompt" in flags and not options.from_file else {}
    return command_line(script, {**source, **options.given, **pinned})
