#!/usr/bin/env python3
"""Make a training checkpoint small: `python scripts/prune.py logs/RUN/checkpoints/last.ckpt model.safetensors`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say


def main() -> int:
    """Parse, prune, and say what was written."""
    parser = argparse.ArgumentParser(description="Drop optimizer state, choose EMA or raw weights, and store them as .safetensors.")
    parser.add_argument("source", help=".ckpt, .safetensors or a diffusers folder")
    parser.add_argument("target", help=".safetensors to write; never over an existing file unless --overwrite")
    parser.add_argument("--ema", default="auto", choices=("auto", "ema", "raw"), help="moving averages where there are any; default auto")
    parser.add_argument("--dtype", default="float16", choices=("float32", "float16", "bfloat16"), help="default float16")
    parser.add_argument("--part", help="keep only names under this prefix, without it, such as first_stage_model")
    parser.add_argument("--config", metavar="YAML", help="put the model's config into the header: then the file alone draws")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()

    def run() -> None:
        from ldm.inference.weights.prune import prune

        done = prune(**vars(options))
        say(f"{options.target}: {done['tensors']} tensors, {done['elements'] / 1e6:.2f} M values, {done['bytes'] / 2**20:.1f} MiB")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
