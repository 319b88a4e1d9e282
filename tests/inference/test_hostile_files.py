"""Files that are made to harm, or that went wrong on the way: one clear line, nothing run, no memory taken."""

from __future__ import annotations

import collections
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.inference.checkpoint import read_state_dict, save_weights
from ldm.inference.weights.families import identify
from ldm.util import CheckpointError


def refused(path: Path, message: str, read: Callable[[Path], Any] = read_state_dict) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)


def zipped(path: Path, program: bytes) -> Path:
    """A checkpoint in torch's form with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": program, "version": b"3\n", "byteorder": b"little"}.items():
            archive.writestr(f"archive/{name}", content)
    return path


# -------------------------------------------------------------------------------------------------------------- gadgets
def call(module: str, name: str, *words: str) -> bytes:
    """A pickle that calls a function with text."""
    arguments = b"".join(b"X" + struct.pack("<I", len(word)) + word.encode() for word in words)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + arguments + b"tR."


GADGETS = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("subprocess", "Popen"),
    ("runpy", "run_path"),
    ("pickle", "loads"),
    ("torch", "load"),
    ("torch.serialization", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.hub", "load"),
    ("torch.jit", "load"),
    ("torch._dynamo.debug_utils", "run_fwd_maybe_bwd"),
    ("torch.utils.data.datapipes.utils.decoder", "basichandlers"),
    ("functools", "partial"),
    ("operator", "attrgetter"),
    ("importlib", "import_module"),
    ("timeit", "timeit"),
    ("pathlib2", "Path"),
    ("numpyx", "load"),
    ("ldmx.util", "run"),
]


@pytest.mark.parametrize(("module", "name"), GADGETS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_gadgets(tmp_path: Path, module: str, name: str, form: str) -> None:
    target = tmp_path / "owned"
    program, path = call(module, name, f"mkdir {target}"), tmp_path / "m.ckpt"
    if form == "zip":
        zipped(path, program)
    else:
        path.write_bytes(program)
    refused(path, "refused: it asks .*nothing of it was run|refused: it is not a plain dictionary")
    assert not target.exists()


class Call:
    """Asks for a call when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments"), [(np.savetxt, ("owned.txt", [1])), (save_weights, ({"w": torch.zeros(1)}, "owned.safetensors"))]
)
def test_what_bystanders_are_called_with_is_inert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable, arguments: tuple[Any, ...]
) -> None:
    """Names in packages whose settings may stand beside weights become placeholders: they are called, and do nothing."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.zeros(2)}, "beside": Call(function, *arguments)}, "m.ckpt")
    assert list(read_state_dict(tmp_path / "m.ckpt")) == ["w"]
    assert not list(tmp_path.glob("owned*"))
    torch.load("m.ckpt", weights_only=False)
    assert list(tmp_path.glob("owned*")), "this test proves something only if the call would have worked"


def test_containers_beside_the_weights(tmp_path: Path) -> None:
    """Of Lightning's and OmegaConf's settings; their content is put in item by item."""
    from pytorch_lightning.utilities.parsing import AttributeDict

    beside = {"a": collections.defaultdict(list, {"k": [1]}), "b": collections.deque([1, 2]), "c": AttributeDict(lr=1e-4, p=Path("x"))}
    torch.save({"state_dict": {"w": torch.ones(2)}, **beside}, tmp_path / "m.ckpt")
    assert torch.equal(read_state_dict(tmp_path / "m.ckpt")["w"], torch.ones(2))


# ------------------------------------------------------------------------------------------------ forms that are no weights
def test_archives_of_other_kinds(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4000.0)}, tmp_path / "good.ckpt")
    with zipfile.ZipFile(tmp_path / "good.ckpt") as old, zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    refused(tmp_path / "packed.ckpt", "compressed archive")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), str(tmp_path / "program.pt"))
    refused(tmp_path / "program.pt", "TorchScript program, not weights")
    with zipfile.ZipFile(tmp_path / "pictures.ckpt", "w") as archive:
        archive.writestr("a.png", b"x")
    refused(tmp_path / "pictures.ckpt", "damaged or cut short")
    with zipfile.ZipFile(tmp_path / "nested.ckpt", "w") as archive:
        archive.write(tmp_path / "good.ckpt", "archive/data.pkl")
    refused(tmp_path / "nested.ckpt", "refused|damaged")
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as tar:  # as torch.save wrote before 2016
        for name in ("sys_info", "pickle", "storages", "tensors"):
            program = call("os", "system", f"mkdir {tmp_path}/owned")
            entry = tarfile.TarInfo(name)
            entry.size = len(program)
            tar.addfile(entry, io.BytesIO(program))
    (tmp_path / "old.pt").write_bytes(memory.getvalue())
    refused(tmp_path / "old.pt", "not a weights file")
    (tmp_path / "disguised.pt").write_bytes(b"\x80\x02" + memory.getvalue()[2:])
    refused(tmp_path / "disguised.pt", "refused|damaged")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(10**6, 10**6), "claim 4,000,000,000,000 bytes"),
        (torch.sparse_coo_tensor([[0], [0]], [1.0], (10**6, 10**6)), "sparse, quantised or without values: w"),
        (torch.empty(10**6, 10**6, device="meta"), "sparse, quantised or without values: w"),
        (torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8), "sparse, quantised or without values: w"),
        (torch.nn.Linear(1, 1), "refused: it asks to run torch.nn.modules.linear.Linear"),
    ],
)
def test_values_that_are_no_plain_arrays(tmp_path: Path, value: Any, message: str) -> None:
    torch.save({"w": value}, tmp_path / "m.ckpt")
    refused(tmp_path / "m.ckpt", message)


def test_many_names_for_one_tensor_claim_no_more_than_they_may(tmp_path: Path) -> None:
    weight = torch.zeros(100_000)
    torch.save({f"w{i}": weight for i in range(3)}, tmp_path / "tied.ckpt")
    assert len(read_state_dict(tmp_path / "tied.ckpt")) == 3
    torch.save({f"w{i}": weight for i in range(1000)}, tmp_path / "bomb.ckpt")
    refused(tmp_path / "bomb.ckpt", "its tensors claim 400,000,000 bytes")


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_where_programs_keep_the_weights(tmp_path: Path, wrapper: str) -> None:
    torch.save({wrapper: {"w": torch.ones(2)}, "optimizer": {"state": {}}}, tmp_path / "m.pt")
    assert list(read_state_dict(tmp_path / "m.pt")) == ["w"]


# ---------------------------------------------------------------------------------------------------- safetensors headers
def header(path: Path, entry: Any, data: bytes = b"0000") -> Path:
    content = entry if isinstance(entry, bytes) else json.dumps({"w": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F16", "shape": [1], "data_offsets": [0, 4]},
        b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
@pytest.mark.parametrize("read", [read_state_dict, identify])
def test_headers_that_lie(tmp_path: Path, entry: Any, read: Callable[[Path], Any]) -> None:
    refused(header(tmp_path / "m.safetensors", entry), "damaged or cut short", read)
