"""Large pictures in overlapping patches: network and first stage see one patch at a time, the results are blended.

A model works patch-wise when it has `split_input_params`, a dict set from outside; `del model.split_input_params` ends it:

    ks, stride              size of a patch and step between patches, (rows, columns); in latent pixels for the network and for decoding,
                            in image pixels for encoding
    patch_distributed_vq    also encode and decode patch-wise (default False)
    vqf                     downsampling factor of the first stage
    clip_min_weight, clip_max_weight            bounds of a pixel's weight, its distance from the border of the patch (0.01, 0.5)
    tie_braker, clip_min_tie_weight, clip_max_tie_weight    weigh patches too, by their distance from the border of the picture

`original_image_size` is written into the dict when a picture is encoded. Where the step does not divide the rest, one more patch lies
flush with the border. The functions that take a `model` first are methods of LatentDiffusion. Knows no schedule and no sampler.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import ConfigError, plain

log = logging.getLogger(__name__)

Pair = tuple[int, int]
Window = tuple[Any, slice, slice]  # index of a patch: [..., rows, columns]
_WRITTEN = ("original_image_size",)  # entries that are results, not options


@dataclass(frozen=True)
class SplitParams:
    """`split_input_params` with every entry present and checked."""

    ks: Pair
    stride: Pair
    vqf: int = 1
    patch_distributed_vq: bool = False
    tie_braker: bool = False
    clip_min_weight: float = 0.01
    clip_max_weight: float = 0.5
    clip_min_tie_weight: float = 0.01
    clip_max_tie_weight: float = 0.5

    @classmethod
    def read(cls, given: Any) -> SplitParams:
        """From the dict; raises ConfigError for what is missing, unknown or impossible."""
        given = {key: value for key, value in plain(given).items() if key not in _WRITTEN}
        known = cls.__dataclass_fields__
        if unknown := sorted(set(given) - set(known)):
            raise ConfigError(f"split_input_params does not know {', '.join(unknown)}; it takes {', '.join(known)}")
        needed = ["ks", "stride", *(["vqf"] if given.get("patch_distributed_vq") else [])]
        if missing := [key for key in needed if key not in given]:
            raise ConfigError(f"split_input_params lacks {', '.join(missing)}")
        params = cls(**{**given, "ks": _pair("ks", given["ks"]), "stride": _pair("stride", given["stride"])})
        if any(s > k for s, k in zip(params.stride, params.ks, strict=True)):
            raise ConfigError(
                f"split_input_params: stride {params.stride} leaves gaps between patches of {params.ks}: it may be ks at most"
            )
        if min(params.clip_min_weight, params.clip_min_tie_weight) <= 0:
            raise ConfigError("split_input_params: clip_min_weight and clip_min_tie_weight must be above 0, or borders get no value at all")
        return params


def _pair(name: str, value: Any) -> Pair:
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) and n > 0 for n in value)):
        raise ConfigError(f"split_input_params: {name} {value!r} must be two positive whole numbers, (rows, columns)")
    return (value[0], value[1])


def split_params(model: Any) -> SplitParams | None:
    """The model's `split_input_params`, or None when it works on the whole."""
    given = getattr(model, "split_input_params", None)
    return SplitParams.read(given) if given else None


def _needed(model: Any) -> SplitParams:
    params = split_params(model)
    if params is None:
        raise ConfigError("patches need split_input_params on the model, with at least ks and stride")
    return params


# -- weights -----------------------------------------------------------------------------------------------------------
def meshgrid(h: int, w: int) -> Tensor:
    """Row and column of every pixel, int64 (h, w, 2)."""
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([rows, columns], dim=-1)


def delta_border(h: int, w: int) -> Tensor:
    """Distance of every pixel from the nearest border, (h, w): 0 on the border, 0.5 in the middle; heights and widths count as 1."""
    place = meshgrid(h, w) / torch.tensor([max(h - 1, 1), max(w - 1, 1)])  # (h, w, 2) in [0, 1]
    return torch.minimum(place, 1 - place).amin(dim=-1)


def get_weighting(model: Any, h: int, w: int, Ly: int, Lx: int, device: torch.device | str) -> Tensor:
    """Weight of every pixel of Ly x Lx patches of h x w: (1, h w, Ly Lx); with `tie_braker` also by the place of the patch."""
    params = _needed(model)
    pixels = delta_border(h, w).clip(params.clip_min_weight, params.clip_max_weight).reshape(1, h * w, 1)
    patches = torch.ones(1, 1, Ly * Lx)
    if params.tie_braker:
        patches = delta_border(Ly, Lx).clip(params.clip_min_tie_weight, params.clip_max_tie_weight).reshape(1, 1, Ly * Lx)
    return (pixels * patches).to(device)


