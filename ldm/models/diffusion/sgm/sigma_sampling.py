"""Noise levels of a training batch: draws from the global generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.util import instantiate_from_config

__all__ = ["DiscreteSampling", "EDMSampling"]


class EDMSampling:
    """log sigma ~ N(p_mean, p_std^2) (arXiv:2206.00364, Table 1)."""

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2) -> None:
        self.p_mean, self.p_std = p_mean, p_std

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """(n_samples,); `rand`: standard normal numbers to use instead of a draw."""
        normal = torch.randn(n_samples, device="cpu") if rand is None else rand
        return (self.p_mean + self.p_std * normal).exp()


class DiscreteSampling:
    """One of the `num_idx` levels of a discretisation, all equally likely."""

    def __init__(self, discretization_config: Any, num_idx: int, do_append_zero: bool = False, flip: bool = True) -> None:
        self.num_idx = num_idx
        self.sigmas = instantiate_from_config(discretization_config)(num_idx, do_append_zero=do_append_zero, flip=flip)

    def idx_to_sigma(self, idx: Tensor) -> Tensor:
        """The levels at `idx`."""
        return self.sigmas[idx]

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """(n_samples,); `rand`: indices to use instead of a draw."""
        return self.idx_to_sigma(torch.randint(0, self.num_idx, (n_samples,), device="cpu") if rand is None else rand)
