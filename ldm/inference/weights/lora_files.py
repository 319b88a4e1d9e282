"""LoRA files: read in the forms of kohya, diffusers and peft, fitted to a model of ours by name and shape, written as kohya's.

Owns the names. A layer is found under a key `part|path` in which dots and underscores are the same: `unet|down_blocks_0_...`, and for
the text encoders `te1|...`, `te2|...`. Every layer of a file fits a weight of the model, or the file is refused by name.

    kohya      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .lora_mid.weight, .alpha;
               lora_unet_input_blocks_1_1_proj_in...; lora_te_text_model_..., lora_te1_..., lora_te2_...
    diffusers  unet.down_blocks.0.attentions.0.proj_in.lora_A.weight, .lora_B.weight; .lora.down.weight; text_encoder., text_encoder_2.
    older      down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
    peft       base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight, with adapter_config.json beside it
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.inference.checkpoint import read_metadata, save_weights
from ldm.inference.weights import key_names
from ldm.inference.weights.diffusers_names import CLIP, OPEN_CLIP, UNET, Recipe, to_theirs
from ldm.inference.weights.files import read_tensors
from ldm.modules import lora
from ldm.modules.lora import Change, LowRank
from ldm.util import CheckpointError

log = logging.getLogger(__name__)

Changes = dict[str, list[Change]]  # weight of the model -> what is done to it

_LAYER = re.compile(
    r"(?P<path>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<role>down|up|mid|A|B)(?:\.(?!weight$)\w+)?\.weight|\.(?P<alpha>alpha))$"
)
_ROLES = {"down": "down", "A": "down", "up": "up", "B": "up", "mid": "mid"}
_PREFIXES = (  # the first that fits; "" of the part: the path itself says it
    ("lora_unet_", "unet"),
    ("lora_te1_", "te1"),
    ("lora_te2_", "te2"),
    ("lora_te_", "te1"),
    ("unet.", "unet"),
    ("text_encoder_2.", "te2"),
    ("text_encoder.", "te1"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("base_model.model.", ""),
    ("", ""),
)
_UNET_PREFIX = "model.diffusion_model."
_ENCODER = re.compile(
    r"(?P<prefix>(?:cond_stage_model|conditioner\.embedders\.\d+)\.(?:model\.)?)"
    r"transformer\.(?:(?P<clip>text_model\.encoder\.layers\.0\.self_attn\.q_proj\.weight)|resblocks\.0\.attn\.in_proj_weight)"
)
_OTHER_KINDS = {  # what other programs write into such files -> what it is
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "bundle_emb": "an embedding (give it by --embedding)",
    ".diff": "a whole weight's difference",
    "_norm": "a norm's difference",
    "lora_embedding": "a change of the token table",
}


# ------------------------------------------------------------------------------------------------------------------ names
@dataclass(frozen=True)
class Place:
    """Where a layer of a file goes."""

    weight: str  # name in the model, as published checkpoints have it
    third: int | None = None  # of the rows of a fused projection
    turned: bool = False  # kept as (in, out)


@dataclass(frozen=True)
class Layout:
    """The weights of a model by the names that LoRA files have for them."""

    places: Mapping[str, Place]  # `part|path`, all spellings
    kohya: Mapping[Place, str]  # the one that is written

    @classmethod
    def of(cls, names: Collection[str]) -> Layout:
        """From names as published checkpoints have them."""
        places: dict[str, Place] = {}
        kohya: dict[Place, str] = {}
        parts = _parts(names)
        is_xl = any(part == "te2" for part, _, _ in parts)
        for part, prefix, kind in parts:
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            spelling = "lora_" + ("te" if part == "te1" and not is_xl else part) + "_"
            label = "add_embedding" if is_xl else "class_embedding"
            table = {theirs: recipe for theirs, recipe in to_theirs(kind, own, label).items() if theirs.endswith(".weight")}
            for name in own:  # first, so that the names of other programs win where a path means two things
                if name.endswith(".weight"):
                    place = Place(prefix + name)
                    places[_key(part, name.removesuffix(".weight"))] = place
                    kohya[place] = spelling + _flat(name.removesuffix(".weight"))
            for theirs, recipe in table.items():
                place, path = _place(prefix, recipe), theirs.removesuffix(".weight")
                places[_key(part, path)] = places[_key(part, path.removeprefix("text_model."))] = place
                if part != "unet" or not is_xl:  # kohya trains SDXL's UNet under our names
                    kohya[place] = spelling + _flat(path)
        return cls(places, kohya)


def _parts(names: Collection[str]) -> list[tuple[str, str, str]]:
    """(part, prefix of its names, kind) of what a LoRA may change."""
    found = [("unet", _UNET_PREFIX, UNET)] if any(name.startswith(_UNET_PREFIX) for name in names) else []
    encoders = sorted((m["prefix"], CLIP if m["clip"] else OPEN_CLIP) for name in names if (m := _ENCODER.fullmatch(name)))
    return found + [(f"te{number}", prefix, kind) for number, (prefix, kind) in enumerate(encoders, 1)]


def _place(prefix: str, recipe: Recipe) -> Place:
    third = int(recipe.how[4:]) if recipe.how.startswith("part") else None
    return Place(prefix + recipe.sources[0], third, recipe.how == "turn")


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _key(part: str, path: str) -> str:
    return f"{part}|{_flat(path)}"


def _key_in_file(path: str) -> str:
    """The key of a layer's path in a file."""
    prefix, part = next((prefix, part) for prefix, part in _PREFIXES if path.startswith(prefix))
    path = path[len(prefix) :]
    if not part and path.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
        return _key_in_file(path)
    part = part or ("te1" if path.startswith(("text_model.", "encoder.layers.")) else "unet")
    path = path.replace(".processor.", ".")
    return _key(part, path + ".0" if path.endswith(".to_out") else path)


