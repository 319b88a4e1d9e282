"""Weights files: what is read from one, what is refused, and its header alone. Knows no models; `checkpoint` is the door.

A pickle (`.ckpt`, `.pt`, `.bin`) is only ever read with PyTorch's restricted unpickler. Settings of other programs that such a file may
carry beside its weights (OmegaConf containers, Lightning callbacks) are replaced by inert placeholders: their classes are not even
imported. The header of a .safetensors file is read without torch, so this module imports none at its top.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.inference.weights import key_names
from ldm.util import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

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
_BUILTINS = "dict list tuple set frozenset int float bool str bytes complex object slice range"
_BYSTANDER_NAMES = frozenset(("argparse.Namespace", "_codecs.encode", *(f"builtins.{name}" for name in _BUILTINS.split())))
_DTYPES = {  # of .safetensors headers
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_MAX_HEADER = 100_000_000  # bytes; what the safetensors library allows


@dataclass(frozen=True)
class TensorInfo:
    """A tensor without its values."""

    dtype: str  # float32, float16, ...
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Names, types and shapes in a file, and the text beside them."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------- reading
def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors or PyTorch checkpoint file, on the CPU, mapped from the file rather than copied where possible.

    A Lightning checkpoint's `state_dict` is unwrapped; entries that are no tensors are left out. Raises CheckpointError, one line, when
    the file is missing, empty, truncated, of another kind, or holds objects that are not weights.
    """
    if file_kind(path) != "safetensors":
        return _only_tensors(path, _read_pickle(path))
    with _open_safetensors(path) as file:
        return _only_tensors(path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)


def read_header(path: Path) -> Header:
    """What is in a file, without its values. Raises CheckpointError as `read_tensors`."""
    if file_kind(path) == "safetensors":
        return _safetensors_header(path)
    tensors = _only_tensors(path, _read_pickle(path, device="meta"))
    return Header({name: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()})


def _only_tensors(path: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    from torch import Tensor

    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no weights; it has {key_names.summary(list(map(str, content))) or 'nothing'}")
    return tensors


def file_kind(path: Path) -> str:
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
    fits = len(head) > 8 and 8 + int.from_bytes(head[:8], "little") <= size  # the length of a header may begin with a pickle's first byte
    if head[8:9] == b"{" and (fits or not head.startswith(b"\x80")):
        return "safetensors"
    if head.startswith(b"\x80"):
        return "pickle"
    if head.startswith(b"version https://"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path} is a web page, not weights: the download went wrong, fetch it again")
    raise CheckpointError(f"{path} is not a weights file: a .safetensors or a PyTorch checkpoint (.ckpt, .pt) is needed")


# ------------------------------------------------------------------------------------------------------------ safetensors
def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise _damaged(path, error) from None


def _safetensors_header(path: Path) -> Header:
    """8 bytes with the header's length, then JSON: name -> {dtype, shape, data_offsets}, and text under __metadata__."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER:
                raise ValueError("its header is too long")
            content = json.loads(file.read(length).decode("utf-8"))
            size = os.fstat(file.fileno()).st_size - 8 - length
        metadata = {str(key): str(value) for key, value in (content.pop("__metadata__", None) or {}).items()}
        tensors = {name: TensorInfo(_DTYPES.get(one["dtype"], one["dtype"]), tuple(one["shape"])) for name, one in content.items()}
        if max((one["data_offsets"][1] for one in content.values()), default=0) > size:
            raise ValueError("it is shorter than its header says")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise _damaged(path, error) from None
    if not tensors:
        raise CheckpointError(f"{path} holds no weights")
    return Header(tensors, metadata)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
    return CheckpointError(f"{path} is damaged or cut short ({reason}): fetch or copy it again")


# ----------------------------------------------------------------------------------------------------------------- pickle
class _Inert:
    """Stands for an object whose class is none of our business: takes every argument and state, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickle(path: Path, device: str = "cpu") -> Mapping[Any, Any]:
    """The dictionary of weights in a pickle; on the device "meta" without reading their values."""
    import torch

    is_zip = file_kind(path) == "zip"
    if is_zip and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is cut short: fetch or copy it again")
    try:
        placeholders: list[Any] = [(_placeholder(name), name) for name in _foreign_names(path)] if is_zip else []
        with torch.serialization.safe_globals(placeholders):
            content = torch.load(path, map_location=device, weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_why_unpicklable(path, error)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a dictionary of weights")
    return content


def _foreign_names(path: Path) -> list[str]:
    """Names in the pickle that PyTorch does not read by itself; refuses those that have no business beside weights. Executes nothing."""
    import torch

    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    refused = [n for n in names if not n.startswith(_BYSTANDERS) and n not in _BYSTANDER_NAMES]
    if refused:
        raise CheckpointError(
            f"{path} is refused: it asks to run {key_names.summary(refused)}, which weights never need; "
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
