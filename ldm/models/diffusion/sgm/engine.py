"""DiffusionEngine: network, denoiser, conditioner and first stage of a generative-models (SDXL) config in one LightningModule.

Owns the state-dict names of SDXL's checkpoints (`model.diffusion_model.*`, `conditioner.embedders.N.*`, `first_stage_model.*`).
What is particular to a model is in the parts that its config names. Over the timesteps of a discrete denoiser it has the same face as a
LatentDiffusion (`schedule`, `parameterization`, `apply_model`, `get_learned_conditioning`), so the samplers of LDM draw with it too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.models.diffusion.sgm.denoiser import DiscreteDenoiser
from ldm.models.diffusion.sgm.denoiser_scaling import EpsScaling, VScaling
from ldm.models.diffusion.sgm.sampling import Conditioning
from ldm.models.diffusion.sgm.wrappers import OpenAIWrapper
from ldm.modules.diffusionmodules.schedule import NoiseSchedule
from ldm.modules.ema import LitEma, ema_scope
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.modules.freezing import freeze
from ldm.modules.rates import with_schedule
from ldm.util import ConfigError, UserError, get_obj_from_str, instantiate_from_config, plain

__all__ = ["DiffusionEngine"]
log = logging.getLogger(__name__)

# What a picture's numbers are when nobody says it: those SDXL was trained towards (arXiv:2307.01952, Sec. 2.2). Heights before widths.
_USUAL = {
    "original_size_as_tuple": (1024, 1024),
    "crop_coords_top_left": (0, 0),
    "target_size_as_tuple": (1024, 1024),
    "aesthetic_score": (6.0,),
}


class DiffusionEngine(pl.LightningModule):
    """A diffusion model over noise levels. All `*_config` are `{target, params}`."""

    def __init__(
        self,
        network_config: Any,
        denoiser_config: Any,
        first_stage_config: Any,
        conditioner_config: Any = None,  # default: no conditioning
        sampler_config: Any = None,  # for `sample` and `log_images`
        optimizer_config: Any = None,  # default: AdamW
        scheduler_config: Any = None,  # learning-rate factor as a function of the step
        loss_fn_config: Any = None,  # for training
        network_wrapper: str | None = None,  # class that adapts the network's arguments; default: OpenAIWrapper
        ckpt_path: str | None = None,  # weights to start from
        use_ema: bool = False,
        ema_decay_rate: float = 0.9999,
        scale_factor: float = 1.0,  # latents are multiplied by it, for unit variance
        disable_first_stage_autocast: bool = False,  # SDXL's autoencoder overflows in half precision
        input_key: str = "jpg",  # batch entry of the images
        log_keys: Sequence[str] | None = None,  # unused: kept for old configs
        no_cond_log: bool = False,  # unused: kept for old configs
        compile_model: bool = False,
        en_and_decode_n_samples_a_time: int | None = None,  # limits memory; default: all at once
    ) -> None:
        super().__init__()
        wrapper = OpenAIWrapper if network_wrapper is None else get_obj_from_str(network_wrapper)
        self.model = wrapper(instantiate_from_config(network_config), compile_model=compile_model)
        self.denoiser = instantiate_from_config(denoiser_config)
        self.sampler = instantiate_from_config(sampler_config)
        self.conditioner = GeneralConditioner([]) if conditioner_config is None else instantiate_from_config(conditioner_config)
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        self.loss_fn = instantiate_from_config(loss_fn_config)
        self.optimizer_config, self.scheduler_config = plain(optimizer_config), plain(scheduler_config)
        self.use_ema = use_ema
        self.model_ema = LitEma(self.model, decay=ema_decay_rate) if use_ema else None
        self.scale_factor = scale_factor
        self.disable_first_stage_autocast = disable_first_stage_autocast
        self.input_key = input_key
        self.en_and_decode_n_samples_a_time = en_and_decode_n_samples_a_time
        self.learning_rate = 1e-4  # the launcher sets it from base_learning_rate
        self.schedule, self.parameterization = _timesteps(self.denoiser)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)

    def init_from_ckpt(self, path: str) -> None:
        """Fill the model from a .ckpt or .safetensors file; CheckpointError unless it fits."""
        from ldm.inference.checkpoint import load_weights  # lies above this layer

        load_weights(self, path)

    # -- first stage ----------------------------------------------------------------------------------------------------
    def _first_stage_precision(self, x: Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(x.device.type, enabled=False) if self.disable_first_stage_autocast else nullcontext()

    def _as_first_stage(self, x: Tensor) -> Tensor:
        """x in the dtype of the first stage's weights."""
        return x.to(next((p.dtype for p in self.first_stage_model.parameters()), x.dtype))

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> scaled latents, drawn from their posterior."""
        with self._first_stage_precision(x):
            chunks = x.split(self.en_and_decode_n_samples_a_time or len(x))
            return self.scale_factor * torch.cat([self.first_stage_model.encode(self._as_first_stage(chunk)) for chunk in chunks])

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Scaled latents -> images (B, C, H, W), nominally in [-1, 1] (not clamped)."""
        with self._first_stage_precision(z):
            chunks = (z / self.scale_factor).split(self.en_and_decode_n_samples_a_time or len(z))
            return torch.cat([self.first_stage_model.decode(self._as_first_stage(chunk)) for chunk in chunks])

    @torch.no_grad()
    def first_stage_posterior(self, x: Tensor) -> Any:
        """What the first stage says about images (B, C, H, W) in [-1, 1], before drawing and scaling: for `get_first_stage_encoding`."""
        with self._first_stage_precision(x):
            encode = getattr(self.first_stage_model, "posterior", self.first_stage_model.encode)
            return encode(self._as_first_stage(x))

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """Scaled latents: a draw where a distribution is given, the tensor itself otherwise."""
        z = encoder_posterior if isinstance(encoder_posterior, Tensor) else encoder_posterior.sample()
        return self.scale_factor * z

    # -- the face of a LatentDiffusion ----------------------------------------------------------------------------------
    @property
    def channels(self) -> int:
        """Of the latents."""
        network: Any = self.model.diffusion_model
        return int(network.out_channels)

    @property
    def input_keys(self) -> set[str]:
        """Entries of a batch that the conditioner reads."""
        embedders: Any = self.conditioner.embedders
        return {key for e in embedders for key in (e.input_keys if e.input_key is None else [e.input_key])}

    @property
    def zeroes_empty_prompts(self) -> bool:
        """Whether "no text" was zeros in training, as for SDXL's base, and not the embedding of "", as for its refiner and SD 2."""
        return {"original_size_as_tuple", "txt"} <= self.input_keys and "aesthetic_score" not in self.input_keys

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """The network's eps or v for x = sqrt(abar) x0 + sqrt(1 - abar) eps, which is what its preconditioning hands it."""
        return self.model(x_noisy, t, cond or {})

    @torch.no_grad()
    def get_learned_conditioning(
        self,
        c: Sequence[Any],  # prompts
        *,
        empty: Sequence[bool] | None = None,  # prompts of which nothing is to be seen: their embeddings are zero
        **numbers: Sequence[float],  # of the pictures, by batch entry: original_size_as_tuple=(H, W), ...; default: the usual ones
    ) -> dict[str, Tensor]:
        """The conditioning of prompts: {crossattn: (B, L, D), vector: (B, D)}."""
        if unknown := sorted(set(numbers) - self.input_keys):
            raise UserError(f"this model is not conditioned on {', '.join(unknown)}; it reads {', '.join(sorted(self.input_keys))}")
        batch: dict[str, Any] = {"txt": list(c)}
        for key in self.input_keys - {"txt"}:
            if key not in numbers and key not in _USUAL:
                raise UserError(f"this model is conditioned on {key!r}, which a prompt does not give")
            batch[key] = torch.tensor([list(numbers.get(key, _USUAL.get(key, ())))] * len(batch["txt"]), device=self.device)
        cond, _ = self.conditioner.get_unconditional_conditioning(batch)
        if empty is None or not any(empty):
            return cond
        blank, _ = self.conditioner.get_unconditional_conditioning(batch, force_cond_zero_embeddings=["txt"])
        rows = torch.tensor(list(empty), device=self.device)
        return {key: torch.where(rows.reshape(-1, *([1] * (value.ndim - 1))), blank[key], value) for key, value in cond.items()}

    # -- sampling -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def sample(
        self,
        cond: Conditioning,
        uc: Conditioning | None = None,
        batch_size: int = 16,
        shape: Sequence[int] | None = None,  # (C, h, w) of the latents
        **kwargs: Any,  # further arguments of the network
    ) -> Tensor:
        """Scaled latents (B, C, h, w), drawn by the sampler of the config."""
        if self.sampler is None:
            raise ConfigError("this model has no sampler: give sampler_config, or call a sampler of your own with model.denoise")
        if shape is None:
            raise UserError("sample() needs the shape (C, h, w) of the latents")
        noise = torch.randn(batch_size, *shape, device="cpu").to(self.device)  # the same numbers whatever the device
        return self.sampler(lambda x, sigma, c: self.denoise(x, sigma, c, **kwargs), noise, cond, uc=uc)

    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning, **kwargs: Any) -> Tensor:
        """x0 of x (B, C, h, w) at noise levels sigma (B,): what samplers take as their denoiser."""
        return self.denoiser(self.model, x, sigma, cond, **kwargs)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Inside, the averaged weights are in place (if there are any)."""
        with ema_scope(self.model_ema, self.model, context):
            yield

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, sample: bool = True, ucg_keys: Sequence[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures (B, C, H, W) in [-1, 1]: inputs, reconstructions and, if there is a sampler, samples for the same conditions.

        ucg_keys: input keys that are zero in the unconditional half; default: all.
        """
        x = self.get_input(batch)[:N].to(self.device)
        z = self.encode_first_stage(x)
        pictures = {"inputs": x, "reconstructions": self.decode_first_stage(z)}
        if sample and self.sampler is not None:
            keys = [e.input_key for e in self.conditioner.embedders if e.input_key is not None] if ucg_keys is None else ucg_keys
            few = {key: self._first(value, len(x)) for key, value in batch.items()}
            cond, uc = self.conditioner.get_unconditional_conditioning(few, force_uc_zero_embeddings=keys)
            with self.ema_scope("Plotting"):
                pictures["samples"] = self.decode_first_stage(self.sample(cond, uc, len(x), z.shape[1:]))
        return pictures

    def _first(self, value: Any, n: int) -> Any:
        """The first n rows of a batch entry, tensors on the model's device."""
        if isinstance(value, Tensor) and value.ndim:
            return value[:n].to(self.device)
        return value[:n] if isinstance(value, (list, tuple)) else value

    # -- training -------------------------------------------------------------------------------------------------------
    def get_input(self, batch: Mapping[str, Any]) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] under `input_key`; data sets that give (B, H, W, C) are turned."""
        if self.input_key not in batch:
            raise UserError(f"the batch has no {self.input_key!r} (input_key); it has {', '.join(map(str, batch))}")
        x = batch[self.input_key]
        return x.permute(0, 3, 1, 2).contiguous() if x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3) else x

    def forward(self, x: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of scaled latents x (B, C, h, w), and what to log."""
        if self.loss_fn is None:
            raise UserError("this model has no loss, so it can only be used, not trained: set loss_fn_config")
        loss = self.loss_fn(self.model, self.denoiser, self.conditioner, x, batch).mean()
        return loss, {"loss": loss}

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """As calling the model, from the images of a batch."""
        return self(self.encode_first_stage(self.get_input(batch)), batch)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        if "prior" in batch:
            raise UserError("the data brings a prior (DreamBooth), which this class does not train on: use ldm...ddpm.LatentDiffusion")
        loss, logs = self.shared_step(batch)
        self.log_dict(logs, prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the step into the average."""
        if self.model_ema is not None:
            self.model_ema(self.model)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those of the network, and of the embedders that are trained with it."""
        modules = [self.model, *(e for e in self.conditioner.embedders if e.is_trainable)]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def configure_optimizers(self) -> Any:
        """AdamW at `self.learning_rate`, or `optimizer_config` (whose own `lr` wins), times the schedule's factor at every step."""
        config = self.optimizer_config or {"target": "torch.optim.AdamW"}
        options = {"lr": self.learning_rate, **(config.get("params") or {})}
        optimizer = instantiate_from_config(config, params=self.trainable_parameters(), **options)
        return with_schedule(optimizer, self.scheduler_config)


def _timesteps(denoiser: Any) -> tuple[NoiseSchedule | None, str | None]:
    """The schedule of a discrete denoiser whose network is told the index of the level, and what it predicts; None for others."""
    kinds = {EpsScaling: "eps", VScaling: "v"}
    if not isinstance(denoiser, DiscreteDenoiser) or not denoiser.quantize_c_noise or type(denoiser.scaling) not in kinds:
        return None, None
    abar = getattr(denoiser.discretization, "alphas_cumprod", None)
    if abar is None or len(abar) != denoiser.num_idx:
        sigmas = denoiser.discretization(denoiser.num_idx, do_append_zero=False, flip=True).double()
        abar = (1.0 / (1.0 + sigmas**2)).numpy()
    return NoiseSchedule.from_abar(abar), kinds[type(denoiser.scaling)]
