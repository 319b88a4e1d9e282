"""The one door for weights: reading, loading into a model, saving.

Owns: what is read from a file and what is refused, and which differences between a file and a model are harmless. Every other difference
is a `CheckpointError` that names the tensors: a model is either filled completely or left untouched.

A pickle (`.ckpt`, `.pt`) is only ever read with PyTorch's restricted unpickler. Settings of other programs that such a file may carry
beside its weights (OmegaConf containers, Lightning callbacks) are replaced by inert placeholders: their classes are not even imported.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.inference import weight_names
from ldm.util import CheckpointError, UserError

log = logging.getLogger(__name__)

EMA_MODES = ("auto", "ema", "raw")
# What may stand beside the weights in a pickle, as a placeholder. Anything else is refused.
_BYSTANDERS = (
    "omegaconf.",
    "antlr4.",
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "numpy.",
    "typing.",
    "collections.",
    "pathlib.",
    "ldm.",
)
_BYSTANDER_NAMES = frozenset(
    (
        "argparse.Namespace",
        "_codecs.encode",
        *(
            f"builtins.{n}"
            for n in (
                "dict",
                "list",
                "tuple",
                "set",
                "frozenset",
                "int",
                "float",
                "bool",
                "str",
                "bytes",
                "complex",
                "object",
                "slice",
                "range",
            )
        ),
    )
)


# ---------------------------------------------------------------------------------------------------------------- reading
def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or PyTorch checkpoint file, on the CPU, mapped from the file rather than copied where possible.

    A Lightning checkpoint's `state_dict` is unwrapped; entries that are no tensors are left out. Raises CheckpointError, one line, when
    the file is missing, empty, truncated, of another kind, or holds objects that are not weights.
    """
    path = Path(path)
    reader = {"safetensors": _read_safetensors, "zip": _read_pickle, "pickle": _read_pickle}[_kind(path)]
    content = reader(path)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no weights; it has {weight_names.summary(list(map(str, content))) or 'nothing'}")
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text entries in the header of a .safetensors file; empty for other checkpoint files."""
    path = Path(path)
    if _kind(path) != "safetensors":
        return {}
    with _open_safetensors(path) as file:
        return dict(file.metadata() or {})


def _kind(path: Path) -> str:
    """safetensors, zip (torch.save) or pickle (torch.save before 1.6), told from the first bytes."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give a .safetensors or .ckpt file")
    try:
        with path.open("rb") as file:
            head = file.read(16)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"cannot read the weights {path}: {error.strerror}") from None
    if size == 0:
        raise CheckpointError(f"{path} is empty: fetch or copy it again")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if len(head) > 8 and head[8:9] == b"{":
        return "safetensors"
    if head.startswith(b"version https://"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights: the download went wrong, fetch it again")
    raise CheckpointError(f"{path} is not a weights file: a .safetensors or a PyTorch checkpoint (.ckpt, .pt) is needed")


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}): fetch or copy it again") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


class _Inert:
    """Stands for an object whose class is none of our business: takes every argument and state, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickle(path: Path) -> Mapping[Any, Any]:
    is_zip = _kind(path) == "zip"
    if is_zip and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut short: fetch or copy it again")
    try:
        placeholders = [(_placeholder(name), name) for name in _foreign_names(path)] if is_zip else []
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_why_unpicklable(path, error)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
        raise CheckpointError(f"{path} is damaged or cut short ({reason}): fetch or copy it again") from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a dictionary of weights")
    return content


def _foreign_names(path: Path) -> list[str]:
    """Names in the pickle that PyTorch does not read by itself; refuses those that have no business beside weights. Executes nothing."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    refused = [n for n in names if not n.startswith(_BYSTANDERS) and n not in _BYSTANDER_NAMES]
    if refused:
        raise CheckpointError(
            f"{path} is refused: it asks to run {weight_names.summary(refused)}, which weights never need; "
            "nothing of it was run. Get the model as .safetensors"
        )
    return names


def _placeholder(name: str) -> type:
    return type(name.rpartition(".")[2], (_Inert,), {"__module__": __name__})


