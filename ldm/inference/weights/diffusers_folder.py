"""A diffusers folder as one checkpoint: which part has which prefix, which of its files are read, and tensors under our names.

Owns the layout on disk of what is read. Names are translated by `diffusers_names`, settings by `diffusers_config`. Of a part's files the
full-precision ones are read where there are any, else the fp16 variant; .safetensors before .bin. `unet/*.non_ema.*` are the trained
weights, which the unmarked files then hold averages of. Imports no torch at its top: headers alone tell the family.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.inference.weights import key_names
from ldm.inference.weights.diffusers_config import UNET_CLASS, VAE_CLASSES, is_open_clip, is_pipeline
from ldm.inference.weights.diffusers_names import CLIP, DEPTH, NORMALIZER, OPEN_CLIP, UNET, VAE, VISION, Recipe, shape_of, to_ours
from ldm.inference.weights.families import EMBEDDED_CONFIG
from ldm.inference.weights.files import Header, TensorInfo, read_header, read_json, read_tensors
from ldm.util import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

REST = "ldm_rest.safetensors"  # what a converted checkpoint held beside its parts: schedule buffers, unused blocks, averages' counters
NOTHING = "nothing"  # the one name in it, where nothing was left
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = (None, "fp16", "bf16")
_UNET_PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class Part:
    """One network of a folder."""

    path: Path
    kind: str  # of `diffusers_names`
    prefix: str  # of its names in a checkpoint


# ------------------------------------------------------------------------------------------------------------------ parts
def parts_of(folder: Path, own: Collection[str] = ()) -> list[Part]:
    """The parts of a whole model's folder, or the one part that `folder` itself is. Raises CheckpointError for anything else.

    `own`: names of the model to be filled, which say how the names of a text encoder alone are wanted.
    """
    if not is_pipeline(folder):
        return [_bare_part(folder, own)]
    parts = [Part(folder / "unet", UNET, _UNET_PREFIX)]
    parts.append(Part(folder / ("vqvae" if (folder / "vqvae").is_dir() else "vae"), VAE, "first_stage_model."))
    first, second = folder / "text_encoder", folder / "text_encoder_2"
    if second.is_dir():
        if first.is_dir():
            parts.append(Part(first, CLIP, "conditioner.embedders.0."))
        parts.append(Part(second, OPEN_CLIP, f"conditioner.embedders.{int(first.is_dir())}.model."))
    elif first.is_dir():
        kind = OPEN_CLIP if is_open_clip(read_json(first / "config.json")) else CLIP
        home = "conditioner.embedders.0." if _is_of_an_engine(folder) else "cond_stage_model."
        parts.append(Part(first, kind, home + ("model." if kind == OPEN_CLIP else "")))
    if (folder / "image_encoder").is_dir():
        parts.append(Part(folder / "image_encoder", VISION, "embedder.model.visual."))
    if (folder / "image_normalizer").is_dir():
        parts.append(Part(folder / "image_normalizer", NORMALIZER, "noise_augmentor."))
    if (folder / "depth_estimator").is_dir():
        parts.append(Part(folder / "depth_estimator", DEPTH, "depth_model.model."))
    missing = [part.path.name for part in parts if not part.path.is_dir()]
    if missing:
        raise CheckpointError(f"{folder} lacks the folder {', '.join(missing)}")
    return parts


def _is_of_an_engine(folder: Path) -> bool:
    """Was it made from a Stable Diffusion 2 in generative-models' names?"""
    header = read_header(folder / REST).metadata if (folder / REST).is_file() else {}
    try:
        return "conditioner_config" in json.loads(header.get(EMBEDDED_CONFIG, "{}"))["model"]["params"]
    except (ValueError, KeyError, TypeError):
        return False


def _bare_part(folder: Path, own: Collection[str]) -> Part:
    settings = read_json(folder / "config.json")
    name = settings.get("_class_name") or next(iter(settings.get("architectures") or ["unknown"]))
    if name == UNET_CLASS:
        return Part(folder, UNET, "")
    if name in VAE_CLASSES:
        return Part(folder, VAE, "")
    if name in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        open_clip = any("resblocks." in one for one in own) if own else is_open_clip(settings)
        return Part(folder, OPEN_CLIP, "model.") if open_clip else Part(folder, CLIP, "")
    raise CheckpointError(f"{folder} holds a {name}: a diffusers folder of a whole model, or its UNet, VAE or CLIP text encoder is needed")


