"""The one door for weights: reading, loading into a model, saving.

Owns: which differences between what is read and a model are harmless. Every other difference is a `CheckpointError` that names the
tensors: a model is either filled completely or left untouched. Files are read by `weights.files`, diffusers folders by
`diffusers_folder`; names are `key_names`' business.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.inference.output import move_without_replacing
from ldm.inference.weights import key_names
from ldm.inference.weights.files import TensorInfo, file_kind, read_header, read_tensors
from ldm.util import CheckpointError, UserError

log = logging.getLogger(__name__)

EMA_MODES = ("auto", "ema", "raw")


# ---------------------------------------------------------------------------------------------------------------- reading
def read_state_dict(path: str | Path, own: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, a PyTorch checkpoint or a diffusers folder, on the CPU, mapped from the file where possible.

    A diffusers folder, or a UNet or autoencoder in diffusers' names, comes under the names of latent-diffusion checkpoints; a text
    encoder's under those of transformers or of open_clip, whichever `own`, the names of the model to be filled, are. Raises
    CheckpointError, one line, for anything that is not a whole weights file.
    """
    from ldm.inference.weights.diffusers_folder import apply_recipe, read_folder
    from ldm.inference.weights.diffusers_names import kind_of_names, to_ours

    path = Path(path)
    if path.is_dir():
        return read_folder(path, own)
    tensors = read_tensors(path)
    kind = kind_of_names(tensors)
    return tensors if kind is None else {name: apply_recipe(recipe, tensors) for name, recipe in to_ours(kind, tensors).items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text entries in the header of a .safetensors file; empty for other checkpoint files."""
    path = Path(path)
    return read_header(path).metadata if file_kind(path) == "safetensors" else {}


# ---------------------------------------------------------------------------------------------------------------- loading
@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, in names of the model."""

    missing: tuple[str, ...]  # in the model, not in the file; keep their values
    unexpected: tuple[str, ...]  # in the file, not in the model, and asked to be ignored
    renamed: tuple[tuple[str, str], ...]  # (name in the file, name in the model)
    dropped: tuple[str, ...]  # in the file, harmless, not used
    ema: str  # none: no averages in the file; both; ema: averages used as the weights; raw: averages not used
    notes: tuple[str, ...] = ()  # one line each, also logged as warnings


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    ema: str = "auto",
    allow_missing: Sequence[str] = (),
    ignore: Sequence[str] = (),
    make_it_fit: bool = False,
    prefix: str | None = None,
) -> LoadReport:
    """Fill `model` from a weights file or a diffusers folder, completely or not at all.

    Args:
        ema: which weights, when the file has moving averages (`model_ema.*`). "auto": both where the model keeps an average too, else the
            averages become the weights. "ema": the averages become the weights. "raw": the trained weights, averages start from them.
        allow_missing: prefixes of names that the file need not have.
        ignore: prefixes of names in the file that are left out (their counterparts in the model keep their values).
        make_it_fit: repeat or cut tensors of another size, for fine-tuning with more or fewer channels.
        prefix: where the names of `model` stand in the file of a larger model, such as "first_stage_model."; None finds it.

    A model on the meta device gets its tensors straight from the file, cast to its own dtypes. Raises CheckpointError naming what is
    missing, unexpected or of another shape.
    """
    if ema not in EMA_MODES:
        raise UserError(f"ema {ema!r} is unknown; use {', '.join(EMA_MODES)}")
    in_file = read_state_dict(path, model.state_dict())
    if prefix is None:
        prefix = key_names.prefix_of(model.state_dict(), in_file)
    if prefix:
        return _load_part(model, path, in_file, prefix, ema, allow_missing, ignore, make_it_fit)
    return _load(model, path, in_file, ema, allow_missing, ignore, make_it_fit)


