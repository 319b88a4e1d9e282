"""LatentDiffusion: diffusion over the latents of a first stage, conditioned by a cond stage.

Owns what happens between a batch and the objective (encode, scale, condition) and back (unscale, decode). The objective itself
is DDPM's; pictures for the log are made in `panels`. Source: latent diffusion (arXiv:2112.10752).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion import patchwise
from ldm.models.diffusion.ancestral import p_mean_variance, p_sample, p_sample_loop
from ldm.models.diffusion.conditioning import (
    cached_conditioning,
    cut_batch,
    empty_conditioning,
    raw_conditioning,
    shift_embeddings,
)
from ldm.models.diffusion.pixel import DDPM
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma, ema_scope
from ldm.modules.freezing import freeze
from ldm.util import ConfigError, default, instantiate_from_config, plain

log = logging.getLogger(__name__)


class LatentDiffusion(DDPM):
    """Diffusion over z = scale_factor * first_stage(image).

    Args not in DDPM:
        first_stage_config: the autoencoder, frozen; `__is_first_stage__` for diffusion over the input itself.
        cond_stage_config: what turns `batch[cond_stage_key]` into conditioning; `__is_first_stage__` uses the first stage,
            `__is_unconditional__` nothing.
        cond_stage_trainable: train the cond stage along with the network.
        ema_cond_stage: keep an EMA of a trainable cond stage too (own keys `cond_stage_ema.*`).
        scale_by_std: set scale_factor to 1 / std of the first batch's latents.
        force_null_conditioning: build as unconditional whatever the cond stage.
    """

    ema_cond_stage = False

    def __init__(
        self,
        first_stage_config: Any,
        cond_stage_config: Any = "__is_unconditional__",
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,  # name of a method of the cond stage to call instead of encode
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        *args: Any,
        force_null_conditioning: bool = False,
        ema_cond_stage: bool = False,
        **kwargs: Any,
    ) -> None:
        self.num_timesteps_cond = default(num_timesteps_cond, 1)
        self.scale_by_std = scale_by_std
        if self.num_timesteps_cond > kwargs.get("timesteps", 1000):
            raise ConfigError(f"num_timesteps_cond {num_timesteps_cond} must not exceed timesteps {kwargs.get('timesteps', 1000)}")
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__" and not force_null_conditioning:
            conditioning_key = None
        ckpt_path, ignore_keys = kwargs.pop("ckpt_path", None), kwargs.pop("ignore_keys", ())
        load_only_unet = kwargs.pop("load_only_unet", False)
        reset_ema, reset_num = kwargs.pop("reset_ema", False), kwargs.pop("reset_num_ema_updates", False)
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)
        self.concat_mode = concat_mode
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_key = cond_stage_key
        self.cond_stage_forward = cond_stage_forward
        self.force_null_conditioning = force_null_conditioning
        self.clip_denoised = False
        self._embedded: dict[str, Tensor] = {}  # captions that stand for "nothing", where a data set brings embeddings of the others
        self.scale_factor: Any
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        else:
            self.scale_factor = scale_factor
        self._given_scale, self._restarted = float(self.scale_factor), ckpt_path is not None
        self._build_first_stage(first_stage_config)
        self._build_cond_stage(cond_stage_config)
        if ema_cond_stage:
            if not (cond_stage_trainable and self.use_ema and self.cond_stage_model is not None):
                raise ConfigError("ema_cond_stage needs use_ema and a trainable cond stage (cond_stage_trainable: true)")
            self.ema_cond_stage = True
            self._start_ema()
        self._start_from(ckpt_path, ignore_keys, load_only_unet, reset_ema, reset_num)

    # ------------------------------------------------------------------ building
    def _start_ema(self) -> None:
        """Let the averages start from the present weights."""
        super()._start_ema()
        if self.ema_cond_stage:
            self.cond_stage_ema = self._average_of(self.cond_stage_model)

    def _averages(self) -> list[LitEma]:
        return [*super()._averages(), *([self.cond_stage_ema] if self.ema_cond_stage else [])]

    def _build_first_stage(self, config: Any) -> None:
        stage = instantiate_from_config(config)
        self.first_stage_model = freeze(IdentityFirstStage() if stage is None else stage)

    def _build_cond_stage(self, config: Any) -> None:
        config = plain(config)
        if config == "__is_first_stage__":
            if self.cond_stage_trainable:
                raise ConfigError("cond_stage_config __is_first_stage__ cannot be trained: the first stage is frozen")
            self.cond_stage_model = self.first_stage_model
        elif config == "__is_unconditional__":
            self.cond_stage_model = None
        else:
            stage = instantiate_from_config(config)
            self.cond_stage_model = stage if self.cond_stage_trainable else freeze(stage)

    def register_schedule(self, *args: Any, **kwargs: Any) -> None:
        """As DDPM's; also the noise levels of noised conditioning when `num_timesteps_cond` > 1."""
        super().register_schedule(*args, **kwargs)
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            self.make_cond_schedule()

    def make_cond_schedule(self) -> None:
        """`cond_ids` (T,): the timestep at which the conditioning is noised when x is at timestep t."""
        self.cond_ids = torch.full((self.num_timesteps,), self.num_timesteps - 1, dtype=torch.long, device="cpu")
        ids = torch.round(torch.linspace(0, self.num_timesteps - 1, self.num_timesteps_cond, device="cpu")).long()
        self.cond_ids[: self.num_timesteps_cond] = ids

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """EMA weights of the network, and of the cond stage where one is kept."""
        with super().ema_scope(context):
            if not self.ema_cond_stage:
                yield
                return
            with ema_scope(self.cond_stage_ema, self.cond_stage_model):
                yield

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the EMAs after every batch."""
        super().on_train_batch_end(*args, **kwargs)
        if self.ema_cond_stage:
            self.cond_stage_ema(self.cond_stage_model)

    # ------------------------------------------------------------------ patches, see `patchwise`
    meshgrid = staticmethod(patchwise.meshgrid)
    delta_border = staticmethod(patchwise.delta_border)
    get_weighting = patchwise.get_weighting
    get_fold_unfold = patchwise.get_fold_unfold

    # ------------------------------------------------------------------ first stage
    @torch.no_grad()
    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """With `scale_by_std`: before the very first step, scale_factor becomes 1 / std of this batch's latents.

        Start weights bring their own, which is kept. Of several processes the first one's batch counts.
        """
        first = self.current_epoch == 0 and self.global_step == 0 and batch_idx == 0
        if not (self.scale_by_std and first) or self._restarted or float(self.scale_factor) != self._given_scale:
            return
        if self._given_scale != 1.0:
            raise ConfigError(f"scale_by_std sets the scale itself: drop scale_factor (it is {self._given_scale})")
        self.scale_factor.copy_(1.0 / self._encode_batch(batch, self.first_stage_key)[1].std())
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(self.scale_factor, src=0)
        log.info("scale_factor set to %.6g from the first batch", float(self.scale_factor))

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """Image (B, 3, H, W) in [-1, 1] -> posterior (KL) or latent (VQ), not scaled."""
        return patchwise.encode(self, x)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """A sample of the posterior (or the latent itself), scaled: what is diffused."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            return self.scale_factor * encoder_posterior.sample()
        if isinstance(encoder_posterior, Tensor):
            return self.scale_factor * encoder_posterior
        raise ConfigError(f"the first stage encoded to {type(encoder_posterior).__name__}; a Gaussian posterior or a tensor is needed")

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Scaled latent (B, C, h, w) -> image (B, 3, H, W), about [-1, 1]."""
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    def differentiable_decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """As `decode_first_stage`, with gradients."""
        if predict_cids:
            ids = torch.argmax(z.exp(), dim=1).long() if z.ndim == 4 else z  # logits over the codebook
            z = self.first_stage_model.quantize.get_codebook_entry(ids, shape=None)
            z = z.permute(0, 3, 1, 2).contiguous()
        decode = self.first_stage_model.decode
        if hasattr(self.first_stage_model, "quantize"):
            decode = partial(decode, force_not_quantize=predict_cids or force_not_quantize)
        return patchwise.decode(self, z / self.scale_factor, decode)

    def _encode_batch(self, batch: dict[str, Any], k: str, bs: int | None = None) -> tuple[Tensor | None, Tensor]:
        """(image or None, scaled latent). A batch with cached latents under `z` needs no image."""
        if "z" in batch:
            return None, self.scale_factor * cut_batch(batch["z"], bs).to(self.device).float()
        x = cut_batch(super().get_input(batch, k), bs).to(self.device)
        return x, self.get_first_stage_encoding(self.encode_first_stage(x)).detach()

    # ------------------------------------------------------------------ conditioning
    def get_learned_conditioning(self, c: Any) -> Any:
        """What the network is conditioned on, from raw conditioning such as a list of captions."""
        stage = self.cond_stage_model
        if stage is None:
            raise ConfigError(
                "this model has no cond stage (cond_stage_config is __is_unconditional__), so there is nothing to encode with"
            )
        if self.cond_stage_forward is not None:
            return getattr(stage, self.cond_stage_forward)(c)
        if callable(getattr(stage, "encode", None)):
            encoded = stage.encode(c)
            return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded
        return stage(c)

    @torch.no_grad()
    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """Conditioning that stands for "nothing", repeated `batch_size` times."""
        return empty_conditioning(self, batch_size, null_label)

    def _drop_conditioning(self, batch: dict[str, Any]) -> None:
        """As DDPM's; cached embeddings follow the captions that were replaced."""
        before = list(batch.get(self.cond_stage_key, ())) if "c" in batch else []
        super()._drop_conditioning(batch)
        for i, text in enumerate(before):
            if (new := batch[self.cond_stage_key][i]) != text:
                if new not in self._embedded:
                    with torch.no_grad():
                        self._embedded[new] = self.get_learned_conditioning([new])[0].cpu()
                batch["c"][i] = self._embedded[new].to(batch["c"])

    def get_input(  # type: ignore[override]
        self,
        batch: dict[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        return_x: bool = False,
    ) -> list[Any]:
        """[z, c] of a batch; then, as asked, image and reconstruction, image, raw conditioning. `bs` cuts the batch."""
        x, z = self._encode_batch(batch, k, bs)
        c = raw = None
        if self.model.conditioning_key is not None and not self.force_null_conditioning:
            raw = raw_conditioning(self, batch, cond_key or self.cond_stage_key, x, k)
            c = raw
            if "c" in batch and cond_key in (None, self.cond_stage_key):
                c = cached_conditioning(self, batch["c"])
            elif not self.cond_stage_trainable or force_c_encode:
                c = self.get_learned_conditioning(raw.to(self.device) if isinstance(raw, Tensor) else raw)
            c = cut_batch(c, bs)
        if self.use_positional_encodings:
            c = shift_embeddings(self, batch, c)
        out = [z, c]
        if return_first_stage_outputs:
            out.extend([x, self.decode_first_stage(z)])
        if return_x:
            out.append(x)
        if return_original_cond:
            out.append(raw)
        return out

    # ------------------------------------------------------------------ objective
    def shared_step(self, batch: dict[str, Any], **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective of a batch."""
        z, c = self.get_input(batch, self.first_stage_key)[:2]
        return self(z, c)

    def forward(self, x: Tensor, c: Any = None, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective for latents x (B, C, h, w) and conditioning c at random timesteps."""
        t = self.sample_timesteps(x.shape[0])
        if self.model.conditioning_key is not None:
            if c is None:
                raise ConfigError(f"conditioning_key {self.model.conditioning_key!r} needs conditioning, and the batch gave none")
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            if self.shorten_cond_schedule:
                c = self.q_sample(c, self.cond_ids.to(t.device)[t], noise=torch.randn_like(c.float()))
        return self.p_losses(x, c, t, *args, **kwargs)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None, return_ids: bool = False) -> Any:
        """The network's output for z_t. `cond`: a tensor, a list of tensors, or a dict {c_concat, c_crossattn, c_adm}."""
        if not isinstance(cond, dict):
            name = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {name: cond if isinstance(cond, list) else [cond]}
        if patchwise.split_params(self) is not None:
            return patchwise.apply_network(self, x_noisy, t, cond, return_ids)
        out = self.model(x_noisy, t, **cond)
        return out[0] if isinstance(out, tuple) and not return_ids else out

    def p_losses(  # type: ignore[override]
        self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Objective for z0 = `x_start` with conditioning at timesteps t (B,)."""
        noise = default(noise, lambda: self.training_noise(x_start))
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        return self._losses(output, self.training_target(x_start, noise, t), t)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The network, and what is not frozen of the cond stage: all of it when it is trained, or what fine-tuning has put into it."""
        params = super().trainable_parameters()
        own = [] if self.cond_stage_model is None else list(self.cond_stage_model.parameters())
        free = [p for p in own if p.requires_grad]
        if self.cond_stage_trainable and own and not free:
            raise ConfigError("cond_stage_trainable is true, but all weights of the cond stage are frozen: give it freeze: false")
        return params + free

    # ------------------------------------------------------------------ ancestral sampling
    def p_mean_variance(  # type: ignore[override]
        self, x: Tensor, c: Any, t: Tensor, clip_denoised: bool, return_x0: bool = False, **options: Any
    ) -> tuple[Tensor, ...]:
        """Mean, variance, log variance (and x0 when asked) of p(x_{t-1} | x_t, c)."""
        out = p_mean_variance(self, x, c, t, clip_denoised=clip_denoised, **options)
        return out if return_x0 else out[:3]

    @torch.no_grad()
    def p_sample(  # type: ignore[override]
        self, x: Tensor, c: Any, t: Tensor, clip_denoised: bool = False, repeat_noise: bool = False, return_x0: bool = False, **options: Any
    ) -> Any:
        """One ancestral step; with `return_x0` also the predicted x0."""
        out = p_sample(self, x, c, t, clip_denoised=clip_denoised, repeat_noise=repeat_noise, **options)
        return out if return_x0 else out[0]

    @torch.no_grad()
    def p_sample_loop(  # type: ignore[override]
        self, cond: Any, shape: Sequence[int], return_intermediates: bool = False, timesteps: int | None = None, **options: Any
    ) -> Any:
        """Ancestral sampling from noise of `shape`; options as in `ancestral.p_sample_loop`."""
        start = min(timesteps or self.num_timesteps, options.pop("start_T", None) or self.num_timesteps)
        return p_sample_loop(self, cond, shape, return_intermediates=return_intermediates, start=start, **options)

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self, cond: Any, batch_size: int = 16, return_intermediates: bool = False, shape: Sequence[int] | None = None, **options: Any
    ) -> Any:
        """Latents by ancestral sampling over all T timesteps."""
        shape = default(shape, (batch_size, self.channels, *self.sample_hw()))
        cond = None if cond is None else cut_batch(cond, batch_size)
        return self.p_sample_loop(cond, shape, return_intermediates=return_intermediates, **options)

    @torch.no_grad()
    def progressive_denoising(
        self, cond: Any, shape: Sequence[int], batch_size: int | None = None, start_T: int | None = None, **options: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Ancestral sampling that also gives the predicted x0 along the way. `shape` is (C, h, w) when `batch_size` is given."""
        if batch_size is not None:
            shape = (batch_size, *shape)
        cond = None if cond is None else cut_batch(cond, shape[0])
        return p_sample_loop(self, cond, shape, return_intermediates=True, keep="pred_x0", start=start_T, **options)

    # ------------------------------------------------------------------ logging
    @torch.no_grad()
    def sample_log(self, cond: Any, batch_size: int, ddim: bool, ddim_steps: int, shape: Sequence[int] | None = None, **kwargs: Any) -> Any:
        """Latents for the log: DDIM with `ddim_steps`, or all ancestral steps; gives (samples, intermediates).

        shape: (C, h, w) of one latent; the model's own when it is not given.
        """
        shape = default(shape, (self.channels, *self.sample_hw()))
        if not ddim:
            return self.sample(cond=cond, batch_size=batch_size, return_intermediates=True, shape=(batch_size, *shape), **kwargs)
        from ldm.models.diffusion.ddim import DDIMSampler

        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)

    def log_images(self, batch: dict[str, Any], N: int = 8, n_row: int = 4, **options: Any) -> dict[str, Tensor]:
        """Pictures for the training log; see `panels.latent_panels` for the options."""
        from ldm.models.diffusion.panels import draw_panels, latent_panels

        return draw_panels(latent_panels, self, batch, N=N, n_row=n_row, **options)
