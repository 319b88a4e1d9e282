"""The public face that every fast sampler shares: the published signatures, over the loop of `walk.py`.

Sampling, img2img starts (`t_start`, `stochastic_encode`, `decode`), inversion (`encode`), callbacks and intermediates are written once
here; a sampler adds its solver. Legacy names stop in the first lines of each method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.denoiser import Denoiser, Prediction, schedule_of
from ldm.models.diffusion.sampling_util import norm_thresholding
from ldm.models.diffusion.sigmas import make_grid
from ldm.models.diffusion.walk import Denoise, Draws, Mover, NoiseSource, Rule, Step, Timestep, check_mask, ddim_update, walk, working
from ldm.modules.diffusionmodules.schedule import Grid, NoiseSchedule, ddim_sigma
from ldm.util import UserError

__all__ = [
    "Denoise",
    "Denoiser",
    "Draws",
    "Grid",
    "Mover",
    "NoiseSource",
    "Prediction",
    "Rule",
    "Sampler",
    "Step",
    "Timestep",
    "ddim_update",
    "walk",
]


# Options of `sample()` that the signatures of the published samplers do not have.
_EXTRA_OPTIONS = {
    "ddim_discretize": "timestep spacing, one of ldm.models.diffusion.sigmas.SPACINGS",
    "final": "where the last step arrives: first or clean",
    "guidance_rescale": "0..1",
    "t_start": "take only this many of the least noisy steps, from x_T",
    "timesteps": "legacy: a part of the grid",
    "repeat_noise": "one noise for the whole batch",
}


class Sampler:
    """What DDIM, PLMS and their like have in common; a subclass says `rule()` and `name`.

    `noise` (see `NoiseSource`) replaces the global generator. After `make_schedule` the attributes of the published samplers are there:
    ddim_timesteps (ascending), ddim_alphas, ddim_alphas_prev, ddim_sigmas, ddim_sqrt_one_minus_alphas, ddim_sigmas_for_original_num_steps,
    and the schedule's own: betas, alphas_cumprod, sqrt_alphas_cumprod, sqrt_one_minus_alphas_cumprod, ... (T,).
    """

    name = ""
    spacing = "uniform"  # of the grid, unless asked for another
    final = "first"  # where the last step arrives, unless asked for another
    default_eta = 0.0
    draws_unused = False  # legacy: takes noise from the global generator in steps that add none
    invertible = True  # has a deterministic way back from x0 to noise
    shifted_levels = False  # legacy: stochastic_encode noises one level more than decode starts from

    def __init__(
        self,
        model: Any,
        schedule: str = "linear",  # legacy, without effect: the schedule is the model's
        device: torch.device | str | None = None,  # default: the model's
        noise: NoiseSource | None = None,
        spacing: str | None = None,  # one of ldm.models.diffusion.sigmas.SPACINGS; default: the sampler's
        final: str | None = None,  # first or clean; default: the sampler's
        **unknown: Any,
    ) -> None:
        _reject(unknown, dict.fromkeys(("schedule", "device", "noise", "spacing", "final"), ""), type(self).__name__)
        self.model = model
        self.spacing, self.final = spacing or self.spacing, final or self.final
        self.schedule = schedule
        self.noise_schedule: NoiseSchedule = schedule_of(model)
        self.ddpm_num_timesteps = self.noise_schedule.T
        self.device = torch.device(device if device is not None else _device_of(model))
        self.noise = noise
        self.grid: Grid | None = None

    def rule(self, grid: Grid) -> Rule:
        """A fresh solver for one walk along `grid`."""
        raise NotImplementedError

    def check(self, eta: float) -> None:
        """Refuse what this solver cannot do; by default noise, which would spoil the order of an ODE solver or its history."""
        if eta != 0:
            raise UserError(f"{self.name} is deterministic and cannot use eta {eta}: leave eta at 0, or use DDIM")

    def calls(self, grid: Grid) -> int:
        """How many model calls a walk along `grid` takes (a guided one counts once)."""
        return len(grid)

    def make_grid(self, steps: int, eta: float, spacing: str, final: str) -> Grid:
        """The steps of a walk."""
        return make_grid(self.noise_schedule, steps, eta, spacing, final)

    # ------------------------------------------------------------------------------------------------------------ schedule

    def make_schedule(
        self,
        ddim_num_steps: int,  # any number from 1 to T
        ddim_discretize: str | None = None,  # spacing; None, here and below, is the sampler's own
        ddim_eta: float | None = None,
        verbose: bool = True,
        final: str | None = None,
    ) -> Grid:
        """Choose the timesteps and noise levels of the walks to come (see `sigmas.nodes`); afterwards `len(self.grid)` steps are there."""
        eta = self.default_eta if ddim_eta is None else ddim_eta
        self.check(eta)
        self.eta = eta
        self.grid = grid = self.make_grid(ddim_num_steps, eta, ddim_discretize or self.spacing, final or self.final)
        self.ddim_timesteps = grid.t[::-1].copy()
        self.ddim_alphas = self._ascending(grid.abar)
        self.ddim_alphas_prev = self._ascending(grid.abar_prev)
        self.ddim_sigmas = self._ascending(grid.sigma)
        self.ddim_sqrt_one_minus_alphas = self._ascending(np.sqrt(1.0 - grid.abar))
        # Published samplers derived this one from float32 buffers, which shows in the sixth digit.
        abar, abar_prev = (a.astype(np.float32) for a in (self.noise_schedule.abar, self.noise_schedule.abar_prev))
        self.ddim_sigmas_for_original_num_steps = torch.from_numpy(ddim_sigma(abar, abar_prev, eta)).float().to(self.device)
        for name, value in self.noise_schedule.buffers().items():
            setattr(self, name, torch.from_numpy(value).to(self.device))
        return grid

    def _ascending(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values[::-1].astype(np.float32)).to(self.device)

    def _steps(self, use_original_steps: bool = False) -> Grid:
        if use_original_steps:
            return self.noise_schedule.full_grid(getattr(self, "eta", 0.0))
        if self.grid is None:
            raise UserError(f"{self.name}: call make_schedule(number of steps) before this, or use sample()")
        return self.grid

    def _last(self, grid: Grid, n: float, what: str) -> Grid:
        if int(n) != n or not 0 <= n <= len(grid):
            raise UserError(f"{what} {n} is out of range: the schedule has {len(grid)} steps, give a whole number from 0 to {len(grid)}")
        return grid.last(int(n))

    # ------------------------------------------------------------------------------------------------------------ sampling

    def sample(
        self,
        S: int,  # number of steps
        batch_size: int,
        shape: Sequence[int],  # of one sample, (C, H, W)
        conditioning: Any = None,
        callback: Callable[[int], Any] | None = None,  # called with the step's number
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,  # called with the predicted x0 and the step's number
        quantize_x0: bool = False,  # snap the predicted x0 to the first stage's codebook
        eta: float | None = None,  # 0 deterministic, 1 as random as DDPM; None: the sampler's own
        mask: Tensor | None = None,  # 1 keeps x0, 0 draws new
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        verbose: bool = True,  # progress bar
        x_T: Tensor | None = None,  # start, (B, C, H, W); drawn if not given
        log_every_t: int = 100,  # of how many steps one is kept in the intermediates
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,  # largest root mean square of the predicted x0
        ucg_schedule: Sequence[float] | None = None,  # guidance scale of each step
        **extra: Any,  # see _EXTRA_OPTIONS
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw `batch_size` samples; gives (samples (B, C, H, W), {"x_inter": [...], "pred_x0": [...]})."""
        _reject(extra, _EXTRA_OPTIONS, f"{type(self).__name__}.sample")
        if normals_sequence is not None:
            raise UserError(f"{self.name}: normals_sequence never had an effect: use {type(self).__name__}(model, noise=SOURCE)")
        self.make_schedule(S, extra.pop("ddim_discretize", None), eta, verbose, extra.pop("final", None))
        return self._sampling(
            conditioning, (batch_size, *shape), x_T=x_T, callback=callback, img_callback=img_callback, quantize_denoised=quantize_x0,
            mask=mask, x0=x0, temperature=temperature, noise_dropout=noise_dropout, score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs, verbose=verbose, log_every_t=log_every_t, ucg_schedule=ucg_schedule,
            unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=unconditional_conditioning,
            dynamic_threshold=dynamic_threshold, **extra,
        )  # fmt: skip

    def _sampling(
        self,
        cond: Any,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], Any] | None = None,
        timesteps: float | None = None,
        img_callback: Callable[[Tensor, int], Any] | None = None,
        log_every_t: int = 100,
        verbose: bool = False,
        t_start: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """The published samplers' `*_sampling`: run the schedule made before from x_T of `shape`."""
        grid = self._steps(ddim_use_original_steps)
        if timesteps is not None:  # legacy subset: one step fewer than it says, unless all T timesteps are used
            n = timesteps if ddim_use_original_steps else max(int(min(timesteps / len(grid), 1) * len(grid)) - 1, 0)
            grid = self._last(grid, n, "timesteps")
        if t_start is not None:
            grid = self._last(grid, t_start, "t_start")
        x = self._draws().normal(shape, torch.empty(0, device=self.device)) if x_T is None else working(x_T.to(self.device))
        if tuple(x.shape) != tuple(shape):
            raise UserError(f"x_T has shape {tuple(x.shape)}, and {tuple(shape)} was asked for")
        intermediates = {"x_inter": [x], "pred_x0": [x]}
        for step in self.walk(grid, x, cond, verbose=verbose, **options):
            x, remaining = step.x, len(grid) - 1 - step.index
            if callback is not None:
                callback(step.index)
            if img_callback is not None:
                img_callback(step.pred_x0, step.index)
            if remaining % log_every_t == 0 or step.index == 0:
                intermediates["x_inter"].append(step.x)
                intermediates["pred_x0"].append(step.pred_x0)
        return x, intermediates

    def walk(
        self,
        grid: Grid,
        x: Tensor,
        cond: Any = None,
        *,
        ucg_schedule: Sequence[float] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        verbose: bool = False,
        draw: bool = True,  # False: no randomness at all
        **options: Any,  # see `_parts`
    ) -> Iterator[Step]:
        """The steps along `grid` from x, as they come; every sampling method is a consumer of this."""
        denoiser, draws, limit_x0 = self._parts(cond, **options)
        self._check_signal(grid, denoiser)
        if ucg_schedule is not None and len(ucg_schedule) != len(grid):
            raise UserError(f"ucg_schedule has {len(ucg_schedule)} guidance scales for {len(grid)} steps: give one a step")
        mask, x0 = check_mask(mask, x0, x)
        steps = walk(
            self.rule(grid), denoiser, grid, working(x), scales=ucg_schedule, mask=mask, x0=x0, limit_x0=limit_x0,
            draws=draws, draw_steps=draw,
        )  # fmt: skip
        if verbose:
            from tqdm import tqdm

            return iter(tqdm(steps, desc=f"{self.name} sampling", total=len(grid)))
        return steps

    def _single(
        self, rule: Rule, x: Tensor, c: Any, t: Tensor, t_next: Tensor, index: int, original: bool, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """One step of `rule`: the published samplers' `p_sample_*`, where `index` counts from the least noisy step."""
        grid = self._steps(original)
        denoiser, draws, limit_x0 = self._parts(c, **options)
        self._check_signal(grid, denoiser)
        return rule(working(x), t, t_next, denoiser.predict, Mover.at(grid, len(grid) - 1 - index, draws, limit_x0))

    def _parts(
        self,
        cond: Any,
        *,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        guidance_rescale: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        quantize_denoised: bool = False,
        dynamic_threshold: float | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        repeat_noise: bool = False,
    ) -> tuple[Denoiser, Draws, Callable[[Tensor], Tensor] | None]:
        denoiser = Denoiser(
            self.model, cond, unconditional_conditioning, unconditional_guidance_scale, schedule=self.noise_schedule,
            rescale=guidance_rescale, corrector=score_corrector, corrector_kwargs=corrector_kwargs,
        )  # fmt: skip
        return denoiser, self._draws(temperature, noise_dropout, repeat_noise), self._limit(quantize_denoised, dynamic_threshold)

    def _check_signal(self, grid: Grid, denoiser: Denoiser) -> None:
        if len(grid) and grid.abar.min() == 0.0 and denoiser.needs_signal:
            raise UserError(
                f"{self.name}: timestep {grid.t[grid.abar.argmin()]} is pure noise (abar 0), where eps does not determine x0: use a model "
                "of v or x0 without a score corrector, or spacing leading, which leaves this timestep out"
            )

    def _draws(self, temperature: float = 1.0, dropout: float = 0.0, repeat: bool = False) -> Draws:
        if not 0.0 <= dropout < 1.0:
            raise UserError(f"noise_dropout {dropout} is out of range: give a fraction from 0 to below 1")
        return Draws(self.noise, temperature, dropout, repeat, self.draws_unused)

    def _limit(self, quantize: bool, threshold: float | None) -> Callable[[Tensor], Tensor] | None:
        first_stage: Any = getattr(self.model, "first_stage_model", None)
        if quantize and not hasattr(first_stage, "quantize"):
            raise UserError(f"quantize_x0 needs a first stage with a codebook (VQModelInterface), not {type(first_stage).__name__}")

        def limit(x0: Tensor) -> Tensor:
            if quantize:
                snapped = first_stage.quantize(x0)
                x0 = snapped[0] if isinstance(snapped, tuple) else snapped  # an identity stage gives the tensor itself
            return x0 if threshold is None else norm_thresholding(x0, threshold)

        return limit if quantize or threshold is not None else None

    # --------------------------------------------------------------------------------------------------- img2img, inversion

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | Sequence[int] | int, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """x0 noised for `decode(..., t_start=t)`, to the level that its first step leaves. t is (B,) or a number, 0 to the number of steps.

        t = the number of steps (strength 1) is pure noise, t = 0 is x0 itself. The published samplers count their levels from 0 instead:
        one level more noise than `decode` believes, and the least noise at t = 0; theirs keep that for their numbers.
        """
        x0 = working(x0)
        levels = self._steps(use_original_steps).abar[::-1]
        if not self.shifted_levels:
            levels = np.append(1.0, levels[:-1])
        index = np.broadcast_to(np.asarray(t.cpu() if isinstance(t, Tensor) else t), (x0.shape[0],))
        if index.min() < 0 or index.max() > len(levels):
            raise UserError(f"cannot noise to level {index.tolist()}: the schedule has {len(levels)} steps, give 0 to {len(levels)}")
        if noise is None:
            noise = self._draws().normal(x0.shape, x0)
        abar = np.append(levels, 0.0)[index].reshape(-1, *([1] * (x0.ndim - 1)))
        signal, spread = (torch.from_numpy(a).to(x0.dtype).to(x0.device) for a in (np.sqrt(abar), np.sqrt(1.0 - abar)))
        return signal * x0 + spread * noise.to(x0)

    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        callback: Callable[[int], Any] | None = None,
        **options: Any,
    ) -> Tensor:
        """Denoise x_latent with the `t_start` least noisy steps; `options` as in `walk`."""
        grid = self._last(self._steps(use_original_steps), t_start, "t_start")
        x = working(x_latent.to(self.device))
        guidance = dict(unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=unconditional_conditioning)
        for step in self.walk(grid, x, cond, **guidance, **options):
            x = step.x
            if callback is not None:
                callback(step.index)
        return x

    def encode(
        self,
        x0: Tensor,
        c: Any,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,  # about how many to keep
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        callback: Callable[[int], Any] | None = None,
        **options: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Inversion: the x that `decode(..., t_start=t_enc)` brings back near x0, without randomness.

        Published code asked the model at the loop's index (0, 1, 2, ...); here it is asked at the timestep of the level x is at.
        """
        if not self.invertible:
            raise UserError(f"{self.name} adds noise and has no way back from a picture: encode with a deterministic one such as DDIM")
        grid = self._last(self._steps(use_original_steps), t_enc, "t_enc").inverted()
        x, kept = working(x0.to(self.device)), []
        every = max(len(grid) // return_intermediates, 1) if return_intermediates else 0
        guidance = dict(unconditional_guidance_scale=unconditional_guidance_scale, unconditional_conditioning=unconditional_conditioning)
        for step in self.walk(grid, x, c, draw=False, **guidance, **options):
            x = step.x
            if every and (step.index % every == 0 or step.index >= len(grid) - 2):
                kept.append(step)
            if callback is not None:
                callback(step.index)
        out: dict[str, Any] = {"x_encoded": x, "intermediate_steps": [step.index for step in kept]}
        return x, {**out, "intermediates": [step.x for step in kept]} if return_intermediates else out


def _reject(given: Mapping[str, Any], allowed: Mapping[str, str], where: str) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise UserError(f"{where} does not know {', '.join(unknown)}; besides its signature it takes {', '.join(sorted(allowed))}")


def _device_of(model: Any) -> torch.device | str:
    if getattr(model, "device", None) is not None:
        return model.device
    return next((p.device for p in model.parameters()), "cpu") if hasattr(model, "parameters") else "cpu"
