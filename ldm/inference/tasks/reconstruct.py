"""scripts/reconstruct.py: pictures through a first stage and back, with their latents and PSNR. Imports no torch.

Nothing is sampled here, so this is no `Task`; pictures are finished as everywhere: safety check, watermark, metadata, grid.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.imaging import FIT_MODES, fit_image, legal_neighbours, load_image, nearest_legal
from ldm.inference.cli import guarded, say
from ldm.inference.facts import SHIPPED_CONFIG, SHIPPED_WEIGHTS, find_model, read_config
from ldm.inference.flags import Parser
from ldm.inference.options import CHOICES
from ldm.inference.output import OutputFolder
from ldm.util import UserError, trust

if TYPE_CHECKING:
    import numpy as np

    from ldm.inference.reconstruction import Reconstruction

METADATA_KEY = "ldm_reconstruction"
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass
class Options:
    """Every choice of one run."""

    images: list[str]
    config: Any = None
    ckpt: str = ""
    outdir: str = "outputs/reconstruct-samples"
    H: int | None = None  # None: each picture's own, made legal
    W: int | None = None
    fit: str = "crop"
    ema: str = "auto"
    device: str = "auto"
    trust: list[str] = field(default_factory=list)
    skip_grid: bool = False
    safety: str = "card"
    safety_ckpt: str | None = None
    watermark: str = "dwtDctSvd"
    watermark_text: str | None = None
    verbose: bool = False


def build_parser() -> Parser:
    """Flags as in the scripts that draw."""
    parser = Parser(
        prog="reconstruct.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Pictures through a first stage and back: reconstruction, latent picture and PSNR of each.",
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="PICTURE", help="files, or folders of them")
    add("--ckpt", metavar="PATH", help="weights of an autoencoder or of a whole model (the model that ships)")
    add("--config", metavar="YAML", help="their config (beside --ckpt, or found from the weights)")
    add("--H", type=int, help="height in pixels (the picture's own, made legal)")
    add("--W", type=int, help="width in pixels (the picture's own, made legal)")
    add("--fit", choices=FIT_MODES, help="how pictures are brought to size (crop)")
    add("--outdir", metavar="DIR", help="reconstructions go to DIR/samples, latents to DIR/latents, grids to DIR")
    add("--skip_grid", action="store_true", help="save no grid (picture, latent, reconstruction)")
    for name in ("device", "ema", "safety", "watermark"):
        add(f"--{name}", choices=CHOICES[name], help=f"as in txt2img.py ({getattr(Options, name)})")
    add("--safety_ckpt", metavar="DIR", help="weights of the safety check, for a model of your own")
    add("--watermark_text", metavar="TEXT", help="text of the watermark")
    add("--trust", metavar="PACKAGE", action="append", help="let the config name classes of this package")
    add("--verbose", action="store_true", help="log details")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The script; gives the exit code."""
    return guarded(lambda: run(parse(argv)))


def parse(argv: Sequence[str] | None = None) -> Options:
    """Flags, all checked before a weight is read. Raises one `UserError` that names everything wrong."""
    from ldm.inference.watermark import check_text

    given = vars(build_parser().parse_args(argv))
    options = Options(**given)
    trust(*options.trust)
    problems = []
    try:
        options.images = _expand(options.images)
        options.config, options.ckpt = _find_stage(given.get("config"), given.get("ckpt"))
        problems += _size_problems(options)
        check_text(options.watermark, options.watermark_text)
    except UserError as error:
        problems.append(str(error))
    own_model = options.ckpt and Path(options.ckpt).resolve() != SHIPPED_WEIGHTS.resolve()
    if options.safety != "off" and own_model and not options.safety_ckpt:
        problems.append("no safety weights for this model: name their folder by --safety_ckpt, or choose --safety off")
    for path in options.images:
        try:
            load_image(path)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))
    return options


def _find_stage(config: str | None, ckpt: str | None) -> tuple[Any, str]:
    """As `find_model`; also the folder of an autoencoder alone, as diffusers saves it. What a network predicts is of no interest here."""
    if config is None and ckpt is not None and (Path(ckpt) / "config.json").is_file():
        from ldm.inference.weights.diffusers_config import first_stage_config, read_json

        return {"model": first_stage_config(read_json(Path(ckpt) / "config.json"))}, ckpt
    return find_model(config, ckpt, None if config is not None or ckpt is None else "eps")


