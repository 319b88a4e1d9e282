"""What a network predicts, and how one prediction turns into another.

With x = sqrt(abar) x0 + sqrt(1 - abar) eps, a network may predict eps, x0, or v = sqrt(abar) eps - sqrt(1 - abar) x0. Pure functions;
`abar` is a number or a tensor that broadcasts against `x`.

Sources: DDPM (arXiv:2006.11239), v (arXiv:2202.00512), min-SNR (arXiv:2303.09556).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.util import UserError

KINDS = ("eps", "x0", "v")
LOSS_WEIGHTS = ("none", "min_snr")


def check_kind(kind: str) -> str:
    """`kind`, or `UserError` unless it is one of `KINDS`."""
    if kind not in KINDS:
        raise UserError(f"parameterization {kind!r} is unknown: use one of {', '.join(KINDS)}")
    return kind


def _roots(abar: float | Tensor) -> tuple[Any, Any]:
    return abar**0.5, (1 - abar) ** 0.5


def to_x0(kind: str, out: Tensor, x: Tensor, abar: float | Tensor) -> Tensor:
    """x0 from the output `out` of a network that predicts `kind` at the noisy x. An eps prediction at abar = 0 says nothing (inf)."""
    if check_kind(kind) == "x0":
        return out
    signal, noise = _roots(abar)
    return (x - noise * out) / signal if kind == "eps" else signal * x - noise * out


def to_eps(kind: str, out: Tensor, x: Tensor, abar: float | Tensor) -> Tensor:
    """eps from the output `out` of a network that predicts `kind` at the noisy x. An x0 prediction at abar = 1 says nothing (nan)."""
    if check_kind(kind) == "eps":
        return out
    signal, noise = _roots(abar)
    return (x - signal * out) / noise if kind == "x0" else signal * out + noise * x


def v_target(x0: Tensor, eps: Tensor, abar: float | Tensor) -> Tensor:
    """v = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv:2202.00512, Sec. 4)."""
    signal, noise = _roots(abar)
    return signal * eps - noise * x0


def target(kind: str, x0: Tensor, eps: Tensor, abar: float | Tensor) -> Tensor:
    """What a network that predicts `kind` should have said."""
    if check_kind(kind) == "v":
        return v_target(x0, eps, abar)
    return x0 if kind == "x0" else eps


def loss_weight(name: str, kind: str, abar: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight of the squared error at noise levels `abar`, same shape as `abar`.

    `none` is 1. `min_snr` (arXiv:2303.09556) is min(SNR, gamma) for x0, that over SNR for eps, and that over SNR + 1 for v. With SNR =
    abar / (1 - abar) the last two need no division by the SNR, so zero terminal SNR is harmless.
    """
    check_kind(kind)
    if name == "none":
        return torch.ones_like(abar)
    if name != "min_snr":
        raise UserError(f"loss weighting {name!r} is unknown: use one of {', '.join(LOSS_WEIGHTS)}")
    if gamma <= 0:
        raise UserError(f"min_snr needs gamma > 0, not {gamma}")
    if kind == "v":
        return torch.minimum(abar, gamma * (1 - abar))
    if kind == "eps":
        return (gamma * (1 - abar) / abar).clamp(max=1.0)
    return (abar / (1 - abar)).clamp(max=gamma)
