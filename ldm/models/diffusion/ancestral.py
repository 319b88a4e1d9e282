"""Ancestral (DDPM) sampling, one training timestep at a time.

Pure functions over a model that has `apply_model`, `q_posterior`, `q_sample` and a schedule; they draw random numbers in the
legacy order. Source: DDPM (arXiv:2006.11239), Algorithm 2 and Eq. 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.modules.diffusionmodules import parameterization as param
from ldm.modules.diffusionmodules.schedule import extract_into_tensor
from ldm.modules.diffusionmodules.util import noise_like
from ldm.util import UserError


class AncestralStep(NamedTuple):
    """State after the step at timestep `i`."""

    i: int
    x: Tensor
    pred_x0: Tensor


def p_mean_variance(
    model: Any,
    x: Tensor,
    c: Any,
    t: Tensor,
    *,
    clip_denoised: bool,
    quantize_denoised: bool = False,
    score_corrector: Any = None,
    corrector_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, variance, log variance of p(x_{t-1} | x_t), and the predicted x0. `clip_denoised` limits x0 to [-1, 1]."""
    out = model.apply_model(x, t, c)
    if score_corrector is not None:
        if model.parameterization != "eps":
            raise UserError(f"a score corrector works on eps, and this model predicts {model.parameterization}")
        out = score_corrector.modify_score(model, out, x, t, c, **(corrector_kwargs or {}))
    x0 = param.to_x0(model.parameterization, out, x, extract_into_tensor(model.alphas_cumprod, t, x.shape))
    if clip_denoised:
        x0 = x0.clamp(-1.0, 1.0)
    if quantize_denoised:
        x0 = _snap(model.first_stage_model, x0)
    return (*model.q_posterior(x_start=x0, x_t=x, t=t), x0)


def _snap(first_stage: Any, x0: Tensor) -> Tensor:
    """x0 with every vector replaced by the nearest one of the codebook."""
    if not hasattr(first_stage, "quantize"):
        raise UserError(f"quantize_denoised needs a first stage with a codebook (VQModelInterface), not {type(first_stage).__name__}")
    out = first_stage.quantize(x0)
    return out[0] if isinstance(out, tuple) else out


def p_sample(
    model: Any,
    x: Tensor,
    c: Any,
    t: Tensor,
    *,
    clip_denoised: bool = False,
    repeat_noise: bool = False,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """One step x_t -> x_{t-1} for timesteps t (B,); gives (x_{t-1}, predicted x0). No noise is added at t = 0."""
    mean, _, log_variance, x0 = p_mean_variance(model, x, c, t, clip_denoised=clip_denoised, **options)
    noise = noise_like(x.shape, x.device, repeat_noise) * temperature
    if noise_dropout > 0.0:
        noise = torch.nn.functional.dropout(noise, p=noise_dropout)
    inside = (t != 0).to(x.dtype).reshape(-1, *([1] * (x.ndim - 1)))  # (B, 1, 1, 1)
    return mean + inside * (0.5 * log_variance).exp() * noise, x0


def walk_ancestral(
    model: Any,
    cond: Any,
    x: Tensor,
    *,
    start: int | None = None,
    mask: Tensor | None = None,
    x0: Tensor | None = None,
    temperature: float | Sequence[float] = 1.0,
    **options: Any,
) -> Iterator[AncestralStep]:
    """Steps from timestep `start` - 1 (default T - 1) down to 0. Where `mask` is 1, x follows the given `x0`."""
    if mask is not None and x0 is None:
        raise UserError("a mask needs x0, the latent whose masked part is to be kept")
    steps = model.num_timesteps if start is None else min(model.num_timesteps, start)
    for i in reversed(range(steps)):
        t = torch.full((x.shape[0],), i, device=x.device, dtype=torch.long)
        if getattr(model, "shorten_cond_schedule", False):
            cond = model.q_sample(x_start=cond, t=model.cond_ids[t].to(cond.device), noise=torch.randn_like(cond))
        scale = temperature if isinstance(temperature, (int, float)) else temperature[i]
        x, pred_x0 = p_sample(model, x, cond, t, clip_denoised=model.clip_denoised, temperature=scale, **options)
        if mask is not None:
            x = model.q_sample(x0, t) * mask + (1.0 - mask) * x
        yield AncestralStep(i, x, pred_x0)


def p_sample_loop(
    model: Any,
    cond: Any,
    shape: Sequence[int],
    *,
    x_T: Tensor | None = None,
    return_intermediates: bool = False,
    keep: str = "x",  # which field of the steps the intermediates hold: x or pred_x0
    log_every_t: int | None = None,
    callback: Callable[[int], None] | None = None,
    img_callback: Callable[[Tensor, int], None] | None = None,
    verbose: bool = False,
    start: int | None = None,
    **options: Any,
) -> Any:
    """Run `walk_ancestral` from noise (or `x_T`); gives the sample, or (sample, intermediates)."""
    x = torch.randn(tuple(shape), device=model.device) if x_T is None else x_T
    every = log_every_t or model.log_every_t
    steps = model.num_timesteps if start is None else min(model.num_timesteps, start)
    intermediates = [x] if keep == "x" else []
    walk: Any = walk_ancestral(model, cond, x, start=start, **options)
    if verbose:
        from tqdm import tqdm

        walk = tqdm(walk, desc="DDPM sampling", total=steps)
    for step in walk:
        x = step.x
        if step.i % every == 0 or step.i == steps - 1:
            intermediates.append(getattr(step, keep))
        if callback is not None:
            callback(step.i)
        if img_callback is not None:
            img_callback(x, step.i)
    return (x, intermediates) if return_intermediates else x