def _load_part(model: nn.Module, path: str | Path, in_file: dict[str, Tensor], prefix: str, ema: str, *rules: Any) -> LoadReport:
    """Fill `model`, whose names stand below `prefix`, from what the file of a larger model has there, its averages included."""
    in_file = key_names.spelled(in_file)
    averaged = any(weight.startswith(prefix) for table in key_names.ema_tables({}, in_file) for weight in table)
    if ema == "ema" and not averaged:  # mostly there are averages of the network alone
        raise CheckpointError(f"{path} has no averaged weights of what is under {prefix}: use ema auto or raw")
    in_file, used = choose_ema(in_file, {}, ema, path)
    below = {name[len(prefix) :]: value for name, value in in_file.items() if name.startswith(prefix)}
    if not below:
        raise CheckpointError(f"{path} has nothing under {prefix}; it holds {key_names.likely_content(in_file)}")
    log.info("%s: taken from what is under %s", path, prefix)
    return replace(_load(model, path, below, "auto", *rules), ema=used if averaged else "none")


def _load(
    model: nn.Module,
    path: str | Path,
    in_file: dict[str, Tensor],
    ema: str,
    allow_missing: Sequence[str],
    ignore: Sequence[str],
    make_it_fit: bool,
) -> LoadReport:
    own = model.state_dict()
    names = key_names.match(in_file, own)
    twice = len(names) - len(set(names.values()))
    found = {names[n]: value for n, value in in_file.items()} | {n: value for n, value in in_file.items() if names[n] == n}
    ignored = tuple(n for n in found if ignore and n.startswith(tuple(ignore)))
    for name in ignored:
        del found[name]
    found, used = choose_ema(found, own, ema, path)
    notes = [f"holds {twice} tensors in two spellings; those under the model's own names are used"] if twice else []
    notes += _compare_settings(model, found, own)
    usable = {n: v for n, v in found.items() if n in own and n not in key_names.SCHEDULE_BUFFERS}
    if make_it_fit:
        usable = {n: _fit(v, own[n].shape) for n, v in usable.items()}
    missing = [n for n in own if n not in usable]
    unused = unused_weights(model)
    needed = [n for n in missing if not n.startswith((*allow_missing, *ignore)) and n not in unused]
    _refuse_differences(path, own, found, usable, needed)
    _fill(model, own, usable, unused)
    _fill_statistics(model, found)
    for note in notes:
        log.warning("%s: %s", path, note)
    report = LoadReport(
        missing=tuple(n for n in missing if n not in key_names.SCHEDULE_BUFFERS),
        unexpected=ignored,
        renamed=tuple((a, b) for a, b in names.items() if a != b),
        dropped=tuple(n for n in found if n not in own),
        ema=used,
        notes=tuple(notes),
    )
    log.info(
        "%s: %d tensors loaded, %d renamed, %d not used, averages: %s", path, len(usable), len(report.renamed), len(report.dropped), used
    )
    return report


def unused_weights(model: nn.Module) -> set[str]:
    """Names of tensors that nothing the model draws depends on.

    These are, of a CLIP text tower, the blocks that are left out at its end and its heads, of a CLIP image encoder the text's half, of
    a depth model the classifier that it was made from.
    """
    from ldm.inference.weights.diffusers_depth import UNUSED
    from ldm.modules.encoders.conditioner import FrozenOpenCLIPEmbedder2
    from ldm.modules.encoders.image import ClipImageEncoder
    from ldm.modules.encoders.text import FrozenOpenCLIPEmbedder
    from ldm.modules.midas.dpt import DPTHybrid

    found = set()
    for path, module in model.named_modules():
        names: Collection[str] = ()
        if isinstance(module, FrozenOpenCLIPEmbedder):
            two = isinstance(module, FrozenOpenCLIPEmbedder2) and not module.legacy
            names = key_names.unused_in_tower(module.state_dict(), 0 if two else module.layer_idx, projection=not two)
        elif isinstance(module, ClipImageEncoder):
            names = [name for name in module.state_dict() if not name.startswith("model.visual.")]
        elif isinstance(module, DPTHybrid):
            names = [name for name in module.state_dict() if name.startswith(UNUSED)]
        found |= {f"{path}.{name}" if path else name for name in names}
    return found


