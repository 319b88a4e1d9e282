"""The maths of the samplers: derivatives, ancestral steps, multistep coefficients. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampling_util import append_dims

__all__ = ["NoDynamicThresholding", "get_ancestral_step", "linear_multistep_coeff", "to_d", "to_neg_log_sigma", "to_sigma"]


class NoDynamicThresholding:
    """Plain classifier-free guidance (arXiv:2207.12598), as a rule for VanillaCFG."""

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
        """uncond + scale (cond - uncond)."""
        return uncond + scale * (cond - uncond)


def linear_multistep_coeff(order: int, t: Sequence[float], i: int, j: int) -> float:
    """Weight of the derivative at t[i - j] in an Adams-Bashforth step of `order` from t[i] to t[i + 1], for uneven t.

    The integral of a Lagrange polynomial of degree order - 1, by a Gauss-Legendre rule that is exact for it.
    """
    if order - 1 > i:
        raise ValueError(f"order {order} is too high for step {i}: only {i + 1} derivatives are known")
    start, end = float(t[i]), float(t[i + 1])
    nodes, weights = np.polynomial.legendre.leggauss((order + 1) // 2)
    tau = 0.5 * (end - start) * nodes + 0.5 * (end + start)
    basis = np.ones_like(tau)
    for k in range(order):
        if k != j:
            basis = basis * (tau - float(t[i - k])) / (float(t[i - j]) - float(t[i - k]))
    return float(0.5 * (end - start) * (weights @ basis))


def get_ancestral_step(sigma_from: Tensor, sigma_to: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(sigma_down, sigma_up) with down^2 + up^2 = to^2: step down to sigma_down, then add noise of sigma_up.

    eta 1 gives the variance of DDPM's posterior (arXiv:2006.11239), eta 0 no noise.
    """
    if not eta:
        return sigma_to, torch.zeros_like(sigma_to)
    posterior = (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2).sqrt()
    sigma_up = torch.minimum(sigma_to, eta * posterior)
    return (sigma_to**2 - sigma_up**2).sqrt(), sigma_up


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx / dsigma of the probability flow (arXiv:2206.00364, Eq. 1 with the denoiser's score); sigma (B,), or one for all."""
    return (x - denoised) / (append_dims(sigma, x.ndim) if sigma.ndim else sigma)


def to_neg_log_sigma(sigma: Tensor) -> Tensor:
    """-log(sigma), the time in which DPM-Solver steps (arXiv:2206.00927)."""
    return sigma.log().neg()


def to_sigma(neg_log_sigma: Tensor) -> Tensor:
    """The inverse of `to_neg_log_sigma`."""
    return neg_log_sigma.neg().exp()
