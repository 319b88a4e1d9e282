"""From prompts (and perhaps a picture) to pictures: load a model, encode, sample, decode. Importable; the scripts are shells over it.

Knows no flags and writes no files; what becomes of the pictures (safety, watermark, metadata) is `session`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.imaging import to_tensor, to_uint8
from ldm.inference.args import SAMPLERS
from ldm.inference.checkpoint import load_weights
from ldm.inference.facts import read_config
from ldm.inference.prompts import MAX_SEED, Batch
from ldm.util import ConfigError, UserError, get_obj_from_str, instantiate_from_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn: all but the prompts and the seeds."""

    height: int  # of the picture in pixels
    width: int
    factor: int = 8  # pixels per latent pixel, along one side
    sampler: str = "ddim"
    steps: int = 50
    scale: float = 7.5  # classifier-free guidance, 1 is none
    eta: float = 0.0
    strength: float = 1.0  # with an init image: 0 gives it back (through the VAE), 1 starts from pure noise
    precision: str = "full"  # full | autocast (float16 on accelerators, full on the CPU) | bf16
    rng: str = "image"  # image: a generator a picture; legacy: torch's global one
    fixed_seed: int | None = None  # all pictures start from the noise of this seed


# ---------------------------------------------------------------------- loading
def pick_device(name: str = "auto") -> torch.device:
    """The device of a `--device` flag. `auto` is the accelerator where there is one. Raises `UserError` for one that is not there."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there or torch.device("cpu")
    if name != "cpu" and (there is None or there.type != name):
        raise UserError(f"device {name!r} is not available here: use --device {there.type if there else 'cpu'} or auto")
    return torch.device(name)


def load_model(
    config: str | Path,  # YAML with the key `model`
    ckpt: str | Path,  # its weights
    device: str | torch.device = "cpu",
    ema: str = "auto",  # averaged weights (ema), trained ones (raw), or averaged where the file has them (auto)
) -> Any:
    """A LatentDiffusion ready to draw: weights loaded and checked, float32, in eval mode, on `device`.

    Built without memory and filled from the file; a model that cannot be is built in memory first. Start weights and training
    losses that a training config names are left out: the checkpoint holds all that drawing needs.
    """
    model_config = read_config(config)["model"]
    _check_target(model_config.get("target"))
    model_config = drawing_config(model_config)
    model = _load_on_meta(model_config, ckpt, ema)
    if model is None:
        model = instantiate_from_config(model_config)
        load_weights(model, ckpt, ema=ema)
    return model.float().eval().requires_grad_(False).to(device)


def _load_on_meta(model_config: dict[str, Any], ckpt: str | Path, ema: str) -> Any:
    try:
        with torch.device("meta"):
            model = instantiate_from_config(model_config)
    except (NotImplementedError, RuntimeError) as error:  # a constructor that looks at its own values
        log.info("cannot be built without memory (%s)", error)
        return None
    if any(tensor.is_meta for tensor in _unsaved_buffers(model)):
        return None
    load_weights(model, ckpt, ema=ema)
    return model


def _unsaved_buffers(model: torch.nn.Module) -> Iterator[Tensor]:
    saved = set(model.state_dict())
    yield from (value for name, value in model.named_buffers() if name not in saved)


def _check_target(target: Any) -> None:
    cls = get_obj_from_str(target)
    if not (hasattr(cls, "apply_model") and hasattr(cls, "decode_first_stage")):
        raise ConfigError(f"{target} does not draw from prompts: the config must be of a LatentDiffusion")


def drawing_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config without what only training needs: start weights, the first stage's loss, a second copy for EMA."""
    config = _without_start_weights(config)
    params = {**(config.get("params") or {}), "use_ema": False}
    params.pop("ema_cond_stage", None)
    first_stage = params.get("first_stage_config")
    if isinstance(first_stage, dict) and "lossconfig" in (first_stage.get("params") or {}):
        stage_params = {**first_stage["params"], "lossconfig": {"target": "torch.nn.Identity"}}
        params["first_stage_config"] = {**first_stage, "params": stage_params}
    return {**config, "params": params}


def _without_start_weights(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_start_weights(value) for key, value in config.items() if key != "ckpt_path"}
    return [_without_start_weights(item) for item in config] if isinstance(config, list) else config


