"""Large canvases in bounded memory: first stages and denoising networks work on overlapping tiles, whose results are blended.

Owns: where tiles lie, their weights, and the two places where they are used. Neighbours overlap by at least what was asked for. In the
outer quarters of an overlap one tile counts alone, between them the weights change over along sin^2; they are differences of such ramps,
so they are never negative and add up to one. The quarters keep what a tile's border did to its pixels out of the result: if the network
looks no further than a quarter of the overlap, the tiled result is the untiled one.

Real networks look further, and so differ. GroupNorm takes mean and spread over the tile instead of the whole picture, which shifts tones
from tile to tile; attention sees its own tile only. Larger tiles differ less, and a tile should not be smaller than the pictures the
network was trained on. The shipped shapes autoencoder (trained at 256, attention in the middle), a scene of 512x512 with an overlap of 64:
decoded in tiles of 384 it differs from the whole by 1.6 levels of 255 in the mean (42 dB), in tiles of 256 by 4.5 (30 dB), of 128 with
an overlap of 32 by 6.7 (25 dB). What that costs in fidelity to the picture, encoded and decoded: 35.4, 34.3 and 32.5 dB; whole 35.6.

Nearly all of it is GroupNorm's: with mean and spread of the whole picture given to every norm, tiles of 256 differ by 0.13 levels (59 dB)
and tiles of 384 by 0.06 (67 dB), attention and the tiles' borders included. But the statistics of a norm depend on those of all norms
before it, so that to have them in the memory of one tile takes a pass over all tiles for each of the decoder's 18 norms. Cheaper guesses
are no way out: statistics pooled from the tiles, refined in 1, 2, 3, 4 and 6 passes, gave 40, 44, 37, 39 and 36 dB (33 without), those
of a latent shrunk to one tile 34.

Memory of a KL autoencoder of factor 8 and base width 32 decoding 1024x1024 in float32 with an overlap of 64 (rise of the process's peak):
924 MB whole, 343 MB in tiles of 512, 152 MB in tiles of 256, nearly all of it for one tile.

Denoising in tiles is MultiDiffusion (arXiv:2302.08113: in every step the mean of what overlapping windows want) with weights that fall
off towards a window's border, as in Mixture of Diffusers (arXiv:2302.02412). The way that latent diffusion published,
`split_input_params`, with its own weights, is in `ldm.models.diffusion.patchwise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from ldm.util import UserError

Window = tuple[Any, slice, slice]  # index of a tile: [..., rows, columns]


@dataclass(frozen=True)
class Tiling:
    """Size of tiles, in pixels of the image."""

    tile: int  # side
    overlap: int  # that neighbours share at least

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise UserError(f"tiles of {self.tile} pixels cannot overlap by {self.overlap}: use 0 or more, and less than the tile")

    def divided(self, factor: int) -> Tiling:
        """The same in latent pixels, of which one is `factor` pixels wide. Raises UserError when it does not come out even."""
        for name, value in (("tile", self.tile), ("overlap", self.overlap)):
            if value % factor:
                near = sorted({max(value // factor, int(name == "tile")) * factor, (value // factor + 1) * factor})
                raise UserError(f"{name} {value} must be a multiple of {factor}: use {' or '.join(map(str, near))}")
        return Tiling(self.tile // factor, self.overlap // factor)


# -- where tiles lie, and what they count --------------------------------------------------------------------------------
def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along a side: as few as cover it, spread evenly, the last one flush with the end.

    They are multiples of whatever divides size, tile and overlap.
    """
    last, step = size - tile, tile - overlap
    if last <= 0:
        return [0]
    n, unit = math.ceil(last / step), math.gcd(last, step)
    return [i * last // (n * unit) * unit for i in range(n + 1)]


def tile_weights(starts: list[int], tile: int, size: int) -> Tensor:
    """Weight of every pixel of a side in every tile: (tiles, size), columns add up to 1."""
    place = torch.arange(size) + 0.5
    ramps = [torch.ones(size)]
    for before, start in pairwise(starts):
        overlap = before + tile - start
        if overlap == 0:
            ramps.append((place > start).float())
            continue
        way = ((place - start) / overlap * 2 - 0.5).clamp(0, 1)  # 0 and 1 in the outer quarters
        ramps.append(torch.sin(way * math.pi / 2) ** 2)
    ramps.append(torch.zeros(size))
    stacked = torch.stack(ramps)
    return stacked[:-1] - stacked[1:]


def blend_tiles(x: Tensor, tiling: Tiling, run: Callable[[Window], Tensor]) -> Tensor:
    """`run(window)` for windows all over x (B, C, H, W), blended into one (B, C', H s, W s); `tiling` is in pixels of x.

    s is the factor by which `run` enlarges or (1 / s) shrinks a tile. Memory: the result, and what `run` needs for one tile.
    """
    sides = x.shape[-2:]
    tile = [min(tiling.tile, side) for side in sides]
    starts = [tile_starts(side, size, tiling.overlap) for side, size in zip(sides, tile, strict=True)]
    total: Tensor | None = None
    for (i, top), (j, left) in product(*map(enumerate, starts)):
        out = run((..., slice(top, top + tile[0]), slice(left, left + tile[1])))
        if total is None:
            scale = _scale(tile, out)
            grid = [_Axis.scaled(*each, scale) for each in zip(starts, tile, sides, strict=True)]
            total = out.new_zeros(*out.shape[:-2], *(axis.size for axis in grid), dtype=torch.promote_types(out.dtype, torch.float32))
        (rows, tall), (columns, wide) = grid[0].part(i), grid[1].part(j)
        total[..., rows, columns] += out * (tall[:, None] * wide).to(total)
    assert total is not None
    return total.to(out.dtype)


@dataclass(frozen=True)
class _Axis:
    """The tiles along one side of the result."""

    starts: list[int]
    tile: int
    size: int
    weights: Tensor  # (tiles, size)

    @classmethod
    def scaled(cls, starts: list[int], tile: int, size: int, scale: Fraction) -> _Axis:
        numbers = [n * scale for n in (*starts, tile, size)]
        if any(n.denominator > 1 for n in numbers):
            shrinks = scale.denominator
            raise UserError(f"{size} pixels in tiles of {tile} from {starts} on cannot be shrunk: all must be multiples of {shrinks}")
        *starts, tile, size = map(int, numbers)
        return cls(starts, tile, size, tile_weights(starts, tile, size))

    def part(self, i: int) -> tuple[slice, Tensor]:
        place = slice(self.starts[i], self.starts[i] + self.tile)
        return place, self.weights[i, place]


def _scale(tile: list[int], out: Tensor) -> Fraction:
    scales = {Fraction(got, given) for got, given in zip(out.shape[-2:], tile, strict=True)}
    scale = min(scales)
    if len(scales) > 1 or 1 not in (scale.numerator, scale.denominator):
        raise UserError(f"a tile of {tile[0]}x{tile[1]} became {out.shape[-2]}x{out.shape[-1]}: its sides must be multiples of the factor")
    return scale


# -- first stages --------------------------------------------------------------------------------------------------------
@contextmanager
def tiled(model: Any, tiling: Tiling | None) -> Iterator[None]:
    """Inside, the first stage of `model` (or `model`, if it is one) encodes and decodes in tiles; None: as ever.

    It is the attribute `tiling` of the first stage, which can also be set for good.
    """
    stage = getattr(model, "first_stage_model", model)
    if not hasattr(stage, "tiling"):
        raise UserError(f"{type(stage).__name__} cannot work in tiles: it is not a FirstStage")
    before, stage.tiling = stage.tiling, tiling
    try:
        yield
    finally:
        stage.tiling = before


def tiled_encode(first_stage: Any, x: Tensor, tile: int, overlap: int) -> Any:
    """What `first_stage.encode(x)` gives, in tiles; sizes in pixels of the image, multiples of the first stage's factor.

    Of a KL autoencoder the moments of the posterior are blended, of a VQ autoencoder the latents before quantisation.
    """
    with tiled(first_stage, Tiling(tile, overlap)):
        return first_stage.encode(x)


def tiled_decode(first_stage: Any, z: Tensor, tile: int, overlap: int, **options: Any) -> Tensor:
    """What `first_stage.decode(z, **options)` gives, in tiles; sizes in latent pixels."""
    factor = getattr(first_stage, "factor", 1)
    with tiled(first_stage, Tiling(tile * factor, overlap * factor)):
        return first_stage.decode(z, **options)


# -- denoising networks --------------------------------------------------------------------------------------------------
class TiledDenoiser:
    """A diffusion model whose network sees one tile at a time. Any sampler takes it in the place of the model.

    Everything but `apply_model` is the model's. Conditioning that has the size of x is cut along with it, the rest goes to every tile:
    a text describes each tile, so it should fit everywhere. Sizes are in latent pixels, multiples of what the network halves its input by.
    """

    def __init__(self, model: Any, tile: int, overlap: int) -> None:
        if getattr(model, "cond_stage_key", None) == "coordinates_bbox":
            raise UserError("bounding boxes name places in the whole picture, so they cannot condition tiles: draw without tiles")
        self.whole, self.tiles = model, Tiling(tile, overlap)

    def __getattr__(self, name: str) -> Any:
        if name == "whole":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.whole, name)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The network's output for x (B, C, h, w) at t (B,)."""
        size = tuple(x_noisy.shape[-2:])
        return blend_tiles(x_noisy, self.tiles, lambda window: self.whole.apply_model(x_noisy[window], t, _cut(cond, window, size)))


def _cut(cond: Any, window: Window, size: tuple[int, ...]) -> Any:
    """The part of a conditioning that belongs to a tile: maps (B, C, h, w) are cut; tokens, vectors and classes are not."""
    if isinstance(cond, Mapping):
        return {key: _cut(value, window, size) for key, value in cond.items()}
    if isinstance(cond, (list, tuple)):
        return [_cut(value, window, size) for value in cond]
    if not isinstance(cond, Tensor) or cond.ndim != 4:
        return cond
    if tuple(cond.shape[-2:]) != size:
        raise UserError(f"a condition of {tuple(cond.shape[-2:])} cannot be cut into tiles along with a latent of {size}")
    return cond[window]
