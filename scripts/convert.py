#!/usr/bin/env python3
"""Convert a model: `python scripts/convert.py model.ckpt model.safetensors`, or to and from a diffusers folder."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say


def main() -> int:
    """Parse, convert, and say what was written."""
    parser = argparse.ArgumentParser(
        description="Convert a model between a single file and a diffusers folder. No number changes on the way."
    )
    parser.add_argument("source", metavar="IN", help=".ckpt, .safetensors or a diffusers folder")
    parser.add_argument("target", metavar="OUT", help="a name that ends in .safetensors, or of a folder to make; must not exist")
    parser.add_argument("--config", metavar="YAML", help="the model's config, where it is not one that ships")
    parser.add_argument("--prediction", choices=("eps", "v", "x0"), help="what the network predicts, where the weights do not say it")
    options = parser.parse_args()

    def run() -> None:
        from ldm.inference.weights.convert import convert

        for line in convert(**vars(options)):
            say(line)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
