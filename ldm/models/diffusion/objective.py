"""The training objective of a diffusion model, and what is done to a batch before it: noise, weights, dropout of the condition.

Functions of the model's settings; the draws, and their order, are those of the original. Sources: DDPM (arXiv:2006.11239), offset noise,
min-SNR (arXiv:2303.09556), classifier-free guidance (arXiv:2207.12598).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.modules.diffusionmodules import parameterization as param
from ldm.util import ConfigError, mean_flat


def noise_like(x0: Tensor, offset: float = 0.0) -> Tensor:
    """Standard normal noise, plus `offset` times one more draw for all pixels of a channel."""
    noise = torch.randn_like(x0)
    if offset:
        shared = torch.randn(*x0.shape[:2], *([1] * (x0.ndim - 2)), device=x0.device, dtype=x0.dtype)
        noise = noise + offset * shared
    return noise


def weighted_losses(model: Any, output: Tensor, target: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted total and its parts: loss_simple (DDPM Eq. 14), loss_vlb (Eq. 12)."""
    prefix = "train" if model.training else "val"
    per_sample = mean_flat(model.get_loss(output, target, mean=False))  # (B,)
    parts = {f"{prefix}/loss_simple": per_sample.mean()}
    logvar_t = model.logvar[t]
    loss = per_sample / torch.exp(logvar_t) + logvar_t
    if model.learn_logvar:
        parts[f"{prefix}/loss_gamma"] = loss.mean()
        parts["logvar"] = model.logvar.detach().mean()
    if model.loss_weighting:
        loss = loss * param.loss_weight(kind=model.parameterization, abar=model.alphas_cumprod[t], **model.loss_weighting)
    loss_vlb = (model.lvlb_weights[t] * per_sample).mean()
    parts[f"{prefix}/loss_vlb"] = loss_vlb
    total = model.l_simple_weight * loss.mean() + model.original_elbo_weight * loss_vlb
    parts[f"{prefix}/loss"] = total
    return total, parts


def checked_weighting(weighting: Any, kind: str) -> dict[str, Any]:
    """Arguments for `parameterization.loss_weight`, tried out: a wrong one must not wait for the first batch."""
    options = {"name": weighting} if isinstance(weighting, str) else dict(weighting or {})
    try:
        if options:
            param.loss_weight(kind=kind, abar=torch.tensor(0.5, device="cpu"), **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss_weighting {weighting}: {error}") from None
    return options


def checked_dropout(rules: Any) -> dict[str, dict[str, Any]]:
    """{batch key: {p: probability, val: replacement}}, as `drop_conditions` takes it; ConfigError for anything else."""
    rules = dict(rules or {})
    for key, rule in rules.items():
        fits = isinstance(rule, Mapping) and isinstance(rule.get("p"), (int, float)) and set(rule) <= {"p", "val"}
        if not (fits and 0.0 <= rule["p"] <= 1.0):
            raise ConfigError(f"ucg_training.{key} is {rule}: give {{p: share between 0 and 1, val: what stands for no condition}}")
    return rules


def drop_conditions(rules: Mapping[str, Mapping[str, Any]], batch: dict[str, Any]) -> None:
    """Replace entries of the batch with the empty condition, so that guidance has an unconditional model to lean on."""
    for key, rule in rules.items():
        if key not in batch:
            raise ConfigError(f"ucg_training names {key!r}, and the batch has {', '.join(sorted(batch))}")
        value = rule.get("val")
        if value is None and isinstance(batch[key], Tensor):
            raise ConfigError(f"ucg_training.{key} has no val: name the number that stands for no condition")
        for i in np.flatnonzero(np.random.random(len(batch[key])) < rule["p"]):
            batch[key][i] = "" if value is None else value
