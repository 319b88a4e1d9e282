#!/usr/bin/env python3
"""Draw pictures from a picture and a prompt: `python scripts/img2img.py --init-img FILE --prompt TEXT`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import main

if __name__ == "__main__":
    sys.exit(main("img2img"))