def get_fold_unfold(
    model: Any, x: Tensor, kernel_size: Pair, stride: Pair, uf: int = 1, df: int = 1
) -> tuple[nn.Fold, nn.Unfold, Tensor, Tensor]:
    """Fold, unfold, normalisation (1, 1, H, W) and weights (1, 1, kh, kw, L) for the patches of x (B, C, h, w).

    The output's sides are those of x times `uf` or divided by `df`. Kept for code that cuts and joins by itself; patches lie on the
    regular grid only, so pixels beyond the last one have the normalisation 0.
    """
    if uf > 1 and df > 1:
        raise ConfigError(f"patches are either enlarged or shrunk: uf {uf} and df {df} were both given")
    grid = [(size - k) // s + 1 for size, k, s in zip(x.shape[-2:], kernel_size, stride, strict=True)]
    out_size, out_kernel, out_stride = ([n * uf // df for n in pair] for pair in (x.shape[-2:], kernel_size, stride))
    unfold = nn.Unfold(kernel_size=tuple(kernel_size), stride=tuple(stride))
    fold = nn.Fold(output_size=tuple(out_size), kernel_size=tuple(out_kernel), stride=tuple(out_stride))
    weights = get_weighting(model, *out_kernel, *grid, x.device).to(x.dtype)  # (1, kh kw, L)
    return fold, unfold, fold(weights).view(1, 1, *out_size), weights.view(1, 1, *out_kernel, grid[0] * grid[1])


# -- cutting and blending ----------------------------------------------------------------------------------------------
def _starts(size: int, k: int, step: int) -> list[int]:
    """First pixels of the patches along one side; the last patch ends where the side does."""
    return [*range(0, size - k, step), size - k]


def _window(top: int, left: int, kh: int, kw: int) -> Window:
    return (..., slice(top, top + kh), slice(left, left + kw))


def blend(model: Any, x: Tensor, run: Callable[[Window], Tensor], uf: int = 1, df: int = 1) -> Tensor:
    """Weighted mean of `run(window)` over the patches `x[window]` of x (B, C, h, w).

    The sides of what `run` gives are those of the patch times `uf` or divided by `df`; so are those of the result.
    """
    params = _needed(model)
    h, w = x.shape[-2:]
    kh, kw = min(params.ks[0], h), min(params.ks[1], w)
    rows, columns = _starts(h, kh, params.stride[0]), _starts(w, kw, params.stride[1])
    if any(n % df for n in (h, w, kh, kw, *rows, *columns)):
        raise ConfigError(
            f"cannot encode {h}x{w} pixels in patches of {kh}x{kw} every {params.stride[0]}x{params.stride[1]}: "
            f"all of these must be multiples of vqf, the first stage's factor {df}"
        )
    log.debug("%dx%d in %d patches of %dx%d", h, w, len(rows) * len(columns), kh, kw)
    size = (kh * uf // df, kw * uf // df)
    weights = get_weighting(model, *size, len(rows), len(columns), x.device).to(x.dtype).view(*size, -1)
    total: Tensor | float = 0.0
    norm = x.new_zeros(h * uf // df, w * uf // df)
    for i, (top, left) in enumerate(product(rows, columns)):
        out = run(_window(top, left, kh, kw))
        if tuple(out.shape[-2:]) != size:
            raise ConfigError(
                f"a patch of {kh}x{kw} became {out.shape[-2]}x{out.shape[-1]}, not {size[0]}x{size[1]}: vqf must be the factor"
            )
        if i == 0:
            total = torch.zeros(*out.shape[:2], *norm.shape, dtype=torch.result_type(out, weights), device=x.device)
        place = _window(top * uf // df, left * uf // df, *size)
        total[place] += out * weights[..., i]
        norm[place] += weights[..., i]
    return total / norm


# -- the three places where a model works patch-wise -------------------------------------------------------------------
def apply_network(model: Any, x: Tensor, t: Tensor, cond: Mapping[str, Any], return_ids: bool = False) -> Tensor:
    """The network's output for x (B, C, h, w) at t (B,). Of the conditioning, `c_concat` is cut as x is, the rest goes to every patch."""
    if return_ids:
        raise ConfigError("codebook indices cannot be blended over patches: drop return_ids or split_input_params")
    if model.cond_stage_key == "coordinates_bbox":
        raise ConfigError("bounding boxes name places in the whole picture, so they cannot condition patches: drop split_input_params")
    for c in cond.get("c_concat") or []:
        if c.shape[-2:] != x.shape[-2:]:
            raise ConfigError(f"c_concat of {tuple(c.shape[-2:])} cannot be cut into patches along with an input of {tuple(x.shape[-2:])}")

    def run(window: Window) -> Tensor:
        cut = {**cond, "c_concat": [c[window] for c in cond["c_concat"]]} if cond.get("c_concat") else cond
        out = model.model(x[window], t, **cut)
        return out[0] if isinstance(out, tuple) else out

    return blend(model, x, run)


def encode(model: Any, x: Tensor) -> Any:
    """`first_stage_model.encode` of x (B, 3, H, W). Of Gaussian posteriors the moments are blended."""
    first, params = model.first_stage_model, split_params(model)
    if params is None or not params.patch_distributed_vq:
        return first.encode(x)
    model.split_input_params["original_image_size"] = tuple(x.shape[-2:])
    gaussian = False

    def run(window: Window) -> Tensor:
        nonlocal gaussian
        out = first.encode(x[window])
        if gaussian := isinstance(out, DiagonalGaussianDistribution):
            return out.parameters
        if not isinstance(out, Tensor):
            raise ConfigError(f"{type(first).__name__} cannot encode patch-wise: it gives {type(out).__name__}, and not a latent")
        return out

    z = blend(model, x, run, df=params.vqf)
    return DiagonalGaussianDistribution(z) if gaussian else z


def decode(model: Any, z: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """`run`, the first stage's decoding, of z (B, C, h, w)."""
    params = split_params(model)
    if params is None or not params.patch_distributed_vq:
        return run(z)
    return blend(model, z, lambda window: run(z[window]), uf=params.vqf)
