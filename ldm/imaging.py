"""Pictures in and out of tensors: pure helpers over numpy and PIL.

Owns the conversions between [-1, 1] floats and uint8, the grid, and how a file from anywhere (rotated by EXIF, with alpha, in
palette or 16-bit form, of any size) becomes an RGB picture of a legal size. Knows no model; writes no files.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.util import UserError

FIT_MODES = ("crop", "pad", "stretch")


def to_uint8(x: Any) -> np.ndarray:
    """Tensor or array (..., C, H, W) in [-1, 1] -> uint8 (..., H, W, C); values outside are clamped, the rest rounded."""
    array = np.asarray(x.detach().float().cpu() if hasattr(x, "detach") else x, dtype=np.float32)
    pixels = (np.clip(array, -1.0, 1.0) + 1.0) * 127.5
    return np.ascontiguousarray(np.moveaxis(np.rint(pixels).astype(np.uint8), -3, -1))


def from_uint8(image: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, C) -> float32 (..., H, W, C) in [-1, 1]."""
    return image.astype(np.float32) / 127.5 - 1.0


def to_tensor(image: np.ndarray | Image.Image) -> Any:
    """One picture, uint8 (H, W, C) or PIL -> float32 tensor (1, C, H, W) in [-1, 1]."""
    import torch

    pixels = from_uint8(np.asarray(image))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]


def image_grid(images: list[np.ndarray], columns: int, padding: int = 2) -> np.ndarray:
    """uint8 pictures (H, W, C), row by row on black, in cells of the largest height and width, `padding` pixels between and around."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    if columns < 1:
        raise ValueError(f"a grid needs at least one column, not {columns}")
    columns = min(columns, len(images))
    height, width, channels = (max(sizes) for sizes in zip(*(image.shape for image in images), strict=True))
    rows = math.ceil(len(images) / columns)
    page = np.zeros((rows * (height + padding) + padding, columns * (width + padding) + padding, channels), np.uint8)
    for i, image in enumerate(images):
        top = (i // columns) * (height + padding) + padding
        left = (i % columns) * (width + padding) + padding
        page[top : top + image.shape[0], left : left + image.shape[1]] = image
    return page


def legal_neighbours(size: int, multiple: int) -> tuple[int, ...]:
    """The multiples next to `size`: one if `size` is legal, else the one below (if above 0) and the one above."""
    if size > 0 and size % multiple == 0:
        return (size,)
    below = max(size, 0) // multiple * multiple
    return tuple(n for n in (below, below + multiple) if n > 0)


def nearest_legal(size: int, multiple: int) -> int:
    """The positive multiple of `multiple` nearest to `size`, the lower one where two are as near."""
    return min(legal_neighbours(size, multiple), key=lambda n: abs(n - size))


def load_image(path: str | Path, ground: str = "white") -> Image.Image:
    """Read a picture as RGB, turned upright by its EXIF tag, transparency laid on `ground`, a color.

    Raises `UserError` in one line for a missing, unreadable, empty or absurdly large file.
    """
    try:
        with Image.open(path) as file:
            file.load()
            return _as_rgb(ImageOps.exif_transpose(file), ground)
    except FileNotFoundError:
        raise UserError(f"image {str(path)!r} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"image {str(path)!r} is a folder: give the file in it") from None
    except PermissionError:
        raise UserError(f"image {str(path)!r} may not be read: check its permissions") from None
    except UnidentifiedImageError:
        raise UserError(f"image {str(path)!r} is not a picture that can be read: use PNG, JPEG, WebP, BMP or TIFF") from None
    except Image.DecompressionBombError:
        raise UserError(f"image {str(path)!r} is too large: at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's errors for damaged files
        raise UserError(f"image {str(path)!r} is damaged: {error}") from None


def _as_rgb(image: Image.Image, ground: str) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # 16-bit and float gray: scaled to 8 bits, not clipped
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode != "F" or values.max(initial=0.0) > 255.0 else 255.0 if values.max(initial=0.0) > 1.0 else 1.0
        return Image.fromarray(np.rint(np.clip(values / top, 0.0, 1.0) * 255.0).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba).convert("RGB")
    return image.convert("RGB")


def fit_image(image: Image.Image, width: int, height: int, mode: str = "crop") -> Image.Image:
    """Bring a picture to `width` x `height`: `crop` covers and cuts the middle, `pad` fits inside on gray, `stretch` distorts."""
    if mode not in FIT_MODES:
        raise UserError(f"unknown fit {mode!r}: use one of {', '.join(FIT_MODES)}")
    size = (width, height)
    if image.size == size:
        return image
    if mode == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if mode == "pad":
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=(128, 128, 128))
    return image.resize(size, Image.Resampling.LANCZOS)
