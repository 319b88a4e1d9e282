#!/usr/bin/env python3
"""Which words of a prompt a model of the shapes world has understood: how much worse it predicts when one of them is wrong.

Same picture, same noise, right caption against one in which the shape, color, binding, number, size, background or relation is another.
Each cell says in which share of the pictures the wrong word makes the loss higher (50 % is chance), and by how much on average.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say

SHIPPED = Path(__file__).resolve().parents[1] / "models" / "shapes"


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="YAML", default=str(SHIPPED / "config.yaml"), help="default: the model that ships")
    parser.add_argument(
        "--ckpt", metavar="FILE", default=str(SHIPPED / "model.safetensors"), help="its weights, also a training's last.ckpt"
    )
    parser.add_argument("--ema", choices=("auto", "ema", "raw"), default="auto", help="which weights of a training (default: averages)")
    parser.add_argument("--n", type=int, default=128, help="pictures for each kind of wrong word (default: 128)")
    parser.add_argument("--timesteps", type=int, nargs="+", metavar="T", help="where to look (default: 950 850 700 500 300)")
    parser.add_argument("--seed", type=int, default=0, help="chooses pictures and noise (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--json", metavar="FILE", help="write the result there, too")
    return parser


def measure(options: argparse.Namespace) -> None:
    """Check, measure, say."""
    from dataclasses import asdict

    from ldm.util import UserError

    if options.n < 1:
        raise UserError(f"--n {options.n} must be 1 or more")
    if options.json and Path(options.json).exists():
        raise UserError(f"--json {options.json} exists already: choose another name")
    from ldm.inference.facts import read_config, read_facts
    from ldm.inference.models import load_model, pick_device
    from ldm.metrics.sensitivity import TIMESTEPS, markdown, sensitivity

    timesteps, total = tuple(options.timesteps or TIMESTEPS), read_facts(read_config(options.config)).timesteps
    if wrong := [t for t in timesteps if not 0 <= t < total]:
        raise UserError(f"--timesteps {' '.join(map(str, wrong))}: this model has 0 to {total - 1}")
    model = load_model(options.config, options.ckpt, pick_device(options.device), options.ema)
    found = sensitivity(model, timesteps=timesteps, n=options.n, seed=options.seed, progress=lambda word: say(f"wrong {word} ..."))
    say(markdown(found, timesteps))
    if options.json:
        result = {"config": options.config, "ckpt": options.ckpt, "n": options.n, "seed": options.seed, "timesteps": timesteps}
        table = {change: [asdict(entry) for entry in row] for change, row in found.items()}
        Path(options.json).write_text(json.dumps({**result, "wrong": table}, indent=1), encoding="utf-8")


def main() -> int:
    """Exit code."""
    options = build_parser().parse_args()
    return guarded(lambda: measure(options))


if __name__ == "__main__":
    sys.exit(main())