# ---------------------------------------------------------------------- noise
class ImageNoise:
    """Standard normal noise in which picture i of a batch draws everything from its own CPU generator.

    So a picture depends neither on the others in its batch nor on the device.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """(B, ...) with B the number of seeds."""
        if shape[0] != len(self.generators):
            raise ValueError(f"noise for {shape[0]} pictures was asked of {len(self.generators)} generators")
        rows = [torch.randn(tuple(shape[1:]), generator=generator) for generator in self.generators]
        return torch.stack(rows).to(device, dtype)


# ---------------------------------------------------------------------- drawing
class Text2Image:
    """Draws batches of pictures with one model and one group of settings; with an init image it is img2img."""

    def __init__(
        self,
        model: Any,  # a LatentDiffusion
        settings: Settings,
        init_image: np.ndarray | None = None,  # uint8 (height, width, 3)
        progress: bool = False,  # a bar a batch
    ) -> None:
        if settings.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {settings.sampler!r}: use one of {', '.join(SAMPLERS)}")
        if init_image is not None and init_image.shape[:2] != (settings.height, settings.width):
            raise UserError(f"the init image is {init_image.shape[1]}x{init_image.shape[0]}, not {settings.width}x{settings.height}")
        self.model, self.settings, self.progress = model, settings, progress
        self.init_image = init_image
        self.sampler_class = get_obj_from_str(SAMPLERS[settings.sampler])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def generate(
        self,
        prompts: Sequence[str],
        negative: str = "",
        seed: int = 0,  # of picture 0; picture k gets seed + k
        batch_size: int = 4,
    ) -> Iterator[list[np.ndarray]]:
        """Draw a picture a prompt, batch by batch: lists of uint8 (H, W, 3)."""
        from ldm.inference.prompts import plan

        for batch in plan(prompts, negative, seed % (MAX_SEED + 1), 1, batch_size):
            yield self.draw(batch)

    @torch.inference_mode()
    def draw(self, batch: Batch) -> list[np.ndarray]:
        """Draw one batch: uint8 (H, W, 3) a prompt. Raises `UserError` when numbers overflow or memory runs out."""
        try:
            with self.model.ema_scope():
                latents = self._sample(batch)
                _check_finite(latents, "UNet", self.settings.precision)
                return list(to_uint8(self._decode(latents)))
        except torch.OutOfMemoryError:
            raise UserError("out of memory: draw fewer at once (--n_samples 1), smaller (--H, --W), or with --precision bf16") from None

    def _sample(self, batch: Batch) -> Tensor:
        s, n = self.settings, len(batch)
        noise = ImageNoise(batch.seeds) if s.rng == "image" else None
        sampler = self.sampler_class(self.model, noise=noise)
        with self._autocast():
            cond = self.model.get_learned_conditioning(list(batch.prompts))
            uncond = self.model.get_learned_conditioning(list(batch.negatives)) if s.scale != 1.0 else None
            guidance = {"unconditional_guidance_scale": s.scale, "unconditional_conditioning": uncond}
            if self.init_image is None:
                shape = (self.model.channels, s.height // s.factor, s.width // s.factor)
                x_T = self._start(noise, (n, *shape))
                return sampler.sample(s.steps, n, shape, cond, eta=s.eta, x_T=x_T, verbose=self.progress, **guidance)[0]
            z0 = self._encode(self.init_image).expand(n, -1, -1, -1)  # (B, C, h, w)
            sampler.make_schedule(s.steps, ddim_eta=s.eta, verbose=False)
            t_start = int(s.strength * len(sampler.ddim_timesteps))  # the grid may have a step more than was asked for
            if t_start == 0:
                return z0
            x = sampler.stochastic_encode(z0, t_start, noise=self._start(noise, z0.shape))
            return sampler.decode(x, cond, t_start, verbose=self.progress, **guidance)

    def _start(self, noise: ImageNoise | None, shape: Sequence[int]) -> Tensor | None:
        """The noise that sampling starts from; None leaves it to the sampler."""
        s = self.settings
        own = None if noise is None else noise(shape, self.device, torch.float32)
        if s.fixed_seed is None:
            return own
        return ImageNoise([s.fixed_seed])((1, *shape[1:]), self.device, torch.float32).expand(*shape)

    def _encode(self, image: np.ndarray) -> Tensor:
        return self._scaled(self.model.encode_first_stage(to_tensor(image).to(self.device))).float()

    def _scaled(self, encoded: Any) -> Tensor:
        """The latent to start from: with generators of their own the posterior's mode, for legacy numbers a sample of it."""
        if self.settings.rng == "image" and hasattr(encoded, "mode"):
            encoded = encoded.mode()
        return self.model.get_first_stage_encoding(encoded)

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W). In float32 unless bf16 was asked for, and again in float32 should bf16 overflow."""
        with self._autocast() if self.settings.precision == "bf16" else nullcontext():
            pixels = self.model.decode_first_stage(latents)
        if self.settings.precision == "bf16" and not torch.isfinite(pixels).all():
            log.warning("the VAE overflowed in bf16: decoding again in float32")
            pixels = self.model.decode_first_stage(latents)
        _check_finite(pixels, "VAE", "full")
        return pixels

    def _autocast(self) -> AbstractContextManager[Any]:
        kind, precision = self.device.type, self.settings.precision
        if precision == "bf16":
            return torch.autocast(kind, torch.bfloat16)
        return torch.autocast(kind, torch.float16) if precision == "autocast" and kind != "cpu" else nullcontext()


def _check_finite(x: Tensor, part: str, precision: str) -> None:
    if not torch.isfinite(x).all():
        cure = "try --precision full, or bf16" if precision != "full" else "the weights are damaged, or do not fit the config"
        raise UserError(f"the {part} gave NaN or infinite numbers: {cure}")


# ---------------------------------------------------------------------- legacy random numbers
def rng_state(device: torch.device) -> list[bytes]:
    """States of the global generators that sampling on `device` draws from: the CPU's, and the accelerator's where used."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return [state.cpu().numpy().tobytes() for state in states]


def set_rng_state(states: Sequence[bytes], device: torch.device) -> None:
    """Put back what `rng_state` gave."""
    tensors = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
    if len(tensors) != (1 if device.type == "cpu" else 2):
        raise UserError(f"the recorded random state is of another kind of device than {device.type}")
    torch.set_rng_state(tensors[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[1])


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Run with `count` CPU threads (None: as it is): sums are split among threads, so bits depend on their number."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
