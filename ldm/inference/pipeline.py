"""From prompts (and perhaps pictures) to pictures: condition, sample, decode. Importable; the scripts are shells over it.

What is particular to a script comes from its task as a `Condition`. Knows no flags and writes no files; what becomes of the pictures
(safety, watermark, metadata) is `session`'s business.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.imaging import to_tensor, to_uint8
from ldm.inference.film import Film
from ldm.inference.models import drawing_config, half_type, load_model, pick_device
from ldm.inference.noise import ImageNoise, rng_state, set_rng_state, threads
from ldm.inference.prompt_syntax import read
from ldm.inference.prompts import MAX_SEED, Batch
from ldm.inference.tasks import get_task
from ldm.inference.tasks.base import Condition, Task
from ldm.models.diffusion.denoiser import schedule_of
from ldm.models.diffusion.registry import make_sampler
from ldm.models.diffusion.sampler import Grid, Sampler, Step
from ldm.models.tiling import TiledDenoiser, Tiling, tiled
from ldm.modules.diffusionmodules.schedule import NoiseSchedule, make_beta_schedule
from ldm.util import UserError

__all__ = [
    "ImageNoise",
    "Pipeline",
    "Settings",
    "Text2Image",
    "check_walk",
    "drawing_config",
    "load_model",
    "pick_device",
    "rng_state",
    "set_rng_state",
    "threads",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn, whatever the task: all but the prompts and the seeds."""

    height: int  # of the picture in pixels
    width: int
    factor: int = 8  # pixels per latent pixel, along one side
    sampler: str = "ddim"
    steps: int = 50
    spacing: str | None = None  # of the timesteps; None is the sampler's own
    scale: float = 7.5  # classifier-free guidance, 1 is none
    guidance_rescale: float = 0.0  # 0 to 1
    eta: float | None = None  # None is the sampler's own
    strength: float = 1.0  # with an init image: 0 gives it back (through the VAE), 1 starts from pure noise
    precision: str = "full"  # full | autocast (float16 on accelerators, full on the CPU) | bf16
    rng: str = "image"  # image: a generator a picture; legacy: torch's global one
    fixed_seed: int | None = None  # all pictures start from the noise of this seed
    prompt_syntax: str = "plain"
    clip_skip: int | None = None  # None is the model's own
    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict)  # SDXL: sizes, crop, aesthetic score, by batch entry
    negative_numbers: Mapping[str, Sequence[float]] = field(default_factory=dict)  # those of the negative prompt
    refiner_start: float = 0.8  # share of the grid that the base walks, where there is a refiner
    tiling: Tiling | None = None  # tiles in pixels, for large canvases in bounded memory
    shifted_levels: bool | None = None  # where an init image is noised to, see `Sampler.stochastic_encode`; None is the sampler's own

    @property
    def walk(self) -> dict[str, Any]:
        """What `make_schedule` takes: number of steps, and what differs from the sampler's own."""
        chosen = {"ddim_eta": self.eta, "ddim_discretize": self.spacing}
        return {"ddim_num_steps": self.steps, "verbose": False, **{name: value for name, value in chosen.items() if value is not None}}


def check_walk(settings: Settings, schedule: NoiseSchedule | None = None) -> None:
    """Refuse, before any weight is read, what the sampler cannot do. Raises `UserError`."""
    schedule = schedule or NoiseSchedule(make_beta_schedule("linear", max(1000, settings.steps)))
    make_sampler(settings.sampler, SimpleNamespace(schedule=schedule, device="cpu")).make_schedule(**settings.walk)


