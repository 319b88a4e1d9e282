#!/usr/bin/env python3
"""Merge LoRAs into a checkpoint: `python scripts/merge_lora.py model.safetensors merged.safetensors --lora style.safetensors:0.8`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say


def main() -> int:
    """Parse, merge, and say what was written."""
    parser = argparse.ArgumentParser(description="Add LoRAs to the weights of a model, for good, and store it as .safetensors.")
    parser.add_argument("source", metavar="IN", help=".ckpt or .safetensors")
    parser.add_argument("target", metavar="OUT", help=".safetensors to write; never over an existing file unless --overwrite")
    parser.add_argument(
        "--lora", dest="loras", nargs="+", required=True, metavar="FILE[:WEIGHT]", help="WEIGHT 1 is all of it; below 0 undoes it"
    )
    parser.add_argument("--ema", default="auto", choices=("auto", "ema", "raw"), help="moving averages where there are any; default auto")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="of the stored weights; default as they are")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()

    def run() -> None:
        from ldm.inference.weights.lora_merge import merge_into_file

        done = merge_into_file(**vars(options))
        say(f"{options.target}: {done['tensors']} tensors, {done['changed']} of them changed, {done['bytes'] / 2**20:.1f} MiB")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