def choose_ema(found: dict[str, Tensor], own: Mapping[str, Tensor], mode: str, path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Decide between trained and averaged weights; returns the tensors under the model's names, and which were used."""
    found, used = dict(found), "none"
    for table in key_names.ema_tables(own, found):  # weight -> its average
        in_file = {w: s for w, s in table.items() if s in found}
        in_model = {w: s for w, s in table.items() if s in own}
        if in_file:
            used = "raw" if mode == "raw" else "both" if mode == "auto" and in_model else "ema"
        if in_file and used == "ema":
            found.update({w: found[s] for w, s in in_file.items()})
        if not in_file or used == "raw":  # the model's averages start from the weights
            found.update({s: found[w] for w, s in in_model.items() if w in found})
            prefix = next(iter(table.values())).partition(".")[0] + "."
            found = {n: v for n, v in found.items() if not (n.startswith(prefix) and key_names.is_ema_state(n))}
        for shadow in in_file.values():
            if shadow not in own:
                del found[shadow]
    if mode == "ema" and used != "ema":
        raise CheckpointError(f"{path} has no averaged weights (model_ema.*): use ema auto or raw")
    return found, used


def _compare_settings(model: nn.Module, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Settings that a file carries beside its weights, held against the model's own; the model's own stay."""
    notes = []
    theirs, ours = found.get("alphas_cumprod"), own.get("alphas_cumprod")
    if theirs is not None and ours is not None and not ours.is_meta:
        # 1e-3: a file in half precision
        same = theirs.shape == ours.shape and torch.allclose(theirs.float(), ours.float().cpu(), rtol=0, atol=1e-3)
        if not same:
            notes.append("was trained with another noise schedule than the config describes; the config's is used")
    scale, own_scale = found.get("scale_factor"), getattr(model, "scale_factor", None)
    fixed = scale is not None and own_scale is not None and "scale_factor" not in own
    if fixed and abs(float(scale) - float(own_scale)) > 1e-3 * abs(float(scale)):
        raise CheckpointError(
            f"the weights were trained with scale_factor {float(scale):.5g}, the config says {float(own_scale):.5g}: "
            f"write scale_factor: {float(scale):.5g} into the config"
        )
    kind = getattr(model, "parameterization", None)
    if "v_pred" in found and kind is not None and kind != "v":
        notes.append(f"says that it predicts v, but the config says parameterization: {kind}")
    return notes


def _refuse_differences(
    path: str | Path, own: Mapping[str, Tensor], found: Mapping[str, Tensor], usable: Mapping[str, Tensor], missing: Sequence[str]
) -> None:
    lacking = [n for n in missing if not key_names.is_harmless(n) and n != "scale_factor"]
    foreign = [n for n in found if n not in own and not key_names.is_harmless(n) and n != "scale_factor"]
    shapes = [f"{n} {list(v.shape)} instead of {list(own[n].shape)}" for n, v in usable.items() if v.shape != own[n].shape]
    kinds = [f"{n} {str(v.dtype).removeprefix('torch.')}" for n, v in usable.items() if own[n].is_floating_point() > v.is_floating_point()]
    differences = {"it lacks": lacking, "it has unknown": foreign, "it has other shapes:": shapes, "it has no real numbers in": kinds}
    problems = [f"{label} {key_names.summary(names)}" for label, names in differences.items() if names]
    if problems:
        from ldm.inference.weights.families import title_of

        title = title_of({name: TensorInfo(str(value.dtype), tuple(value.shape)) for name, value in found.items()})
        content = f"{title}: {key_names.likely_content(found)}" if title else key_names.likely_content(found)
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(problems)}. The file holds {content}")


def _fit(value: Tensor, shape: torch.Size) -> Tensor:
    """`value` repeated or cut to `shape` along its first two dimensions.

    A repeated input is divided by one more than the number of its uses: the published rule, kept because start weights decide how a
    fine-tuning run goes (its counter begins at one, so the response to repeated channels comes out smaller than before).
    """
    if value.shape == shape or value.ndim != len(shape) or value.ndim == 0 or value.shape[2:] != shape[2:]:
        return value
    rows = torch.arange(shape[0]) % value.shape[0]
    value = value[rows]
    if value.ndim > 1 and value.shape[1] != shape[1]:
        columns = torch.arange(shape[1]) % value.shape[1]
        divisor = (torch.bincount(columns)[columns] + 1).to(value.dtype)
        value = value[:, columns] / divisor.view(1, -1, *[1] * (value.ndim - 2))
    return value


@torch.no_grad()
def _fill(model: nn.Module, own: Mapping[str, Tensor], usable: Mapping[str, Tensor], unused: set[str]) -> None:
    """Copy into the model's tensors, or, on the meta device, put the file's tensors in their place."""
    on_meta = any(v.is_meta for v in own.values())
    if not on_meta:
        model.load_state_dict({**own, **usable})
        return
    unknown = [n for n, v in own.items() if v.is_meta and n not in usable]
    lost = [n for n in unknown if not key_names.is_loss(n) and n not in unused]
    if lost:
        raise CheckpointError(f"a model without memory needs every tensor from the file; it lacks {key_names.summary(lost)}")
    values: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in usable.items():
        value = value.to(own[name].dtype)
        place = value.untyped_storage().data_ptr()
        values[name] = value.clone() if place in places else value  # an update of one must not change another
        places.add(place)
    values |= {n: torch.zeros_like(own[n], device="cpu") for n in unknown}  # unused, or of a training loss
    model.load_state_dict({**own, **values}, assign=True)


@torch.no_grad()
def _fill_statistics(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Statistics of image embeddings (Stable unCLIP): no part of a published state dict, but of what a diffusers folder brings."""
    for name, buffer in model.named_buffers():
        value = found.get(name)
        if value is not None and name.endswith(("noise_augmentor.data_mean", "noise_augmentor.data_std")):
            buffer.copy_(value.reshape(buffer.shape))


# ----------------------------------------------------------------------------------------------------------------- saving
def save_weights(
    model: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a .safetensors file under the published names, whole or not at all (temporary name, then rename).

    `metadata` goes into the header (values that are not text as JSON). `dtype` is the floating type to store; buffers of the noise
    schedule and single numbers keep theirs. An existing file is only replaced with `overwrite`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"weights are saved as .safetensors; {path.name} has another ending")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another name or ask to overwrite it")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = _to_store(state, dtype)
    header = {"format": "pt", **{k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # hosts that share a disk have the same process numbers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask says; safetensors makes files that only their owner can read
        save_file(tensors, temporary, metadata=header)
        temporary.chmod(mode)
        if overwrite:
            os.replace(temporary, path)
        elif not move_without_replacing(temporary, path):  # another program was faster
            raise UserError(f"{path} exists already: choose another name or ask to overwrite it")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _to_store(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Published names; on the CPU, contiguous, no two sharing memory, floating values in `dtype`."""
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in key_names.spelled(state).items():
        stored = value.detach().cpu()
        if dtype is not None and stored.is_floating_point() and stored.ndim > 0 and name not in key_names.SCHEDULE_BUFFERS:
            stored = stored.to(dtype)
            if not torch.isfinite(stored).all() and torch.isfinite(value).all():
                raise UserError(f"{name} has values outside the range of {str(dtype).removeprefix('torch.')}: save as bfloat16 or float32")
        stored = stored.contiguous()
        place = stored.untyped_storage().data_ptr()
        tensors[name] = stored.clone() if place in places and stored.numel() else stored
        places.add(place)
    return tensors
