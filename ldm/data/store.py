"""An array on the disk that is computed once, part by part: whole or not there, and gone on with after an interruption.

Owns the files `<name>.npy` (values), `<name>.json` (what is kept beside each row) and their unfinished forms. Knows no model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.util import ConfigError

log = logging.getLogger(__name__)

Part = tuple[np.ndarray, Sequence[Any]]  # float16 (n, ...), and what is kept beside each row ([] for nothing)

_KEEP_EVERY = 30.0  # seconds of work that an interruption may lose, for sets of which a twentieth takes longer

# Parameters of a network that do not change what it encodes to; weights count by content, not by file name.
_IRRELEVANT = ("ckpt_path", "lossconfig", "monitor", "ignore_keys", "device", "freeze")


class ArrayStore:
    """Rows of float16, (N, ...), mapped into memory. `notes`: what is kept beside each row, or None."""

    def __init__(self, path: Path, total: int, what: str) -> None:
        self.path, self.total, self.what = path, total, what
        self.partial, self.progress = path.with_suffix(".partial.npy"), path.with_suffix(".partial.json")
        self.notes_path = path.with_suffix(".json")

    def filled(self, batches: Callable[[int], Iterator[Part]]) -> tuple[np.ndarray, list[Any] | None]:
        """(rows, notes), computed with `batches(first row)` as far as they are not there. One process at a time."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                if not self.path.exists():  # or another process was faster
                    self._fill(batches)
        notes = json.loads(self.notes_path.read_text(encoding="utf-8")) if self.notes_path.exists() else None
        return np.load(self.path, mmap_mode="r"), notes

    def _fill(self, batches: Callable[[int], Iterator[Part]]) -> None:
        done, notes, rows = self._left()
        log.info("encoding %d of %d %s into %s", self.total - done, self.total, self.what, self.path)
        started, start, shown = time.monotonic(), done, done
        kept = started
        for values, beside in batches(done):
            if rows is None:
                rows = np.lib.format.open_memmap(self.partial, mode="w+", dtype=np.float16, shape=(self.total, *values.shape[1:]))
            rows[done : done + len(values)] = values
            done, notes = done + len(values), notes + list(beside)
            due = done - shown >= max(self.total // 20, len(values)) or time.monotonic() - kept >= _KEEP_EVERY
            if due or done == self.total:
                shown, kept = done, time.monotonic()
                rows.flush()  # type: ignore[attr-defined]
                write_whole(self.progress, json.dumps({"done": done, "notes": notes}))
                rate = (done - start) / max(time.monotonic() - started, 1e-9)
                log.info("encoded %d of %d, %.0f %s/s, %.0f s left", done, self.total, rate, self.what, (self.total - done) / rate)
        if done != self.total:
            raise ConfigError(
                f"{self.path}: only {done} of {self.total} {self.what} were encoded, and then there were no more. Has the data set "
                "changed meanwhile? What is done is kept: start again"
            )
        if notes:
            write_whole(self.notes_path, json.dumps(notes))
        os.replace(self.partial, self.path)
        self.progress.unlink(missing_ok=True)

    def _left(self) -> tuple[int, list[Any], np.ndarray | None]:
        """What an earlier attempt left: rows done, their notes, and the file. What is of no use is not left to a later attempt."""
        try:
            state = json.loads(self.progress.read_text(encoding="utf-8"))
            rows = np.load(self.partial, mmap_mode="r+")
            if len(rows) == self.total and 0 <= state["done"] <= self.total:
                return state["done"], state["notes"], rows
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.progress.unlink(missing_ok=True)  # or it would be taken for that of the new file
        return 0, [], None


def as_float16(values: torch.Tensor, what: str) -> np.ndarray:
    """float16 on the CPU; an error when that loses a value."""
    array = values.float().cpu().numpy().astype(np.float16)
    if not np.isfinite(array).all():
        raise ConfigError(f"{what} gives values that are no numbers or beyond float16: are its weights sound?")
    return array


def network_key(config: Mapping[str, Any]) -> list[Any]:
    """What the values of a network depend on apart from its weights: its class and parameters."""
    params = {key: value for key, value in (config.get("params") or {}).items() if key not in _IRRELEVANT}
    return [config["target"], params]


def file_digest(path: Path) -> bytes:
    """SHA-256 of a file's content; of a folder, that of all its files."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return hashlib.sha256(b"".join(str(file.relative_to(path)).encode() + file_digest(file) for file in files)).digest()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.digest()


def pick_device(device: str) -> torch.device:
    """The device of this name; `auto` takes an accelerator when there is one."""
    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the platform can lock files."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