def weight_files(folder: Path, variants: tuple[str | None, ...] = _VARIANTS) -> list[Path]:
    """The files with the weights of a part, from an index where they are sharded; empty when there are none of these variants."""
    for variant in variants:
        for extension in (".safetensors", ".bin"):
            for stem in _STEMS:
                mark = f".{variant}" if variant else ""
                index = folder / f"{stem}{extension}.index{mark}.json"
                if index.is_file():
                    return _shards(index)
                if (folder / f"{stem}{mark}{extension}").is_file():
                    return [folder / f"{stem}{mark}{extension}"]
    return []


def _shards(index: Path) -> list[Path]:
    names = sorted(set((read_json(index).get("weight_map") or {}).values()))
    foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if foreign or not names:
        raise CheckpointError(f"{index} names no shards beside it" + (f", but {foreign[0]}" if foreign else ""))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent} lacks {key_names.summary(missing)}, which {index.name} names: fetch or copy it again")
    return [index.parent / name for name in names]


def _needed_files(part: Part) -> list[Path]:
    files = weight_files(part.path)
    if not files:
        there = key_names.summary([path.name for path in part.path.iterdir()]) or "nothing"
        raise CheckpointError(f"{part.path} has no weights that are known here; it has {there}")
    return files


# ---------------------------------------------------------------------------------------------------------------- reading
def read_folder(folder: Path, own: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a folder under our names, on the CPU; for `own` see `parts_of`."""
    return dict(_walk(parts_of(folder, own), folder, read_tensors, apply_recipe))


def folder_header(folder: Path) -> Header:
    """Names, types and shapes under our names, without reading values of .safetensors files."""

    def make(recipe: Recipe, infos: Mapping[str, TensorInfo]) -> TensorInfo:
        return TensorInfo(infos[recipe.sources[0]].dtype, shape_of(recipe, {name: infos[name].shape for name in recipe.sources}))

    rest = folder / REST
    metadata = read_header(rest).metadata if rest.is_file() else {}
    return Header(dict(_walk(parts_of(folder), folder, lambda path: read_header(path).tensors, make)), metadata)


def _walk(
    parts: list[Part], folder: Path, read: Callable[[Path], dict[str, Any]], make: Callable[[Recipe, Mapping[str, Any]], Any]
) -> Iterator[tuple[str, Any]]:
    for part in parts:
        averaged = dict(_part(part, _needed_files(part), read, make))
        trained = weight_files(part.path, ("non_ema",)) if part.kind == UNET else []
        if not trained:
            yield from averaged.items()
            continue
        yield from _part(part, trained, read, make)
        shadows = key_names.shadows([name.removeprefix("model.") for name in averaged], "model_ema.", "")
        yield from ((shadows[name.removeprefix("model.")], value) for name, value in averaged.items())
    if (folder / REST).is_file():
        yield from ((name, value) for name, value in read(folder / REST).items() if name != NOTHING)


def _part(
    part: Part, files: list[Path], read: Callable[[Path], dict[str, Any]], make: Callable[[Recipe, Mapping[str, Any]], Any]
) -> Iterator[tuple[str, Any]]:
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= read(file)
    try:
        table = to_ours(part.kind, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{part.path}: {error}") from None
    for name, recipe in table.items():
        if lacking := [source for source in recipe.sources if source not in tensors]:
            raise CheckpointError(f"{part.path} lacks {key_names.summary(lacking)}: fetch or copy it again")
        yield part.prefix + name, make(recipe, tensors)


def apply_recipe(recipe: Recipe, tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor that `recipe` makes; no arithmetic, so both directions undo each other bit for bit."""
    import torch

    first = tensors[recipe.sources[0]]
    if recipe.how == "square":
        return first[..., None, None] if first.ndim == 2 else first
    if recipe.how == "flat":
        return first.flatten(1)
    if recipe.how == "turn":
        return first.T.contiguous()
    if recipe.how == "stack":
        return torch.cat([tensors[name] for name in recipe.sources])
    return first.chunk(3)[int(recipe.how[-1])] if recipe.how.startswith("part") else first