# ---------------------------------------------------------------------------------------------------------------- reading
def read_lora(path: str | Path) -> dict[str, LowRank]:
    """The layers of a file, or of a folder that peft or diffusers wrote, by path in the file (`lora_unet_...`, `unet....`).

    Raises CheckpointError, one line, for a file of another kind.
    """
    file = _file_of(Path(path))
    factors: dict[str, dict[str, Tensor]] = {}
    others = []
    for name, value in read_tensors(file).items():
        if (match := _LAYER.fullmatch(name)) is None:
            others.append(name)
        else:
            factors.setdefault(match["path"], {})["alpha" if match["alpha"] else _ROLES[match["role"]]] = value
    if others:
        kinds = sorted({kind for mark, kind in _OTHER_KINDS.items() if any(mark in name for name in others)})
        what = f"{', '.join(kinds)} is not supported" if kinds else "no layer of a LoRA is called that"
        raise CheckpointError(f"{file} has {key_names.summary(others)}: {what}; a LoRA with only up, down, mid and alpha is needed")
    broken = [one for one, found in factors.items() if not {"up", "down"} <= set(found)]
    if broken:
        raise CheckpointError(f"{file} is incomplete: {key_names.summary(broken)} has no up and down; fetch or copy it again")
    alphas = _alphas(file)
    return {one: _low_rank(file, one, found, alphas) for one, found in factors.items()}


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin", "pytorch_lora_weights.bin")
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"the folder {path} has no LoRA ({', '.join(names)}): name the file itself")
    return found


def _low_rank(file: Path, path: str, factors: Mapping[str, Tensor], alphas: Any) -> LowRank:
    broken = [r for r, v in factors.items() if not v.is_floating_point() or v.numel() < 1 or (r == "alpha" and v.numel() > 1)]
    if broken or not all(torch.isfinite(value.float()).all() for value in factors.values()):
        raise CheckpointError(f"{file}: {path} has no finite numbers in {', '.join(broken or factors)}; fetch or copy it again")
    layer = LowRank(factors["down"], factors["up"], factors.get("mid"), float(factors["alpha"]) if "alpha" in factors else None)
    if layer.down.ndim < 2 or not layer.fits_together():
        sizes = ", ".join(f"{role} {list(value.shape)}" for role, value in factors.items() if role != "alpha")
        raise CheckpointError(f"{file}: the factors of {path} do not fit together ({sizes})")
    return layer if layer.alpha is not None else replace(layer, alpha=alphas(path, layer.rank))