def _expand(paths: Sequence[str]) -> list[str]:
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(str(p) for p in Path(path).iterdir() if p.suffix.lower() in _PICTURES)
            if not inside:
                raise UserError(f"folder {path!r} has no pictures")
            found += inside
        else:
            found.append(path)
    return found


def _size_problems(options: Options) -> list[str]:
    multiple = _multiple(options)
    problems = []
    for flag, value in (("--H", options.H), ("--W", options.W)):
        if value is not None and legal_neighbours(value, multiple) != (value,):
            near = " or ".join(map(str, legal_neighbours(value, multiple)))
            problems.append(f"{flag} {value} must be a multiple of {multiple}: use {near}")
    return problems


def _multiple(options: Options) -> int:
    from ldm.inference.first_stage import first_stage_config, size_multiple

    return size_multiple(first_stage_config(read_config(options.config)["model"]))


def run(options: Options) -> None:
    """Reconstruct all pictures, write files, and say how good they are."""
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    folder = OutputFolder(options.outdir)
    from ldm.imaging import image_grid
    from ldm.inference.models import pick_device
    from ldm.inference.reconstruction import load_first_stage, reconstruct

    device = pick_device(options.device)
    finish = _Finish(options, device)
    stage = load_first_stage(options.config, options.ckpt, device, options.ema)
    multiple, rows, decibels = _multiple(options), [], []
    for path in options.images:
        image = _picture(path, options, multiple)
        result = reconstruct(stage, image)
        row, flagged = finish(image, result)
        texts = {METADATA_KEY: json.dumps(_record(options, image, result.psnr, flagged), sort_keys=True)}
        saved, latent = folder.save_sample(row[2], texts), folder.save_beside("latents", row[1], texts)
        sizes = f"{image.shape[1]}x{image.shape[0]}, latent {'x'.join(map(str, result.shape))}"
        note = ", flagged by the safety check" if flagged else ""
        say(f"{path}: {result.psnr:.2f} dB, {sizes}{note} -> {saved}, {latent}")
        rows.append(row)
        decibels.append(result.psnr)
    say(f"mean: {sum(decibels) / len(decibels):.2f} dB over {len(decibels)} picture{'s' if len(decibels) != 1 else ''}")
    if not options.skip_grid:
        grid = image_grid([tile for row in rows for tile in row], columns=3)
        say(f"grid: {folder.save_grid(grid)} (picture, latent, reconstruction)")


class _Finish:
    """Safety check and watermark: (picture, latent, reconstruction) as they may be shown, and whether the check fired."""

    def __init__(self, options: Options, device: Any) -> None:
        from ldm.inference.safety import SafetyFilter, check_safety_files, load_safety
        from ldm.inference.watermark import Watermarker

        path = options.safety_ckpt or SHIPPED_CONFIG.parent
        if options.safety != "off":
            check_safety_files(path)
        self.safety = SafetyFilter(None if options.safety == "off" else load_safety(path, device), options.safety)
        self.mark = Watermarker(options.watermark, options.watermark_text)

    def __call__(self, image: np.ndarray, result: Reconstruction) -> tuple[list[np.ndarray], bool]:
        (shown,), (verdict,) = self.safety([result.image])
        flagged = verdict is not None and verdict.flagged
        first, latent = (shown, shown) if flagged and self.safety.mode == "card" else (image, result.latent)
        return [first, latent, self.mark(shown).image], flagged


def _picture(path: str, options: Options, multiple: int) -> np.ndarray:
    import numpy as np

    image = load_image(path)
    width, height = (nearest_legal(side, multiple) for side in image.size)
    return np.asarray(fit_image(image, options.W or width, options.H or height, options.fit))


def _record(options: Options, image: np.ndarray, psnr: float, flagged: bool) -> dict[str, Any]:
    from ldm.inference.record import version

    return {
        "ckpt": options.ckpt,
        "input_sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        "psnr": round(psnr, 4),
        "safety": {"mode": options.safety, "flagged": flagged},
        "versions": {"ldm": version()},
    }
