#!/usr/bin/env python3
"""Put an invisible watermark into pictures, or read it back: `watermark.py detect FILE...`, `watermark.py embed FILE...`.

`detect` exits with 0 when every picture has a mark, 1 when one has none, 2 when one cannot be read.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say


def build_parser() -> argparse.ArgumentParser:
    """Two commands over files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    detect = commands.add_parser("detect", help="say which mark each picture holds")
    detect.add_argument("files", nargs="+", metavar="FILE")
    embed = commands.add_parser("embed", help="write FILE-marked.png beside each picture")
    embed.add_argument("files", nargs="+", metavar="FILE")
    embed.add_argument("--method", choices=("dwtDctSvd", "dwtDct"), default="dwtDctSvd")
    embed.add_argument("--text", help="up to 4 ASCII characters (LDM1); with dwtDct any text (StableDiffusionV1)")
    embed.add_argument("--outdir", type=Path, help="where the marked pictures go (beside the originals)")
    return parser


def detect_all(files: list[str]) -> bool:
    """Say what each file holds; True when every one holds a mark."""
    import numpy as np

    from ldm.imaging import load_image
    from ldm.inference.watermark import MIN_PIXELS, detect

    found_all = True
    for name in files:
        image = np.asarray(load_image(name))
        found = detect(image)
        found_all &= found is not None
        nothing = "no watermark" if image[..., 0].size >= MIN_PIXELS else "no watermark (smaller than 256x256 pixels)"
        say(f"{name}: " + (f"{found.method} {found.text!r}, {found.agreement:.0%} of the bits" if found else nothing))
    return found_all


def embed_all(files: list[str], method: str, text: str | None, outdir: Path | None) -> None:
    """Write marked copies, never over an existing file."""
    import numpy as np

    from ldm.imaging import load_image
    from ldm.inference.output import write_new_png
    from ldm.inference.watermark import Watermarker
    from ldm.util import UserError

    watermarker = Watermarker(method, text)
    for name in files:
        marked = watermarker(np.asarray(load_image(name)))
        if marked.status != "ok":
            raise UserError(f"{name}: the watermark is {marked.status}; pictures need 256x256 pixels, and not all of one pure colour")
        target = (outdir or Path(name).parent) / f"{Path(name).stem}-marked.png"
        write_new_png(target, marked.image)
        say(str(target))


def main() -> int:
    """Exit code."""
    args = build_parser().parse_args()
    found_all = True

    def run() -> None:
        nonlocal found_all
        if args.command == "detect":
            found_all = detect_all(args.files)
        else:
            embed_all(args.files, args.method, args.text, args.outdir)

    return guarded(run) or (0 if found_all else 1)


if __name__ == "__main__":
    sys.exit(main())
