#!/usr/bin/env python3
"""Count how often a model of the Shapes world draws what its prompt says, with the default flags of txt2img.

Draws the evaluation prompts (all kinds evenly, a third paraphrased) and the unseen combinations through the same steps as
`scripts/txt2img.py`, watermark and safety check included, reads every picture back, and writes `table.md`, `results.json` and
`contact-sheet.png`. Flags it does not know are handed to txt2img, for instance `--safety off`, `--ckpt FILE --config YAML`.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say


def build_parser() -> argparse.ArgumentParser:
    """Its own few flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--n", type=int, default=240, help="evaluation prompts (240)")
    parser.add_argument("--n_unseen", type=int, default=64, help="prompts with combinations never shown in training (64)")
    parser.add_argument("--prompt_seed", type=int, default=0, help="chooses the prompts (0)")
    parser.add_argument("--outdir", type=Path, default=Path("outputs/evaluate-shapes"))
    parser.add_argument("--save_all", action="store_true", help="also keep every picture, under OUTDIR/samples")
    return parser


def draw_all(prompts: Sequence[str], txt2img_flags: Sequence[str], outdir: Path, save_all: bool) -> tuple[list[Any], Any]:
    """A finished picture a prompt, in order, and the options they were drawn with."""
    import dataclasses
    import logging

    from tqdm import tqdm

    from ldm.inference.args import parse
    from ldm.inference.output import OutputFolder

    options = parse("txt2img", ["--prompt", prompts[0], "--outdir", str(outdir), *txt2img_flags])
    options = dataclasses.replace(options, prompts=list(prompts), n_iter=1)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    folder = OutputFolder(outdir)
    folder.check(1 << 20)
    from ldm.inference.session import Session

    session = Session(options)
    pictures: list[Any] = []
    with tqdm(total=len(prompts), desc="pictures") as bar:
        for batch in session.batches():
            for picture in session.pictures(batch):
                pictures.append(picture)
                if save_all:
                    folder.save_sample(picture.image, picture.texts)
            bar.update(len(batch))
    return pictures, options


def contact_sheet(pictures: Sequence[Any], records: Sequence[Any], verdicts: Sequence[Any], columns: int = 8) -> Any:
    """uint8 page: each picture at 128 pixels with its prompt, framed green where it is right and red where it is wrong."""
    import textwrap

    import numpy as np
    from PIL import Image, ImageDraw

    side, text, edge = 128, 40, 3
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (side + 8), rows * (side + text + 8)), "white")
    draw = ImageDraw.Draw(page)
    for i, (picture, record, verdict) in enumerate(zip(pictures, records, verdicts, strict=True)):
        left, top = (i % columns) * (side + 8) + 4, (i // columns) * (side + text + 8) + 4
        frame = (left - edge, top - edge, left + side + edge - 1, top + side + edge - 1)
        draw.rectangle(frame, fill=(40, 160, 70) if verdict.correct else (220, 40, 40))
        page.paste(Image.fromarray(picture.image).resize((side, side), Image.Resampling.LANCZOS), (left, top))
        lines = textwrap.wrap(record.prompt, 24)[:3]
        draw.multiline_text((left, top + side + edge), "\n".join(lines), fill="black", font_size=10, spacing=1)
    return np.asarray(page)


def evaluate(args: argparse.Namespace, txt2img_flags: list[str]) -> None:
    """Draw, judge, write, say."""
    from ldm.data.shapes import evaluation_prompts, unseen_prompts
    from ldm.metrics.shapes import Table, judge
    from ldm.util import UserError

    if args.n < 1 or args.n_unseen < 0:
        raise UserError(f"--n {args.n} must be at least 1 and --n_unseen {args.n_unseen} at least 0")
    records = evaluation_prompts(args.n, args.prompt_seed)
    records += unseen_prompts(args.n_unseen, args.prompt_seed) if args.n_unseen else []
    began = time.perf_counter()
    pictures, options = draw_all([r.prompt for r in records], txt2img_flags, args.outdir, args.save_all)
    seconds = time.perf_counter() - began
    verdicts = [judge(picture.image, record.spec) for picture, record in zip(pictures, records, strict=True)]
    table = Table()
    for verdict, record in zip(verdicts, records, strict=True):
        table.add(verdict, record)
    flagged, unreadable = sum(p.flagged for p in pictures), sum(p.mark == "unreadable" for p in pictures)
    names = ("sampler", "steps", "scale", "seed", "H", "W", "precision", "safety", "watermark")
    settings = {name: getattr(options, name) for name in names}
    about = f"{len(records)} pictures, {seconds / len(records):.2f} s each, {flagged} withheld by the safety check, "
    about += f"{unreadable} without a readable watermark; " + ", ".join(f"{k} {v}" for k, v in settings.items()) + "\n"
    write(args.outdir / "table.md", f"{table.markdown()}\n{about}")
    result = table.to_dict() | {"settings": settings, "seconds": seconds, "flagged": flagged, "unreadable": unreadable}
    result["pictures"] = [
        {"prompt": r.prompt, "kind": r.kind, "unseen": r.unseen, "correct": v.correct, "reasons": list(v.reasons)}
        for r, v in zip(records, verdicts, strict=True)
    ]
    write(args.outdir / "results.json", json.dumps(result, indent=1))
    from PIL import Image

    Image.fromarray(contact_sheet(pictures, records, verdicts)).save(args.outdir / "contact-sheet.png")
    say(f"{table.markdown()}\n{about}written: {args.outdir}/table.md, results.json, contact-sheet.png")


def write(path: Path, text: str) -> None:
    """Replace the report of an earlier run."""
    path.write_text(text, encoding="utf-8")


def main() -> int:
    """Exit code."""
    args, txt2img_flags = build_parser().parse_known_args()
    return guarded(lambda: evaluate(args, txt2img_flags))


if __name__ == "__main__":
    sys.exit(main())
