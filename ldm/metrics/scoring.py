"""From folders of pictures to FID and CLIP score, with weights that lie on the disk. Downloads nothing.

A set of pictures is a folder, with its subfolders, or an .npz whose arr_0 is uint8 (N, H, W, 3), as sample_diffusion.py writes it.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.data.captions import find_records
from ldm.data.files import files_below
from ldm.imaging import load_image, to_tensor
from ldm.inference.output import read_metadata
from ldm.inference.prompts import read_prompts
from ldm.metrics.fid import Statistics, frechet_distance, read_statistics
from ldm.util import ConfigError, UserError

log = logging.getLogger(__name__)

Progress = Callable[[int], None]  # called with the number of pictures seen


# --------------------------------------------------------------------------------------------------------------- pictures
def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder and its subfolders, by name; animations (of --save_progress) and grids are no pictures."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of pictures")
    files = [folder / name for name in files_below(folder) if not Path(name).name.startswith("grid-")]
    return [file for file in files if not (file.suffix.lower() in (".gif", ".webp") and _is_animated(file))]


def _is_animated(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return bool(getattr(image, "is_animated", False))
    except OSError:
        return False  # `load_image` says what is wrong with it


def pictures(source: str | Path) -> Iterator[np.ndarray]:
    """Every picture of a set, uint8 (H, W, 3), sizes as they are."""
    path = Path(source)
    if path.suffix == ".npz":
        yield from _packed(path)
        return
    files = picture_files(path)
    if not files:
        raise UserError(f"{path} holds no picture")
    for file in files:
        yield np.asarray(load_image(file))


def _packed(path: Path) -> Iterator[np.ndarray]:
    """The pictures of an .npz one by one, however many there are."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as array:
            version = np.lib.format.read_magic(array)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(array)
            if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
                raise UserError(f"{path}: arr_0 has the shape {shape} and the type {dtype}: pictures are uint8 (N, H, W, 3)")
            for _ in range(shape[0]):
                yield np.frombuffer(array.read(int(np.prod(shape[1:]))), np.uint8).reshape(shape[1:])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} holds no pictures (arr_0): {error}") from None


def batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size`, the last one shorter."""
    while batch := list(islice(items, size)):
        yield batch


# -------------------------------------------------------------------------------------------------------------------- FID
@torch.inference_mode()
def gather(
    source: str | Path,
    network: Any,  # (B, 3, 299, 299) -> (B, D)
    prepare: Callable[[np.ndarray], Tensor],  # one picture -> (1, 3, 299, 299)
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
    progress: Progress = lambda n: None,
) -> Statistics:
    """Statistics of the features of a set of pictures."""
    found: Statistics | None = None
    for images in batches(pictures(source), batch):
        features = network(torch.cat([prepare(image) for image in images]).to(device)).double().cpu().numpy()
        found = Statistics(features.shape[1]) if found is None else found
        found.add(features)
        progress(found.n)
    assert found is not None
    return found


def is_statistics(path: str | Path) -> bool:
    """Whether an .npz holds mu and sigma instead of pictures."""
    if Path(path).suffix != ".npz" or not Path(path).is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as file:
            return "mu" in file.files
    except (OSError, ValueError):
        return False


def fid(drawn: Statistics, reference: Statistics | str | Path) -> float:
    """FID of drawn pictures against a reference set, or against an .npz of statistics. Warns where the number is not to be trusted."""
    dim = len(drawn.mean)
    if isinstance(reference, Statistics):
        mean, covariance, n = reference.mean, reference.covariance, reference.n
    else:
        mean, covariance, known = read_statistics(reference)
        n = drawn.n if known is None else known
    if min(drawn.n, n) <= dim:
        log.warning(
            "%d pictures against %d: with no more than %d of each, FID says little (its bias falls with the count)", drawn.n, n, dim
        )
    return frechet_distance(drawn.mean, drawn.covariance, mean, covariance)


# ------------------------------------------------------------------------------------------------------------- CLIP score
@dataclass(frozen=True)
class Captioned:
    """A picture's file and what it should show."""

    file: Path
    caption: str


def captioned(folder: Path, prompts: str | None = None) -> list[Captioned]:
    """The pictures of a folder, each with its caption.

    From `prompts`, a file with a line a picture in the order of their names; or from what pictures say of themselves, where this
    program drew them; or from name.txt beside them, or metadata.jsonl.
    """
    files = picture_files(folder)
    if not files:
        raise UserError(f"{folder} holds no picture")
    if prompts is not None:
        lines = read_prompts(prompts)
        if len(lines) != len(files):
            raise UserError(
                f"{prompts} has {len(lines)} prompts for {len(files)} pictures in {folder}: give one for each, in order of names"
            )
        return [Captioned(file, line.prompt) for file, line in zip(files, lines, strict=True)]
    told = [_own_prompt(file) for file in files]
    if all(prompt is not None for prompt in told):
        return [Captioned(file, prompt) for file, prompt in zip(files, told, strict=True) if prompt is not None]
    try:
        records = {folder / record.path: record.caption for record in find_records(folder)}
    except ConfigError as error:
        raise UserError(f"{error} (or name a file by --prompts)") from None
    return [Captioned(file, records[file] or "") for file in files]


def _own_prompt(file: Path) -> str | None:
    if file.suffix.lower() != ".png":
        return None
    try:
        return str(read_metadata(file)["prompt"])
    except (UserError, KeyError):
        return None


def load_judge(path: str | Path, arch: str | None = None) -> Any:
    """A CLIP in eval mode: a folder with clip.yaml and clip.safetensors, or with `arch`, an open_clip name, a checkpoint of open_clip."""
    if arch is None:
        from ldm.inference.safety import load_clip

        return load_clip(Path(path) if Path(path).is_dir() else Path(path).parent)
    from ldm.models.clip import ContrastiveCLIP
    from ldm.modules.encoders.image import load_tower

    with torch.device("meta"):
        clip = ContrastiveCLIP(arch)
    load_tower(clip.model, str(path))
    return clip.to("cpu").float().eval().requires_grad_(False)  # Lightning still takes it for a model without memory


def square(image: np.ndarray, size: int) -> np.ndarray:
    """The middle of a picture, uint8 (size, size, 3), as published CLIPs see it: the shorter side resized (bicubic), the rest cut off."""
    height, width = image.shape[:2]
    short = min(height, width)
    scaled = (max(round(width * size / short), size), max(round(height * size / short), size))
    resized = Image.fromarray(image).resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@torch.inference_mode()
def clip_scores(clip: Any, items: Sequence[Captioned], *, batch: int = 32, progress: Progress = lambda n: None) -> list[float]:
    """100 max(cos, 0) of each picture and its caption; their mean is the CLIP score (arXiv:2104.08718 with w = 100 instead of 2.5)."""
    scores: list[float] = []
    for group in batches(iter(items), batch):
        images = torch.cat([to_tensor(square(np.asarray(load_image(item.file)), clip.image_size)) for item in group])
        cosines = (clip.encode_image(images) * clip.encode_text([item.caption for item in group])).sum(dim=-1)
        scores += (100.0 * cosines.clamp_min(0.0)).tolist()
        progress(len(scores))
    return scores