class Pipeline:
    """Draws batches of pictures with one model, one task and one group of settings."""

    def __init__(
        self,
        model: Any,  # a LatentDiffusion
        settings: Settings,
        task: Task | str = "txt2img",
        own: Any = None,  # the task's own options
        inputs: Mapping[str, np.ndarray] | None = None,  # what the task reads: uint8 (height, width, 3) or masks, by option
        progress: bool = False,  # a bar a batch
        refiner: Any = None,  # a second model over the same latents, for the last steps
    ) -> None:
        check_walk(settings, schedule_of(model))
        if refiner is not None:
            _check_refiner(model, refiner)
        self.model, self.refiner, self.settings, self.progress = model, refiner, settings, progress
        self.task = get_task(task) if isinstance(task, str) else task
        self.own, self.inputs = own, dict(inputs or {})
        self.noise: ImageNoise | None = None  # of the batch that is being drawn; None: the global generator

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a picture of the settings' size."""
        s = self.settings
        return (self.model.channels, s.height // s.factor, s.width // s.factor)

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
    def draw(self, batch: Batch, film: Film | None = None) -> list[np.ndarray]:
        """Draw one batch: uint8 (H, W, 3) a prompt; `film` gets the way there.

        Raises `UserError` when numbers overflow or memory runs out.
        """
        self.noise = ImageNoise(batch.seeds) if self.settings.rng == "image" else None
        try:
            with self.model.ema_scope(), tiled(self.model, self.settings.tiling) if self.settings.tiling else nullcontext():
                with self._autocast():
                    condition = self.task.condition(self, batch)
                    if self.refiner is not None and condition.refined is None:
                        condition.refined = self.encode_text(batch, self.refiner)
                    latents = self._sample(condition, len(batch), film)
                _check_finite(latents, "UNet", self.settings.precision)
                return self._pictures(latents, condition)
        except (MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            cures = "fewer at once (--n_samples 1), smaller (--H, --W), in tiles (--tile), or with --precision bf16"
            raise UserError(f"out of memory: draw {cures}") from None

    # ------------------------------------------------------------------ what tasks use
    def encode_text(self, batch: Batch, model: Any = None) -> tuple[Any, Any]:
        """Conditions of the batch's prompts and, with guidance, of its negative prompts (else None); `model` may be the refiner."""
        s, model = self.settings, self.model if model is None else model
        groups = [batch.prompts, batch.negatives] if s.scale != 1.0 else [batch.prompts]
        texts = read(model, groups, syntax=s.prompt_syntax, clip_skip=s.clip_skip)
        known = getattr(model, "input_keys", None)  # of a DiffusionEngine
        if known is None:
            found = [model.get_learned_conditioning(group) for group in texts]
        else:
            numbers = [{key: value for key, value in n.items() if key in known} for n in (s.numbers, {**s.numbers, **s.negative_numbers})]
            empty = [text == "" for text in batch.negatives] if model.zeroes_empty_prompts else None
            found = [model.get_learned_conditioning(texts[0], **numbers[0])]
            found += [model.get_learned_conditioning(group, empty=empty, **numbers[1]) for group in texts[1:]]
        return found[0], found[1] if len(found) > 1 else None

    def encode(self, image: np.ndarray | Tensor) -> Tensor:
        """uint8 (H, W, 3), or (B, 3, H, W) in [-1, 1], to scaled latents (B, C, h, w), float32."""
        x = (image if isinstance(image, Tensor) else to_tensor(image)).to(self.device)
        first_stage = getattr(self.model, "first_stage_posterior", self.model.encode_first_stage)
        return self._scaled(first_stage(x)).float()

    def _scaled(self, encoded: Any) -> Tensor:
        """The latent to start from: with generators of their own the posterior's mode, for legacy numbers a sample of it."""
        if self.settings.rng == "image" and not isinstance(encoded, Tensor):
            encoded = encoded.mode()
        return self.model.get_first_stage_encoding(encoded)

    # ------------------------------------------------------------------ sampling
    def _sample(self, condition: Condition, n: int, film: Film | None) -> Tensor:
        """Scaled latents (B, C, h, w)."""
        shape = (n, *condition.shape)
        sampler, whole = self._sampler(self.model)
        x0 = None if condition.x0 is None else condition.x0.expand(*shape)
        t_start = int(condition.strength * len(whole))  # the grid may have a step more than was asked for
        if x0 is not None and t_start == 0:
            return x0
        start = self._start(shape)
        x = start if x0 is None else sampler.stochastic_encode(x0, t_start, noise=start)
        steps = self._walk(sampler, whole, whole.last(t_start), x, condition, x0)
        for step in tqdm(steps, desc=f"{sampler.name} sampling", total=t_start, disable=not self.progress):
            x = step.x
            if film is not None and film.wants(step.index, t_start):
                film.frames.append(self._pictures(step.pred_x0, condition))
        return x if condition.mask is None or x0 is None else torch.where(condition.mask.to(x) > 0.5, x0.to(x), x)

    def _sampler(self, model: Any) -> tuple[Sampler, Grid]:
        """The settings' sampler for `model`, and the steps of its whole walk."""
        s = self.settings
        if s.tiling is not None:
            cells = s.tiling.divided(s.factor)
            model = TiledDenoiser(model, cells.tile, cells.overlap)
        sampler = make_sampler(s.sampler, model, noise=self.noise)
        if s.shifted_levels is not None:
            sampler.shifted_levels = s.shifted_levels
        return sampler, sampler.make_schedule(**s.walk)

    def _walk(self, sampler: Sampler, whole: Grid, grid: Grid, x: Tensor, condition: Condition, x0: Tensor | None) -> Iterator[Step]:
        """The steps along `grid`, the end of `whole`; the last of them the refiner's where there is one."""
        s = self.settings
        options: dict[str, Any] = {"unconditional_guidance_scale": s.scale, "guidance_rescale": s.guidance_rescale}
        if condition.mask is not None:
            options |= {"mask": condition.mask, "x0": x0}
        base = sampler.walk(grid, x, condition.cond, unconditional_conditioning=condition.uncond, **options)
        if self.refiner is None:
            yield from base
            return
        assert condition.refined is not None
        share = hand_over(whole, grid, s.refiner_start)
        for step in islice(base, share):
            x = step.x
            yield step
        cond, uncond = condition.refined
        rest = self._sampler(self.refiner)[0].walk(grid.last(len(grid) - share), x, cond, unconditional_conditioning=uncond, **options)
        with self.refiner.ema_scope():
            for step in rest:
                yield replace(step, index=step.index + share)

    def _start(self, shape: Sequence[int]) -> Tensor:
        """The noise that sampling starts from, (B, C, h, w)."""
        s = self.settings
        own = None if self.noise is None else self.noise(shape, self.device, torch.float32)
        if s.fixed_seed is not None:
            return ImageNoise([s.fixed_seed])((1, *shape[1:]), self.device, torch.float32).expand(*shape)
        return torch.randn(tuple(shape), device=self.device) if own is None else own

    # ------------------------------------------------------------------ decoding
    def _pictures(self, latents: Tensor, condition: Condition) -> list[np.ndarray]:
        """uint8 (H, W, 3) a latent."""
        images = list(to_uint8(self._decode(latents)))
        return images if condition.finish is None else [condition.finish(image, i) for i, image in enumerate(images)]

    def _decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W). In float32 unless bf16 was asked for, and again in float32 should bf16 overflow."""
        full = torch.autocast(self.device.type, enabled=False)  # the frames of a film are decoded amid the sampling
        with self._autocast() if self.settings.precision == "bf16" else full:
            pixels = self.model.decode_first_stage(latents)
        if self.settings.precision == "bf16" and not torch.isfinite(pixels).all():
            log.warning("the VAE overflowed in bf16: decoding again in float32")
            with full:
                pixels = self.model.decode_first_stage(latents)
        _check_finite(pixels, "VAE", "full")
        return pixels

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = half_type(self.device, self.settings.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


class Text2Image(Pipeline):
    """A pipeline for prompts; with an init image it is img2img at `settings.strength`."""

    def __init__(
        self,
        model: Any,  # a LatentDiffusion
        settings: Settings,
        init_image: np.ndarray | None = None,  # uint8 (height, width, 3)
        progress: bool = False,
    ) -> None:
        if init_image is not None and init_image.shape[:2] != (settings.height, settings.width):
            raise UserError(f"the init image is {init_image.shape[1]}x{init_image.shape[0]}, not {settings.width}x{settings.height}")
        inputs = {} if init_image is None else {"init_img": init_image}
        super().__init__(model, settings, "img2img" if inputs else "txt2img", inputs=inputs, progress=progress)


def hand_over(whole: Grid, walked: Grid, share: float) -> int:
    """How many steps of `walked`, the end of `whole`, are the base's when the refiner takes over after `share` of the whole grid.

    Stages of one larger step stay together.
    """
    here = min(max(round(share * len(whole)) - (len(whole) - len(walked)), 0), len(walked))
    groups = np.asarray(walked.group).tolist()
    while 0 < here < len(groups) and groups[here] == groups[here - 1]:
        here += 1
    return here


def _check_refiner(model: Any, refiner: Any) -> None:
    """Both must mean the same by a latent and by a timestep."""
    ours, theirs = schedule_of(model).abar, schedule_of(refiner).abar
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
        raise UserError("the refiner was trained on another noise schedule than the model: name the refiner of this model by --refiner")
    for name in ("channels", "scale_factor"):
        own, other = float(getattr(model, name)), float(getattr(refiner, name))
        if abs(own - other) > 1e-3 * abs(own):
            raise UserError(f"the refiner has {name} {other:g}, the model {own:g}: they must share their latents")


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out. On the CPU torch says so in words only."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _check_finite(x: Tensor, part: str, precision: str) -> None:
    if not torch.isfinite(x).all():
        cure = "try --precision full, or bf16" if precision != "full" else "the weights are damaged, or do not fit the config"
        raise UserError(f"the {part} gave NaN or infinite numbers: {cure}")
