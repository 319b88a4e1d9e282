#!/usr/bin/env python3
"""Say what a weights file holds: `python scripts/inspect.py model.safetensors`."""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
else:  # a program beside this one means the standard library's module of this name, and gets it
    import importlib.util

    spec = importlib.util.spec_from_file_location("inspect", Path(os.__file__).with_name("inspect.py"))
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])


def main() -> int:
    """Parse, look, and say what was found."""
    from ldm.inference.cli import guarded, say

    parser = argparse.ArgumentParser(description="Family, prediction, averages, precision, size and metadata of a model, from its header.")
    parser.add_argument("paths", nargs="+", metavar="FILE", help=".safetensors, .ckpt or a diffusers folder")
    options = parser.parse_args()

    def run() -> None:
        from ldm.inference.weights.inspection import describe

        for path in options.paths:
            if len(options.paths) > 1:
                say(path)
            for line in describe(path):
                say(line)

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
