"""DDPM: a diffusion model over whatever `first_stage_key` holds, and everything that its latent sibling inherits.

Owns the schedule buffers, the training objective, EMA, the optimiser, and loading a start checkpoint. Knows no first stage, no
conditioning and no fast sampler. Sources: DDPM (arXiv:2006.11239); v-prediction (arXiv:2202.00512).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion import objective
from ldm.models.diffusion.ancestral import p_mean_variance, p_sample, p_sample_loop
from ldm.models.diffusion.conditioning import channels_first
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.diffusionmodules import parameterization as param
from ldm.modules.diffusionmodules.schedule import NoiseSchedule, extract_into_tensor, make_beta_schedule, rescale_zero_terminal_snr
from ldm.modules.diffusionmodules.timesteps import check_sampling, sample_timesteps
from ldm.modules.distributions.distributions import normal_kl
from ldm.modules.ema import LitEma, ema_scope
from ldm.modules.rates import with_schedule
from ldm.util import ConfigError, default, instantiate_from_config, mean_flat, plain

log = logging.getLogger(__name__)


class DDPM(pl.LightningModule):
    """Denoising diffusion with the legacy constructor, buffers and state-dict keys.

    The noisy sample is x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, and the network predicts `parameterization` from it.
    """

    def __init__(
        self,
        unet_config: Any,  # the network: {target, params}
        timesteps: int = 1000,  # T, training timesteps
        beta_schedule: str = "linear",
        loss_type: str = "l2",  # l1 or l2
        ckpt_path: str | None = None,  # weights to start from
        ignore_keys: Sequence[str] = (),  # prefixes of ckpt_path's keys that are left out
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",  # where a batch holds the sample
        image_size: int | Sequence[int] = 256,  # of what is diffused: latent size for latent models
        channels: int = 3,  # of what is diffused
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Any = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,  # posterior variance = (1 - v) * beta_tilde + v * beta
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",  # eps, x0 or v
        scheduler_config: Any = None,  # learning-rate factor as a function of the step
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        make_it_fit: bool = False,
        ucg_training: Any = None,  # {batch key: {p: probability, val: replacement}}: dropout for classifier-free guidance
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
        ema_decay: float = 0.9999,
        optimizer_config: Any = None,  # {target, params} instead of AdamW
        loss_weighting: Any = None,  # none, min_snr or {name: min_snr, gamma: 5} (arXiv:2303.09556)
        rescale_betas_zero_snr: bool = False,  # zero terminal SNR (arXiv:2305.08891)
        offset_noise: float = 0.0,  # std of noise shared by all pixels of a channel, added in training: lets means be learnt; 0.05 to 0.1
        timestep_sampling: Any = None,  # name, or {name, options}, of a distribution in `diffusionmodules.timesteps`; None: uniform
        ema_device: str | None = None,  # where the averages are kept: cpu spares an accelerator's memory; None: beside the model
        prior_weight: float = 1.0,  # of the loss of a batch's `prior`, where the data brings one (DreamBooth)
    ) -> None:
        super().__init__()
        if parameterization not in param.KINDS:
            raise ConfigError(f"parameterization {parameterization!r} is unknown; allowed are {', '.join(param.KINDS)}")
        if loss_type not in ("l1", "l2"):
            raise ConfigError(f"loss_type {loss_type!r} is unknown; allowed are l1, l2")
        self.parameterization = parameterization
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.use_positional_encodings = use_positional_encodings
        self.cond_stage_model: nn.Module | None = None
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        self.ema_decay, self.ema_device = ema_decay, ema_device
        if use_ema:
            self._start_ema()
        self.scheduler_config = plain(scheduler_config)
        self.optimizer_config = plain(optimizer_config)
        self.v_posterior = v_posterior
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.loss_weighting = objective.checked_weighting(plain(loss_weighting), parameterization)
        self.loss_type = loss_type
        if offset_noise < 0.0:
            raise ConfigError(f"offset_noise is {offset_noise}: it is a standard deviation, 0 (none) or more; 0.05 to 0.1 is usual")
        self.offset_noise = offset_noise
        self.timestep_sampling = check_sampling(plain(timestep_sampling))
        self.prior_weight = prior_weight
        self.learn_logvar = learn_logvar
        self.monitor = monitor
        self.make_it_fit = make_it_fit
        self.rescale_betas_zero_snr = rescale_betas_zero_snr
        self.learning_rate = 1e-4  # the launcher sets it from base_learning_rate
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        logvar = torch.full((self.num_timesteps,), float(logvar_init), device="cpu")
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.ucg_training = objective.checked_dropout(plain(ucg_training))
        self._start_from(ckpt_path, ignore_keys, load_only_unet, reset_ema, reset_num_ema_updates)

    # ------------------------------------------------------------------ schedule
    def register_schedule(
        self,
        given_betas: Any = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Derive everything from the betas once: `self.schedule` in float64, and the legacy float32 buffers as views of it."""
        if given_betas is not None:
            betas = np.asarray(given_betas, dtype=np.float64)
        else:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        if self.rescale_betas_zero_snr:
            if self.parameterization == "eps":
                raise ConfigError("rescale_betas_zero_snr needs parameterization v or x0: at zero SNR the noise says nothing about x0")
            betas = rescale_zero_terminal_snr(betas)
        self.schedule = NoiseSchedule(betas)
        self.num_timesteps = len(betas)
        self.linear_start, self.linear_end = linear_start, linear_end
        for name, value in self.schedule.buffers(self.v_posterior, self.parameterization).items():
            tensor = torch.tensor(value, dtype=torch.float32, device="cpu")
            self.register_buffer(name, tensor, persistent=name != "lvlb_weights")

    # ------------------------------------------------------------------ weights
    def _start_ema(self) -> None:
        """Let the average start from the present weights."""
        self.model_ema = self._average_of(self.model)

    def _average_of(self, part: nn.Module) -> LitEma:
        return LitEma(part, decay=self.ema_decay, device=self.ema_device)

    def _averages(self) -> list[LitEma]:
        return [self.model_ema] if self.use_ema else []

    def _start_from(self, path: str | None, ignore_keys: Sequence[str], only_unet: bool, reset_ema: bool, reset_updates: bool) -> None:
        """Read the start weights, if there are any, and let the averages and their warm-up begin anew where that is asked."""
        if path is not None:
            self.init_from_ckpt(path, ignore_keys=ignore_keys, only_model=only_unet)
            if reset_ema and self.use_ema:
                self._start_ema()
        if reset_updates:
            for average in self._averages():
                average.reset_num_updates()

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Inside, the network carries its EMA weights (when there are any); afterwards the trained ones again."""
        return ema_scope(self.model_ema if self.use_ema else None, self.model, context)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Start from the weights in `path` (.safetensors or .ckpt). `only_model` loads the network alone, names without `model.`."""
        from ldm.inference.checkpoint import load_weights

        load_weights(self.model if only_model else self, path, ignore=tuple(ignore_keys), make_it_fit=self.make_it_fit)

    # ------------------------------------------------------------------ q: the forward process
    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x0), DDPM Eq. 4."""
        shape = x_start.shape
        mean = extract_into_tensor(self.sqrt_alphas_cumprod, t, shape) * x_start
        variance = extract_into_tensor(1.0 - self.alphas_cumprod, t, shape)
        return mean, variance, extract_into_tensor(self.log_one_minus_alphas_cumprod, t, shape)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t for x0 = `x_start` at the timesteps t (B,); `noise` is drawn when not given."""
        noise = default(noise, lambda: torch.randn_like(x_start))
        shape = x_start.shape
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, shape) * x_start
            + extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, shape) * noise
        )

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0), DDPM Eq. 7."""
        shape = x_t.shape
        mean = (
            extract_into_tensor(self.posterior_mean_coef1, t, shape) * x_start
            + extract_into_tensor(self.posterior_mean_coef2, t, shape) * x_t
        )
        variance = extract_into_tensor(self.posterior_variance, t, shape)
        return mean, variance, extract_into_tensor(self.posterior_log_variance_clipped, t, shape)

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 from x_t and eps."""
        shape = x_t.shape
        return (
            extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, shape) * x_t
            - extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, shape) * noise
        )

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x0 from x_t and v."""
        return param.to_x0("v", v, x_t, extract_into_tensor(self.alphas_cumprod, t, x_t.shape))

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """eps from x_t and v."""
        return param.to_eps("v", v, x_t, extract_into_tensor(self.alphas_cumprod, t, x_t.shape))

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        shape = x_t.shape
        scaled = extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, shape) * x_t - pred_xstart
        return scaled / extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, shape)

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The target v = sqrt(abar) eps - sqrt(1 - abar) x0 (arXiv:2202.00512)."""
        shape = x.shape
        return (
            extract_into_tensor(self.sqrt_alphas_cumprod, t, shape) * noise
            - extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, shape) * x
        )

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x0) || N(0, I)) in bits per dimension, (B,)."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / float(np.log(2.0))

    # ------------------------------------------------------------------ p: sampling one step at a time
    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool) -> tuple[Tensor, ...]:
        """Mean, variance and log variance of p(x_{t-1} | x_t)."""
        return p_mean_variance(self, x, None, t, clip_denoised=clip_denoised)[:3]

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False) -> Tensor:
        """One ancestral step, DDPM Algorithm 2."""
        return p_sample(self, x, None, t, clip_denoised=clip_denoised, repeat_noise=repeat_noise)[0]

    @torch.no_grad()
    def p_sample_loop(self, shape: Sequence[int], return_intermediates: bool = False) -> Any:
        """All T ancestral steps from noise of `shape`."""
        return p_sample_loop(self, None, shape, return_intermediates=return_intermediates)

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Any:
        """`batch_size` samples by ancestral sampling."""
        return self.p_sample_loop((batch_size, self.channels, *self.sample_hw()), return_intermediates)

    def sample_hw(self) -> tuple[int, int]:
        """Height and width of what is diffused."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The network's output for x_t (B, C, H, W) at timesteps t (B,)."""
        return self.model(x_noisy, t)

    # ------------------------------------------------------------------ objective
    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """L1 or L2 distance, elementwise unless `mean`."""
        difference = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return difference(pred, target, reduction="mean" if mean else "none")

    def sample_timesteps(self, n: int) -> Tensor:
        """n random timesteps to train at, (n,)."""
        return sample_timesteps(n, self.num_timesteps, self.device, **self.timestep_sampling)

    def training_noise(self, x_start: Tensor) -> Tensor:
        """Noise to train with: standard normal, with `offset_noise` plus the same draw for all pixels of a channel."""
        return objective.noise_like(x_start, self.offset_noise)

    def training_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should have predicted."""
        if self.parameterization == "eps":
            return noise
        return x_start if self.parameterization == "x0" else self.get_v(x_start, noise, t)

    def _losses(self, output: Tensor, target: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return objective.weighted_losses(self, output, target, t)

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective for x0 = `x_start` at timesteps t (B,)."""
        noise = default(noise, lambda: self.training_noise(x_start))
        output = self.model(self.q_sample(x_start, t, noise), t)
        return self._losses(output, self.training_target(x_start, noise, t), t)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective at random timesteps."""
        t = self.sample_timesteps(x.shape[0])
        return self.p_losses(x, t, *args, **kwargs)

    def get_input(self, batch: dict[str, Any], k: str) -> Tensor:
        """`batch[k]`, (B, H, W, C) or (B, H, W), as float32 (B, C, H, W)."""
        if k not in batch:
            raise ConfigError(f"the batch has no {k!r}; it has {', '.join(sorted(batch))}: set first_stage_key or the dataset's key")
        return channels_first(batch[k])

    def shared_step(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective of a batch."""
        return self(self.get_input(batch, self.first_stage_key))

    # ------------------------------------------------------------------ Lightning
    def _drop_conditioning(self, batch: dict[str, Any]) -> None:
        objective.drop_conditions(self.ucg_training, batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """One step; logs the parts of the loss and the learning rate."""
        self._drop_conditioning(batch)
        loss, parts = self.shared_step(batch)
        if "prior" in batch:  # DreamBooth (arXiv:2208.12242), Eq. 2: what the model knew of the class
            self._drop_conditioning(batch["prior"])
            prior = self.shared_step(batch["prior"])[0]
            loss = loss + self.prior_weight * prior
            parts |= {"train/loss_prior": prior, "train/loss": loss}
        size = len(next(iter(batch.values())))
        self.log_dict(parts, prog_bar=True, logger=True, on_step=True, on_epoch=True, batch_size=size)
        if self.scheduler_config is not None:
            self.log("lr_abs", self.optimizers().param_groups[0]["lr"], prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Losses with the trained weights and, as `*_ema`, with the averaged ones."""
        _, parts = self.shared_step(batch)
        with self.ema_scope():
            _, parts_ema = self.shared_step(batch)
        size = len(next(iter(batch.values())))
        parts_ema = {f"{key}_ema": value for key, value in parts_ema.items()}
        self.log_dict({**parts, **parts_ema}, prog_bar=False, logger=True, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the EMA after every batch."""
        if self.use_ema:
            self.model_ema(self.model)

    def log_images(self, batch: dict[str, Any], N: int = 8, n_row: int = 2, **options: Any) -> dict[str, Tensor]:
        """Pictures for the training log, each (B, 3, H, W) or one grid, in [-1, 1]; see `panels.pixel_panels` for the options."""
        from ldm.models.diffusion.panels import draw_panels, pixel_panels

        return draw_panels(pixel_panels, self, batch, N=N, n_row=n_row, **options)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser gets."""
        params = [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]
        return [p for p in params if p.requires_grad]

    def configure_optimizers(self) -> Any:
        """AdamW at `self.learning_rate`, or `optimizer_config` (whose own `lr` wins), times the schedule's factor at every step."""
        params = self.trainable_parameters()
        if self.optimizer_config:
            options = {"lr": self.learning_rate, **(self.optimizer_config.get("params") or {})}
            optimizer = instantiate_from_config(self.optimizer_config, params=params, **options)
        else:
            optimizer = torch.optim.AdamW(params, lr=self.learning_rate)
        return with_schedule(optimizer, self.scheduler_config)