def _why_unpicklable(path: Path, error: Exception) -> str:
    text = str(error)
    if "GLOBAL" in text:  # "Unsupported global: GLOBAL os.system was not an allowed global by default ..."
        name = text.split("GLOBAL", 1)[1].split()[0]
        reason = f"it asks for {name}, which weights never need"
    else:
        reason = "it is not a plain dictionary of weights, or it is damaged"
    return f"{path} is refused: {reason}; nothing of it was run. Get the model as .safetensors"


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
) -> LoadReport:
    """Fill `model` from a weights file, completely or not at all.

    Args:
        ema: which weights, when the file has moving averages (`model_ema.*`). "auto": both where the model keeps an average too, else the
            averages become the weights. "ema": the averages become the weights. "raw": the trained weights, averages start from them.
        allow_missing: prefixes of names that the file need not have.
        ignore: prefixes of names in the file that are left out (their counterparts in the model keep their values).
        make_it_fit: repeat or cut tensors of another size, for fine-tuning with more or fewer channels.

    A model on the meta device gets its tensors straight from the file, cast to its own dtypes. Raises CheckpointError naming what is
    missing, unexpected or of another shape.
    """
    if ema not in EMA_MODES:
        raise UserError(f"ema {ema!r} is unknown; use {', '.join(EMA_MODES)}")
    own = model.state_dict()
    in_file = read_state_dict(path)
    names = weight_names.match(in_file, own)
    found = {names[n]: value for n, value in in_file.items()}
    ignored = tuple(n for n in found if ignore and n.startswith(tuple(ignore)))
    for name in ignored:
        del found[name]
    found, used = choose_ema(found, own, ema, path)
    notes = _compare_settings(model, found, own)
    usable = {n: v for n, v in found.items() if n in own and n not in weight_names.SCHEDULE_BUFFERS}
    if make_it_fit:
        usable = {n: _fit(v, own[n].shape) for n, v in usable.items()}
    missing = [n for n in own if n not in usable]
    _refuse_differences(path, own, found, usable, [n for n in missing if not n.startswith((*allow_missing, *ignore))])
    _fill(model, own, usable)
    for note in notes:
        log.warning("%s: %s", path, note)
    report = LoadReport(
        missing=tuple(n for n in missing if n not in weight_names.SCHEDULE_BUFFERS),
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


def choose_ema(found: dict[str, Tensor], own: Mapping[str, Tensor], mode: str, path: str | Path) -> tuple[dict[str, Tensor], str]:
    """Decide between trained and averaged weights; returns the tensors under the model's names, and which were used."""
    found, used = dict(found), "none"
    for table in weight_names.ema_tables(own, found):  # weight -> its average
        in_file = {w: s for w, s in table.items() if s in found}
        in_model = {w: s for w, s in table.items() if s in own}
        if in_file:
            used = "raw" if mode == "raw" else "both" if mode == "auto" and in_model else "ema"
        if in_file and used == "ema":
            found.update({w: found[s] for w, s in in_file.items()})
        if not in_file or used == "raw":  # the model's averages start from the weights
            found.update({s: found[w] for w, s in in_model.items() if w in found})
            prefix = next(iter(table.values())).partition(".")[0] + "."
            found = {n: v for n, v in found.items() if not (n.startswith(prefix) and weight_names.is_ema_state(n))}
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
    lacking = [n for n in missing if not weight_names.is_harmless(n) and n != "scale_factor"]
    foreign = [n for n in found if n not in own and not weight_names.is_harmless(n) and n != "scale_factor"]
    shapes = [f"{n} {list(v.shape)} instead of {list(own[n].shape)}" for n, v in usable.items() if v.shape != own[n].shape]
    problems = [
        f"{label} {weight_names.summary(names)}"
        for label, names in (("it lacks", lacking), ("it has unknown", foreign), ("it has other shapes:", shapes))
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} does not fit this model: {'; '.join(problems)}. The file holds {weight_names.likely_content(found)}")


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
def _fill(model: nn.Module, own: Mapping[str, Tensor], usable: Mapping[str, Tensor]) -> None:
    """Copy into the model's tensors, or, on the meta device, put the file's tensors in their place."""
    on_meta = any(v.is_meta for v in own.values())
    if not on_meta:
        model.load_state_dict({**own, **usable})
        return
    unknown = [n for n, v in own.items() if v.is_meta and n not in usable]
    lost = [n for n in unknown if not n.partition("loss.")[1]]
    if lost:
        raise CheckpointError(f"a model without memory needs every tensor from the file; it lacks {weight_names.summary(lost)}")
    values = {n: v.to(own[n].dtype) for n, v in usable.items()}
    values |= {n: torch.zeros_like(own[n], device="cpu") for n in unknown}  # parts of a training loss
    model.load_state_dict({**own, **values}, assign=True)


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
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"weights are saved as .safetensors; {path.name} has another ending")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another name or ask to overwrite it")
    state = model.state_dict() if isinstance(model, nn.Module) else model
    tensors = _to_store(state, dtype)
    header = {"format": "pt", **{k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask says; safetensors makes files that only their owner can read
        save_file(tensors, temporary, metadata=header)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _to_store(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Published names; on the CPU, contiguous, no two sharing memory, floating values in `dtype`."""
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in state.items():
        name, stored = weight_names.published(name), value.detach().cpu()
        if dtype is not None and stored.is_floating_point() and stored.ndim > 0 and name not in weight_names.SCHEDULE_BUFFERS:
            stored = stored.to(dtype)
            if not torch.isfinite(stored).all() and torch.isfinite(value).all():
                raise UserError(f"{name} has values outside the range of {str(dtype).removeprefix('torch.')}: save as bfloat16 or float32")
        stored = stored.contiguous()
        place = stored.untyped_storage().data_ptr()
        tensors[name] = stored.clone() if place in places and stored.numel() else stored
        places.add(place)
    return tensors