def _alphas(file: Path) -> Any:
    """(path, rank) -> alpha, as peft's settings say it, in the header or beside the file; None where nothing does."""
    beside = file.with_name("adapter_config.json")
    packed = read_metadata(file).get("lora_adapter_metadata")
    settings: dict[str, Any] = {}
    try:
        if packed is not None:
            settings = json.loads(packed)
        elif file.stem == "adapter_model" and beside.is_file():
            settings = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it is no mapping")
    except ValueError as error:
        raise CheckpointError(f"the settings of {file} are damaged: {error}") from None

    def alpha(path: str, rank: int) -> float | None:
        prefix = next((p for p in ("unet.", "text_encoder_2.", "text_encoder.") if path.startswith(p)), "") if packed is not None else ""
        value = settings.get(f"{prefix}lora_alpha")
        for pattern, own in (settings.get(f"{prefix}alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?{pattern}", path):
                value = own
        if value is None:
            return None
        return float(value) * (math.sqrt(rank) if settings.get(f"{prefix}use_rslora") else 1.0)

    return alpha


# ---------------------------------------------------------------------------------------------------------------- fitting
def fit(layout: Layout, shapes: Mapping[str, Sequence[int]], path: str | Path, weight: float = 1.0) -> Changes:
    """What the LoRA in `path` does to a model's weights. Raises CheckpointError that names every layer which fits none of them."""
    changes: Changes = {}
    lost, wrong = [], []
    taken: dict[Place, str] = {}
    for name, layer in read_lora(path).items():
        place = layout.places.get(_key_in_file(name))
        if place is None:
            lost.append(name)
            continue
        if (other := taken.setdefault(place, name)) != name:
            raise CheckpointError(f"{path} changes one weight twice, as {other} and as {name}: a LoRA has one layer for each")
        change = Change(layer, weight, place.third, place.turned)
        if change.fits(shapes[place.weight]):
            changes.setdefault(place.weight, []).append(change)
        else:
            wrong.append(f"{name} {list(layer.shape)} for {list(shapes[place.weight])}")
    if lost or wrong:
        raise CheckpointError(_refusal(path, lost, wrong, sum(map(len, changes.values()))))
    return changes


def _refusal(path: str | Path, lost: list[str], wrong: list[str], fitting: int) -> str:
    from ldm.inference.weights.families import identify

    base = identify(_file_of(Path(path))).base
    problems = [f"{len(lost)} layers that fit nothing in this model: {key_names.summary(lost)}"] if lost else []
    problems += [f"{len(wrong)} layers of another shape: {key_names.summary(wrong)}"] if wrong else []
    cure = f"it was made for {base}: draw with such a model" if base else "draw with the model that it was made for"
    return f"{path} has {' and '.join(problems)} ({fitting} layers fit); {cure}"


def gather(weights: Mapping[str, Tensor], loras: Sequence[tuple[str | Path, float]]) -> Changes:
    """What several LoRAs, (file, weight) each, do together to weights under their published names."""
    layout, shapes = Layout.of(weights), {name: tuple(value.shape) for name, value in weights.items()}
    together: Changes = {}
    for path, weight in loras:
        found = fit(layout, shapes, path, weight)
        log.info("%s: %d weights changed, weight %g", path, len(found), weight)
        for name, changes in found.items():
            together.setdefault(name, []).extend(changes)
    return together


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model under their published names."""
    return {key_names.published(name): value for name, value in model.named_parameters()}


def merge_loras(model: nn.Module, loras: Sequence[tuple[str | Path, float]]) -> None:
    """Merge LoRAs, (file, weight) each, into a model's weights for good."""
    weights = named_weights(model)
    lora.merge(weights, gather(weights, loras))


@contextmanager
def with_loras(model: nn.Module, loras: Sequence[tuple[str | Path, float]]) -> Iterator[None]:
    """Inside, the model's weights carry the LoRAs; afterwards they are, bit for bit, what they were."""
    weights = named_weights(model)
    with lora.merged(weights, gather(weights, loras)):
        yield


# ---------------------------------------------------------------------------------------------------------------- writing
def write_lora(
    path: str | Path,
    layers: Mapping[str, LowRank],  # by name of the weight that each changes
    names: Collection[str],  # of all weights of the model
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write kohya's form. A layer of a fused projection becomes three, with the same `down` and a third of `up` each."""
    layout = Layout.of(names)
    tensors: dict[str, Tensor] = {}
    for weight, layer in layers.items():
        thirds = [place for place in (Place(weight, third) for third in range(3)) if place in layout.kohya]
        for place in thirds or [Place(weight)]:
            up = layer.up if place.third is None else layer.up.chunk(3)[place.third]
            key = layout.kohya[place]
            tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(layer.rank if layer.alpha is None else layer.alpha))
            if layer.mid is not None:
                tensors[f"{key}.lora_mid.weight"] = layer.mid
    header = {"ss_network_module": "networks.lora", **_dimensions(layers), **(metadata or {})}
    return save_weights(tensors, path, metadata=header, overwrite=overwrite)


def _dimensions(layers: Mapping[str, LowRank]) -> dict[str, str]:
    """Rank and alpha as kohya's header says them, where all layers have the same."""
    found = {"ss_network_dim": {layer.rank for layer in layers.values()}, "ss_network_alpha": {layer.alpha for layer in layers.values()}}
    return {key: f"{value:g}" for key, values in found.items() if len(values) == 1 and (value := values.pop()) is not None}
