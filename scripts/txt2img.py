#!/usr/bin/env python3
"""Draw pictures from a prompt: `python scripts/txt2img.py --prompt "a red circle left of a blue square"`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import main

if __name__ == "__main__":
    sys.exit(main("txt2img"))
