"""One run of a script: everything loaded once, batches in, finished pictures out.

Owns the order in which a picture is finished and what a batch's own settings change. Flags are checked before (`args`); files are
written by `output`; what a picture says about itself is in `record`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ldm.inference import record
from ldm.inference.additions import check_word, embedding_spec, lora_spec
from ldm.inference.facts import SHIPPED_CONFIG, read_config
from ldm.inference.film import Film, film_bytes
from ldm.inference.models import half_type, load_model, load_vae, pick_device, store_in_half
from ldm.inference.noise import rng_state, set_rng_state, threads
from ldm.inference.options import Options
from ldm.inference.output import metadata_texts, read_metadata
from ldm.inference.pipeline import Pipeline, Settings, check_walk
from ldm.inference.prompts import Batch, plan
from ldm.inference.safety import SafetyFilter, Verdict, check_safety_files, load_safety
from ldm.inference.tasks import get_task
from ldm.inference.watermark import Watermarker
from ldm.inference.weights.embedding_files import add_embeddings, read_embedding
from ldm.inference.weights.lora_files import merge_loras
from ldm.models.tiling import Tiling
from ldm.util import UserError, trust

log = logging.getLogger(__name__)


@dataclass
class Picture:
    """A picture on its way through the finishing steps."""

    image: np.ndarray  # uint8 (H, W, 3)
    index: int  # within its batch
    frames: list[np.ndarray] = field(default_factory=list)  # with --save_progress: its way from noise, without itself
    verdict: Verdict | None = None  # of the safety check
    mark: str = "none"  # ok | unreadable | too small | none
    record: dict[str, Any] = field(default_factory=dict)  # how it was drawn
    texts: dict[str, str] = field(default_factory=dict)  # PNG metadata

    @property
    def flagged(self) -> bool:
        """Whether the safety check fired."""
        return self.verdict is not None and self.verdict.flagged

    def film(self, kind: str) -> bytes | None:
        """Its way from noise as `gif` or `webp`; None where there is none to show."""
        return film_bytes([*self.frames, self.image], kind, self.texts["parameters"]) if self.frames else None


class Session:
    """Loads what `options` name, draws batches, finishes pictures."""

    def __init__(self, options: Options, progress: bool = False) -> None:
        """Cheap checks first, weights last. Raises `UserError`."""
        self.options, self.task, self.progress = options, get_task(options.task), progress
        self.device = pick_device(options.device)
        self.recorded = read_metadata(options.reproduce) if options.reproduce else None
        self.threads = record.thread_count(self.recorded)
        self._inputs: tuple[Any, dict[str, np.ndarray]] | None = None
        kinds = {json.dumps(batch.overrides, sort_keys=True): batch for batch in self.batches()}
        walks = [self.settings(self.options_of(batch)) for batch in kinds.values()]
        for settings in {(each.sampler, str(each.walk)): each for each in walks}.values():
            check_walk(settings)
        inputs = self.inputs(options) if set(kinds) == {"{}"} else {}  # others are read when their turn comes
        safety_path = options.safety_ckpt or SHIPPED_CONFIG.parent
        if options.safety != "off":
            check_safety_files(safety_path)
        for path, word in map(embedding_spec, options.embedding):
            check_word(path, word or read_embedding(path).word)
        trust(*options.trust)
        if self.recorded is not None:
            name, device = str(options.reproduce), self.device.type
            record.check_record(self.recorded, name, self.weights, input_hashes(inputs), self.task.files, device)
        self.safety = SafetyFilter(None if options.safety == "off" else load_safety(safety_path, self.device), options.safety)
        self.watermark = Watermarker(options.watermark, options.watermark_text)
        model_config, left_out = self.task.model_config(options, read_config(options.config)["model"])
        self.model = load_model({"model": model_config}, options.ckpt, self.device, options.ema, left_out)
        if options.vae is not None:
            load_vae(self.model, options.vae)
        self.refiner = None if options.refiner is None else load_model(options.refiner_config, options.refiner, self.device, options.ema)
        self._add(options)
        if (dtype := half_type(self.device, options.precision)) is not None:
            for model in (self.model, self.refiner):
                if model is not None:
                    store_in_half(model.model, dtype)
        if options.precision == "bf16":  # decodes in it too, a seventh faster with the channels innermost
            self.model.first_stage_model.to(memory_format=torch.channels_last)
        if options.rng == "legacy":
            torch.manual_seed(options.seed)

    def _add(self, options: Options) -> None:
        """LoRAs, into the model, and learnt words, into the refiner too. The options keep weights and words as used, for the record."""
        if options.lora:
            loras = [lora_spec(text) for text in options.lora]
            merge_loras(self.model, loras)
            options.lora = [f"{path}:{weight!r}" for path, weight in loras]
        if options.embedding:
            specs = [embedding_spec(text) for text in options.embedding]
            words = add_embeddings(self.model, specs)
            if self.refiner is not None:
                add_embeddings(self.refiner, specs)
            options.embedding = [f"{path}:{word}" for (path, _), word in zip(specs, words, strict=True)]
            texts = "\n".join(text for batch in self.batches() for text in (*batch.prompts, *batch.negatives)).lower()
            for (path, _), word in zip(specs, words, strict=True):
                if word.lower() not in texts:
                    log.warning("no prompt has the word %r of --embedding %s", word, path)

    def settings(self, o: Options) -> Settings:
        """The pipeline's settings of these options."""
        numbers: dict[str, Sequence[float]] = {
            "original_size_as_tuple": o.original_size or [o.H, o.W],
            "crop_coords_top_left": o.crop or [0, 0],
            "target_size_as_tuple": o.target_size or [o.H, o.W],
            "aesthetic_score": [o.aesthetic_score],
        }
        return Settings(
            height=o.H,
            width=o.W,
            factor=o.f,
            sampler=o.sampler,
            steps=o.steps,
            spacing=o.spacing,
            scale=o.scale,
            guidance_rescale=o.guidance_rescale,
            eta=o.ddim_eta,
            strength=1.0 if (strength := getattr(o, "strength", None)) is None else strength,
            precision=o.precision,
            rng=o.rng,
            fixed_seed=o.seed if o.fixed_code else None,
            prompt_syntax=o.prompt_syntax,
            clip_skip=o.clip_skip,
            numbers=numbers,
            negative_numbers={"aesthetic_score": [o.negative_aesthetic_score]},
            refiner_start=o.refiner_start,
            tiling=None if o.tile is None else Tiling(o.tile, o.tile_overlap or 0),
            shifted_levels=True if self.recorded is not None and record.is_first_version(self.recorded) else None,
        )

    def inputs(self, options: Options) -> dict[str, np.ndarray]:
        """The task's picture files as arrays; the last ones are kept."""
        if self._inputs is None or self._inputs[0] != options:
            self._inputs = (options, self.task.read(options))
        return self._inputs[1]

    # ------------------------------------------------------------------ the run
    def batches(self) -> Iterator[Batch]:
        """What is to be drawn, in order; the one recorded batch when a picture is drawn again."""
        o = self.options
        if self.recorded is None:
            yield from plan(o.prompts, o.negative_prompt, o.seed, o.n_iter, o.batch)
        else:
            yield record.recorded_batch(self.recorded, str(o.reproduce))[0]

    def options_of(self, batch: Batch) -> Options:
        """The run's options with what the batch's lines say in their place."""
        return dataclasses.replace(self.options, **batch.overrides) if batch.overrides else self.options

    def pipeline(self, options: Options) -> Pipeline:
        """A pipeline over the loaded models."""
        return Pipeline(self.model, self.settings(options), self.task, options, self.inputs(options), self.progress, self.refiner)

    def pictures(self, batch: Batch) -> list[Picture]:
        """Draw a batch and finish it; only the picture asked for when one is drawn again."""
        options = self.options_of(batch)
        _ = self.weights  # hashed before drawing: what is wrong with a file must not cost a batch
        pipeline = self.pipeline(options)
        film = Film(options.progress_every) if options.save_progress else None
        with threads(self.threads):
            state = self._legacy_state()
            images = pipeline.draw(batch, film)
            pictures = [Picture(image, i, film.of(i) if film else []) for i, image in enumerate(images)]
            if self.recorded is not None:
                pictures = [pictures[record.recorded_batch(self.recorded, str(options.reproduce))[1]]]
            return self.finish(pictures, batch, state)

    # ------------------------------------------------------------------ finishing
    def finish(self, pictures: list[Picture], batch: Batch, state: Sequence[bytes] | None = None) -> list[Picture]:
        """Everything that happens to pictures between the sampler and the file: this list, in this order; then they may be written."""
        options = self.options_of(batch)
        self._check_safety(pictures)
        self._mark(pictures)
        self._describe(pictures, batch, options, state)
        return pictures

    def _check_safety(self, pictures: list[Picture]) -> None:
        """Flagged pictures and frames are replaced or named. A replaced picture keeps no way from noise."""
        images, verdicts = self.safety([picture.image for picture in pictures])
        for picture, image, verdict in zip(pictures, images, verdicts, strict=True):
            picture.image, picture.verdict = image, verdict
            if picture.frames and picture.flagged and self.options.safety == "card":
                picture.frames = []
            elif picture.frames:
                picture.frames = self.safety(picture.frames)[0]

    def _mark(self, pictures: list[Picture]) -> None:
        """The invisible watermark."""
        for picture in pictures:
            marked = self.watermark(picture.image)
            picture.image, picture.mark = marked.image, marked.status
            picture.frames = [self.watermark(frame).image for frame in picture.frames]

    def _describe(self, pictures: list[Picture], batch: Batch, options: Options, state: Sequence[bytes] | None) -> None:
        """The metadata."""
        inputs = input_hashes(self.inputs(options))
        for picture in pictures:
            picture.record = record.describe(
                options,
                batch,
                picture.index,
                weights=self.weights,
                inputs=inputs,
                device=self.device.type,
                threads=self.threads,
                rng_state=state,
            )
            picture.record["watermark"] = {"method": options.watermark, "status": picture.mark}
            if picture.verdict is not None:
                picture.record["safety"] = {"flagged": picture.flagged, "scores": list(picture.verdict.scores)}
            picture.texts = metadata_texts(picture.record)

    @cached_property
    def weights(self) -> dict[str, dict[str, str]]:
        """Where the weights lie, and their hashes."""
        return record.weights_hashes(self.options)

    def _legacy_state(self) -> list[bytes] | None:
        """With --rng legacy: the global generators' states before a batch, put back first when it is drawn again."""
        if self.options.rng != "legacy":
            return None
        if self.recorded is not None:
            try:
                set_rng_state(record.recorded_rng(self.recorded, str(self.options.reproduce)), self.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"the random state in {self.options.reproduce!r} cannot be used: {error}") from None
        return rng_state(self.device)


def input_hashes(inputs: Mapping[str, np.ndarray]) -> dict[str, str]:
    """SHA-256 of the pixels of every picture that a task has read, by name."""
    return {name: hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() for name, pixels in inputs.items()}
