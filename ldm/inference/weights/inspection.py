"""What a weights file or a diffusers folder holds, as lines for the user. Reads headers only where the format allows; imports no torch."""

from __future__ import annotations

from pathlib import Path

from ldm.inference.facts import REPO
from ldm.inference.weights.anatomy import Anatomy
from ldm.inference.weights.families import EMBEDDED_CONFIG, Found, identify

_CONDITIONS = {
    "clip": "CLIP text encoder",
    "open_clip": "OpenCLIP text encoder",
    "tokens": "transformer over tokens",
    "t5": "T5 text encoder",
    "class": "class embedding",
    "rescaler": "map of labels, made smaller",
    "first_stage": "image, encoded",
}
_LAYOUTS = {"ldm": "latent-diffusion names", "sgm": "generative-models names", "diffusers": "diffusers names"}


def describe(path: str | Path) -> list[str]:
    """Lines `what: value` about `path`. Raises CheckpointError when it cannot be read."""
    path = Path(path)
    found = identify(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    family = found.title + (f", of {found.base}" if found.base else "")
    lines = [
        ("family", family),
        ("predicts", _prediction(found)),
        ("averages", _averages(found)),
        ("numbers", f"{found.elements / 1e6:.1f} M, {found.dtype}"),
        ("size", f"{size / 2**20:.1f} MiB"),
        ("layout", _LAYOUTS[found.layout]),
        *_parts(found.anatomy),
        ("config", _config(found)),
    ]
    lines += [(key, _short(value)) for key, value in sorted(found.metadata.items()) if key not in ("format", EMBEDDED_CONFIG)]
    width = max(len(name) for name, value in lines if value)
    return [f"{name + ':':<{width + 1}} {value}" for name, value in lines if value]


def _prediction(found: Found) -> str:
    if found.anatomy is None or found.anatomy.unet is None:
        return ""
    if found.prediction is None:
        return "not told by the weights: say --prediction eps or v when drawing"
    return found.prediction + (", with zero terminal SNR" if found.zero_snr else "")


def _averages(found: Found) -> str:
    if found.anatomy is None or found.anatomy.unet is None:
        return ""
    return "yes, beside the trained weights (EMA)" if found.ema else "none beside the weights"


def _parts(anatomy: Anatomy | None) -> list[tuple[str, str]]:
    if anatomy is None:
        return []
    lines = []
    if (unet := anatomy.unet) is not None:
        reads = f", reads {unet.context} channels of context" if unet.context else ""
        added = f", a vector of {unet.vector}" if unet.vector else f", {unet.classes} classes" if unet.classes else ""
        lines.append(("network", f"{unet.in_channels} -> {unet.out_channels} channels, width {unet.width} to {unet.middle}{reads}{added}"))
    if (stage := anatomy.first_stage) is not None:
        codes = f", {stage.codes} codes" if stage.codes else ""
        lines.append(("first stage", f"{stage.kind.upper()}, factor {stage.factor}, {stage.latent} latent channels{codes}"))
    if anatomy.conditions:
        lines.append(("condition", " and ".join(_CONDITIONS[kind] for kind in anatomy.conditions)))
    if anatomy.stages:
        lines.append(("also", ", ".join(sorted(anatomy.stages))))
    return lines


def _config(found: Found) -> str:
    if EMBEDDED_CONFIG in found.metadata:
        return "in the file's header"
    if found.prediction is None and len(found.configs) > 1:
        return " or ".join(f"{_short_path(path)} ({kind})" for kind, path in sorted(found.configs.items(), key=str))
    if found.config is not None:
        return _short_path(found.config)
    if found.family in ("ldm", "first-stage") or found.layout == "diffusers":
        return "its own (the folder's settings)" if found.layout == "diffusers" else "none that ships fits: name yours by --config"
    return ""


def _short_path(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def _short(value: str, limit: int = 200) -> str:
    line = " ".join(value.split())
    return line if len(line) <= limit else f"{line[:limit]}... ({len(line)} characters)"
