"""Where finished pictures go: numbered files that never replace another, whole or not at all, with all it takes to draw them again.

Owns the output folder, PNG metadata (both ways) and the command line that repeats a run. Knows no model.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import reprlib
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from ldm.util import UserError

METADATA_KEY = "ldm_metadata"
_MOST_TRIED = 2**26  # bytes written to see whether a folder takes them
_FORMAT = 1  # of the metadata; a reader refuses others


class OutputFolder:
    """`outdir/samples/00000.png ...` and `outdir/grid-0000.png ...`, each at the next free number."""

    def __init__(self, outdir: str | Path) -> None:
        """Make the folders. Raises `UserError` when they cannot be made."""
        self.root = Path(outdir)
        self.samples = self.root / "samples"
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {str(outdir)!r} cannot be made: {error.strerror}; choose another by --outdir") from None

    def check(self, n_bytes: int) -> None:
        """Write and remove a file of `n_bytes` in both folders, so that a read-only or full one is found before the work.

        Of what is more than 64 MiB the rest is only compared with the free space.
        """
        for folder in (self.root, self.samples):
            with told(folder):
                if n_bytes > _MOST_TRIED and shutil.disk_usage(folder).free < n_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.unlink(_write_temporary(folder, b"\0" * min(n_bytes, _MOST_TRIED)))

    def save_sample(self, image: np.ndarray, texts: Mapping[str, str] | None = None) -> Path:
        """uint8 (H, W, 3) to the next samples/NNNNN.png."""
        return _save(self.samples, "", 5, image, texts)

    def save_beside(self, name: str, image: np.ndarray, texts: Mapping[str, str] | None = None) -> Path:
        """uint8 (H, W, 3) to the next NNNNN.png of the folder `name` beside samples/."""
        folder = self.root / name
        with told(folder):
            folder.mkdir(exist_ok=True)
        return _save(folder, "", 5, image, texts)

    def save_grid(self, image: np.ndarray, texts: Mapping[str, str] | None = None) -> Path:
        """uint8 (H, W, 3) to the next grid-NNNN.png."""
        return _save(self.root, "grid-", 4, image, texts)


@contextlib.contextmanager
def told(folder: Path) -> Any:
    """Inside, errors of the file system become a `UserError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"output folder {str(folder)!r} cannot be written: {error.strerror}; choose another by --outdir") from None


def _save(folder: Path, prefix: str, digits: int, image: np.ndarray, texts: Mapping[str, str] | None) -> Path:
    with told(folder):
        temporary = _write_temporary(folder, png_bytes(image, texts))
        try:
            number = _next_number(folder, prefix)
            while True:
                path = folder / f"{prefix}{number:0{digits}}.png"
                if move_without_replacing(temporary, path):
                    return path
                number += 1  # another process took it
        finally:
            Path(temporary).unlink(missing_ok=True)


def _next_number(folder: Path, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.[A-Za-z]+")
    matches = (pattern.fullmatch(name) for name in os.listdir(folder))
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _write_temporary(folder: Path, data: bytes) -> str:
    """A complete, flushed file beside its final place; nothing stays behind when writing fails."""
    handle, name = tempfile.mkstemp(prefix=".part-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
    except BaseException:
        os.unlink(name)
        raise
    return name


def move_without_replacing(temporary: str | Path, path: Path) -> bool:
    """False where `path` is taken. A hard link fails on an existing name; where links are not to be had, reserve the name."""
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        pass  # a file system without hard links
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    os.replace(temporary, path)
    return True


def write_new_png(path: Path, image: np.ndarray, texts: Mapping[str, str] | None = None) -> None:
    """uint8 (H, W, 3) to a file of this name, whole. Raises `UserError` where the name is taken."""
    write_new(path, png_bytes(image, texts))


def write_new(path: Path, data: bytes) -> Path:
    """A file of this name, whole; gives its path. Raises `UserError` where the name is taken."""
    with told(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _write_temporary(path.parent, data)
        try:
            if not move_without_replacing(temporary, path):
                raise UserError(f"{str(path)!r} exists already: remove it or choose another --outdir")
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def png_bytes(image: np.ndarray, texts: Mapping[str, str] | None = None) -> bytes:
    """uint8 (H, W, 3) as PNG with text chunks."""
    info = PngInfo()
    for key, value in (texts or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


# ---------------------------------------------------------------------- metadata
def metadata_texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The PNG text chunks of one picture: `parameters` as other programs read it, and everything as JSON (ASCII)."""
    document = {"format": _FORMAT, **metadata}
    return {"parameters": parameters_text(metadata), METADATA_KEY: json.dumps(document, sort_keys=True, allow_nan=False)}


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """The A1111 form: prompt, `Negative prompt: ...`, and a last line of `Key: value` pairs."""
    options = metadata["options"]
    solver, schedule = _solver_and_schedule(options["sampler"])
    pairs = {
        "Steps": options["steps"],
        "Sampler": _SAMPLER_NAMES.get(solver, solver),
        "CFG scale": f"{options['scale']:g}",
        "Seed": metadata["seed"],
        "Size": f"{options['W']}x{options['H']}",
        "Model hash": metadata["model"]["sha256"][:10],
        "Model": Path(metadata["model"]["ckpt"]).stem,
    }
    if options.get("strength") is not None:
        pairs["Denoising strength"] = f"{options['strength']:g}"
    if schedule or options.get("spacing"):
        pairs["Schedule type"] = options.get("spacing") or schedule
    if options.get("clip_skip") is not None:
        pairs["Clip skip"] = options["clip_skip"]
    for part, key in (("vae", "VAE"), ("refiner", "Refiner")):
        if part in metadata:
            pairs[key] = Path(metadata[part]["ckpt"]).stem
    for flag, key in (("lora", "Lora hashes"), ("embedding", "TI hashes")):
        if added := options.get(flag):
            files = [metadata[f"{flag}{i}"] for i in range(1, len(added) + 1)]
            pairs[key] = ", ".join(f"{Path(file['ckpt']).stem}: {file['sha256'][:10]}" for file in files)
    if "refiner" in metadata:
        pairs["Refiner switch at"] = f"{options['refiner_start']:g}"
    if options.get("ddim_eta"):
        pairs["Eta"] = f"{options['ddim_eta']:g}"
    pairs["RNG"] = "CPU"
    pairs["Version"] = f"ldm {metadata['versions']['ldm']}"
    lines = [metadata["prompt"]]
    if metadata.get("negative_prompt"):
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    text = "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items())])
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates stand for bytes of a command line that are no text


# What other programs call our samplers, where they have them.
_SAMPLER_NAMES = {
    "ddim": "DDIM",
    "plms": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
}


def _solver_and_schedule(sampler: str) -> tuple[str, str | None]:
    """`dpmpp_2m_karras` is `dpmpp_2m` on the schedule Karras."""
    for ending in ("karras", "exponential"):
        if sampler.endswith("_" + ending):
            return sampler.removesuffix("_" + ending), ending.capitalize()
    return sampler, None


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The JSON that `metadata_texts` wrote into a PNG. Raises `UserError` when there is none or it is not ours."""
    name = repr(str(path))
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(METADATA_KEY)
    except FileNotFoundError:
        raise UserError(f"picture {name} does not exist") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"picture {name} cannot be read: {error}") from None
    if text is None:
        raise UserError(
            f"picture {name} has no {METADATA_KEY}: it was not drawn by this program, or its metadata was stripped "
            "(grids have none: name a file of samples/)"
        )
    try:
        metadata = json.loads(text)
    except (TypeError, ValueError, RecursionError):  # no JSON, a number of too many digits, brackets in brackets without end
        metadata = None
    if not isinstance(metadata, dict) or "format" not in metadata:
        raise UserError(f"the {METADATA_KEY} of picture {name} is damaged")
    if metadata["format"] != _FORMAT:
        raise UserError(f"picture {name} has metadata of format {reprlib.repr(metadata['format'])}; this version reads {_FORMAT}")
    if not all(isinstance(metadata.get(part), dict) for part in ("options", "batch")):
        raise UserError(f"the {METADATA_KEY} of picture {name} is damaged")
    return metadata


def command_line(script: str, flags: Mapping[str, Any]) -> str:
    """A line for the shell that gives `flags` to `script`."""
    words: list[str] = ["python", script]
    for name, value in flags.items():
        if value is True:
            words.append("--" + name)
        elif isinstance(value, (list, tuple)) and value and not isinstance(value[0], str):
            words += ["--" + name, *map(str, value)]  # one flag of several numbers
        elif value is not None and value is not False:
            for item in value if isinstance(value, (list, tuple)) else [value]:
                words.append(f"--{name}={item}" if str(item).startswith("-") else f"--{name}")
                words += [] if str(item).startswith("-") else [str(item)]
    return shlex.join(words)
