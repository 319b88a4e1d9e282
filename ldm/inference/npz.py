"""All pictures of a run in one .npz file, as evaluation programs read it: `arr_0`, uint8 (N, H, W, 3). Knows no model and no torch."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.inference.output import move_without_replacing, told
from ldm.util import UserError


def write_npz(folder: Path, pictures: Sequence[Path], once: bool = False) -> Path:
    """Pack PNG files of one size, picture by picture, into the next free `NxHxWx3-samples.npz` of `folder`, whole or not at all.

    `once`: where one of these files holds the same pictures already, that is the one, and no other is written.
    """
    first = _read(pictures[0])
    shape = (len(pictures), *first.shape)
    with told(folder):
        return _pack(folder, pictures, first, shape, once)


def _pack(folder: Path, pictures: Sequence[Path], first: np.ndarray, shape: tuple[int, ...], once: bool) -> Path:
    handle, temporary = tempfile.mkstemp(prefix=".part-", dir=folder)
    os.close(handle)
    try:
        with zipfile.ZipFile(temporary, "w", allowZip64=True) as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)  # type: ignore[arg-type]
            for path in pictures:
                pixels = _read(path)
                if pixels.shape != first.shape:
                    raise UserError(f"{path} has another size than {pictures[0]}: an .npz file holds pictures of one size")
                array.write(pixels.tobytes())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        return _move_to_free_name(temporary, folder, "x".join(map(str, shape)) + "-samples", once)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _move_to_free_name(temporary: str, folder: Path, stem: str, once: bool) -> Path:
    content, number = _checksum(temporary), 0
    while True:
        path = folder / (f"{stem}.npz" if number == 0 else f"{stem}-{number}.npz")
        if move_without_replacing(temporary, path) or (once and _checksum(path) == content):
            return path
        number += 1


def _checksum(path: str | Path) -> tuple[int, int] | None:
    """CRC and length of the array in an .npz file; None for a file that holds none."""
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo("arr_0.npy")
            return entry.CRC, entry.file_size
    except (zipfile.BadZipFile, KeyError, OSError):
        return None
