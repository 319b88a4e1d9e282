#!/usr/bin/env python3
"""FID and CLIP score of a folder of pictures, with weights on your disk.

python scripts/score.py fid outputs/samples photographs --inception pt_inception-2015-12-05-6726825d.pth
python scripts/score.py clip outputs/samples --ckpt ViT-L-14.safetensors --arch ViT-L-14-quickgelu
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say

SHIPPED = Path(__file__).resolve().parents[1] / "models" / "shapes"


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    measures = parser.add_subparsers(dest="measure", required=True)
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--batch", type=int, default=32, help="pictures at once (default: 32)")
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    shared.add_argument("--json", metavar="FILE", help="write the result there, too")

    fid = measures.add_parser("fid", parents=[shared], allow_abbrev=False, help="Frechet Inception distance of two sets of pictures")
    fid.add_argument("pictures", help="folder, or .npz with arr_0 (N, H, W, 3)")
    fid.add_argument("reference", nargs="?", help="folder or .npz of real pictures, or an .npz of their statistics (mu, sigma)")
    fid.add_argument("--inception", metavar="FILE", required=True, help="pt_inception-2015-12-05-6726825d.pth, as published")
    fid.add_argument(
        "--resize", choices=("tensorflow", "pytorch"), default="tensorflow", help="tensorflow is FID's own; pytorch is that of pytorch-fid"
    )
    fid.add_argument("--save_statistics", metavar="FILE.npz", help="keep the statistics of PICTURES, as a reference for others")

    clip = measures.add_parser("clip", parents=[shared], allow_abbrev=False, help="how well pictures fit their prompts: 100 max(cos, 0)")
    clip.add_argument("pictures", help="folder; prompts come from the pictures' own metadata, name.txt, metadata.jsonl or --prompts")
    clip.add_argument("--prompts", metavar="FILE", help="a prompt a line (or JSONL), in the order of the pictures' names")
    clip.add_argument("--ckpt", default=str(SHIPPED), help="folder with clip.yaml and clip.safetensors (default: the shipped one), or:")
    clip.add_argument("--arch", metavar="NAME", help="--ckpt is a checkpoint of open_clip of this architecture, such as ViT-L-14")
    return parser


def check(options: argparse.Namespace) -> None:
    """What can be told before weights are read."""
    from ldm.util import UserError

    if options.batch < 1:
        raise UserError(f"--batch {options.batch} must be 1 or more")
    if options.json and Path(options.json).exists():
        raise UserError(f"--json {options.json} exists already: choose another name")
    if not Path(options.pictures).exists():
        raise UserError(f"{options.pictures} does not exist")
    if options.measure == "fid":
        if options.reference is None and options.save_statistics is None:
            raise UserError("fid needs a REFERENCE to compare with, or --save_statistics FILE.npz to become one")
        if options.reference is not None and not Path(options.reference).exists():
            raise UserError(f"the reference {options.reference} does not exist")
        kept = options.save_statistics and Path(options.save_statistics)
        if kept and (kept.suffix != ".npz" or kept.exists()):
            raise UserError(f"--save_statistics {kept} must end in .npz and not exist yet")


def measure_fid(options: argparse.Namespace) -> dict[str, Any]:
    """FID, and what it was made of."""
    from functools import partial

    from ldm.inference.models import pick_device
    from ldm.metrics import scoring
    from ldm.metrics.inception import load_inception, prepare

    device = pick_device(options.device)
    network = load_inception(options.inception).to(device)
    known: dict[str, Any] = {"prepare": partial(prepare, resize=options.resize), "batch": options.batch, "device": device}
    drawn = scoring.gather(options.pictures, network, **known)
    result: dict[str, Any] = {"measure": "fid", "pictures": drawn.n, "resize": options.resize}
    if options.save_statistics:
        drawn.save(options.save_statistics)
        say(f"statistics of {drawn.n} pictures: {options.save_statistics}")
    if options.reference is not None:
        reference = options.reference
        if not scoring.is_statistics(reference):
            reference = scoring.gather(reference, network, **known)
        result["fid"] = scoring.fid(drawn, reference)
        say(f"FID {result['fid']:.3f} ({drawn.n} pictures, resize {options.resize})")
    return result


def measure_clip(options: argparse.Namespace) -> dict[str, Any]:
    """The mean CLIP score, and each picture's."""
    from ldm.inference.models import pick_device
    from ldm.metrics import scoring

    items = scoring.captioned(Path(options.pictures), options.prompts)
    clip = scoring.load_judge(options.ckpt, options.arch).to(pick_device(options.device))
    scores = scoring.clip_scores(clip, items, batch=options.batch)
    mean = sum(scores) / len(scores)
    say(f"CLIP score {mean:.2f} ({len(scores)} pictures; lowest {min(scores):.2f}, highest {max(scores):.2f})")
    rows = [{"file": str(item.file), "caption": item.caption, "score": score} for item, score in zip(items, scores, strict=True)]
    return {"measure": "clip", "pictures": len(scores), "clip_score": mean, "scores": rows}


def main() -> int:
    """Parse, measure, say."""
    options = build_parser().parse_args()

    def run() -> None:
        check(options)
        result = measure_fid(options) if options.measure == "fid" else measure_clip(options)
        if options.json:
            Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
