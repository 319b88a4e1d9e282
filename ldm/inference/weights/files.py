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
from collections.abc import Mapping, Sequence
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
    "sgm.",
    "taming.",
    "main.",
    "__main__.",
)
_BUILTINS = "dict list tuple set frozenset int float bool str bytes complex object slice range"
_BYSTANDER_NAMES = frozenset(("argparse.Namespace", "_codecs.encode", *(f"builtins.{name}" for name in _BUILTINS.split())))
# Classes whose content is put in as into a dictionary or a list; any other placeholder takes its state as a whole.
_CONTAINERS: dict[str, type] = {"defaultdict": dict, "AttributeDict": dict, "deque": list}
_STATE_DICTS = ("state_dict", "model", "module")  # where a training program may keep the weights: Lightning, MiDaS, DeepSpeed
_DTYPES = {  # of .safetensors headers -> (name, bytes)
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_MAX_HEADER = 100_000_000  # bytes; what the safetensors library allows
_MAX_GROWTH = 16  # times the size of a pickle that its tensors may claim; two names for one tensor are common, thousands are an attack


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
        tensors = _only_tensors(path, read_pickle(path))
        check_tensors(path, tensors)
        return tensors
    with _open_safetensors(path) as file:
        return _only_tensors(path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)


def read_header(path: Path) -> Header:
    """What is in a file, without its values. Raises CheckpointError as `read_tensors`."""
    if file_kind(path) == "safetensors":
        return _safetensors_header(path)
    tensors = _only_tensors(path, read_pickle(path, device="meta"))
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where it is missing or no such thing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, so it is not (a part of) a diffusers folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


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
        tensors = {name: _tensor_info(one, size) for name, one in content.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not tensors:
        raise CheckpointError(f"{path} holds no weights")
    return Header(tensors, metadata)


def _tensor_info(entry: Mapping[str, Any], size: int) -> TensorInfo:
    """One entry of a header, held against the `size` of the data behind it. Raises ValueError."""
    dtype, width = _DTYPES.get(entry["dtype"], (str(entry["dtype"]), None))
    info, (begin, end) = TensorInfo(dtype, tuple(entry["shape"])), entry["data_offsets"]
    if not all(isinstance(number, int) and number >= 0 for number in (*info.shape, begin, end)):
        raise ValueError("its header has sizes that are no numbers")
    if end > size:
        raise ValueError("it is shorter than its header says")
    if width is not None and end - begin != info.elements * width:
        raise ValueError("its header contradicts itself")
    return info


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


def read_pickle(path: Path, device: str = "cpu", allowed: Sequence[type] = ()) -> Mapping[Any, Any]:
    """The dictionary of weights in a pickle; on the device "meta" without reading their values.

    `allowed`: classes that the file may hold beside tensors and plain containers.
    """
    import torch

    is_zip = file_kind(path) == "zip"
    if is_zip:
        _check_archive(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            placeholders: list[Any] = [(_placeholder(name), name) for name in _foreign_names(path)] if is_zip else []
        with torch.serialization.safe_globals([*allowed, *placeholders]):
            content = torch.load(path, map_location=device, weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_why_unpicklable(path, error)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds {type(content).__name__}, not a dictionary of weights")
    return next((content[key] for key in _STATE_DICTS if isinstance(content.get(key), Mapping)), content)


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        raise CheckpointError(f"{path} is cut short: fetch or copy it again") from None
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise CheckpointError(f"{path} is a TorchScript program, not weights alone: get the model's state dict, best as .safetensors")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is a compressed archive, which torch.save never makes: unpack it, or get the model as .safetensors")


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse what is no plain array of numbers, and numbers that are not in the file."""
    import torch

    odd = [n for n, t in tensors.items() if t.layout is not torch.strided or t.is_quantized or t.is_meta]
    if odd:
        raise CheckpointError(f"{path} has tensors that are sparse, quantised or without values: {key_names.summary(odd)}")
    claimed, size = sum(tensor.nbytes for tensor in tensors.values()), path.stat().st_size
    if claimed > _MAX_GROWTH * size:
        raise CheckpointError(f"{path} is refused: its tensors claim {claimed:,} bytes, and the file has {size:,}")


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
    short = name.rpartition(".")[2]
    if (container := _CONTAINERS.get(short)) is not None:
        return type(short, (), {"__module__": __name__, "__new__": lambda cls, *args: container()})
    return type(short, (_Inert,), {"__module__": __name__})


def _why_unpicklable(path: Path, error: Exception) -> str:
    text = str(error)
    if "GLOBAL" in text:  # "Unsupported global: GLOBAL os.system was not an allowed global by default ..."
        name = text.split("GLOBAL", 1)[1].split()[0]
        reason = f"it asks for {name}, which weights never need"
    else:
        reason = "it is not a plain dictionary of weights, or it is damaged"
    return f"{path} is refused: {reason}; nothing of it was run. Get the model as .safetensors"
