"""One run of txt2img or img2img: everything loaded once, batches in, finished pictures out.

Owns the order in which a picture is finished (safety check, watermark, metadata, write) and the record from which `--reproduce`
draws it again. Flags are checked before (`args`); files are written by `output`.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ldm
from ldm.imaging import fit_image, load_image
from ldm.inference.args import Options
from ldm.inference.facts import REPO, SHIPPED_CONFIG
from ldm.inference.output import metadata_texts, read_metadata
from ldm.inference.pipeline import Settings, Text2Image, load_model, pick_device, rng_state, set_rng_state, threads
from ldm.inference.prompts import MAX_SEED, Batch, plan
from ldm.inference.safety import SafetyFilter, Verdict, check_safety_files, load_safety
from ldm.inference.watermark import Watermarker
from ldm.util import CheckpointError, UserError, trust

log = logging.getLogger(__name__)


@dataclass
class Picture:
    """A picture on its way through the finishing steps."""

    image: np.ndarray  # uint8 (H, W, 3)
    index: int  # within its batch
    verdict: Verdict | None = None  # of the safety check
    mark: str = "none"  # ok | unreadable | too small | none
    texts: dict[str, str] = field(default_factory=dict)  # PNG metadata

    @property
    def flagged(self) -> bool:
        """Whether the safety check fired."""
        return self.verdict is not None and self.verdict.flagged


class Session:
    """Loads what `options` name, draws batches, finishes pictures."""

    def __init__(self, options: Options, progress: bool = False) -> None:
        """Cheap checks first, weights last. Raises `UserError`."""
        self.options = options
        self.device = pick_device(options.device)
        self.recorded = read_metadata(options.reproduce) if options.reproduce else None
        self.threads = _thread_count(self.recorded)
        self.init_image, self.init_hash = self._read_init_image()
        safety_path = options.safety_ckpt or SHIPPED_CONFIG.parent
        if options.safety != "off":
            check_safety_files(safety_path)
        trust(*options.trust)
        self._check_record()
        self.safety = SafetyFilter(None if options.safety == "off" else load_safety(safety_path, self.device), options.safety)
        self.watermark = Watermarker(options.watermark, options.watermark_text)
        model = load_model(options.config, options.ckpt, self.device, options.ema)
        self.pipeline = Text2Image(model, self._settings(), self.init_image, progress)
        if options.rng == "legacy":
            torch.manual_seed(options.seed)

    def _settings(self) -> Settings:
        o = self.options
        return Settings(
            height=o.H,
            width=o.W,
            factor=o.f,
            sampler=o.sampler,
            steps=o.steps,
            scale=o.scale,
            eta=o.ddim_eta,
            strength=1.0 if o.strength is None else o.strength,
            precision=o.precision,
            rng=o.rng,
            fixed_seed=o.seed if o.fixed_code else None,
        )

    def _read_init_image(self) -> tuple[np.ndarray | None, str | None]:
        o = self.options
        if not o.init_img:
            return None, None
        image = fit_image(load_image(o.init_img), o.W, o.H, o.fit)
        pixels = np.asarray(image)
        return pixels, hashlib.sha256(pixels.tobytes()).hexdigest()

    # ------------------------------------------------------------------ the run
    def batches(self) -> Iterator[Batch]:
        """What is to be drawn, in order; the one recorded batch when a picture is drawn again."""
        o = self.options
        if self.recorded is None:
            yield from plan(o.prompts, o.negative_prompt, o.seed, o.n_iter, o.n_samples)
        else:
            yield recorded_batch(self.recorded, str(o.reproduce))[0]

    def pictures(self, batch: Batch) -> list[Picture]:
        """Draw a batch and finish it; only the picture asked for when one is drawn again."""
        with threads(self.threads):
            state = self._legacy_state()
            pictures = [Picture(image, index) for index, image in enumerate(self.pipeline.draw(batch))]
            if self.recorded is not None:
                pictures = [pictures[recorded_batch(self.recorded, str(self.options.reproduce))[1]]]
            return self.finish(pictures, batch, state)

    def finish(self, pictures: list[Picture], batch: Batch, state: Sequence[bytes] | None = None) -> list[Picture]:
        """Safety check, watermark, metadata, in this order; then a picture may be written."""
        self._check_safety(pictures)
        for picture in pictures:
            marked = self.watermark(picture.image)
            picture.image, picture.mark = marked.image, marked.status
        for picture in pictures:
            picture.texts = metadata_texts(self._describe(picture, batch, state))
        return pictures

    def _check_safety(self, pictures: list[Picture]) -> None:
        images, verdicts = self.safety([picture.image for picture in pictures])
        for picture, image, verdict in zip(pictures, images, verdicts, strict=True):
            picture.image, picture.verdict = image, verdict

    def _legacy_state(self) -> list[bytes] | None:
        """With --rng legacy: the global generators' states before a batch, put back first when it is drawn again."""
        if self.options.rng != "legacy":
            return None
        if self.recorded is not None:
            try:
                states = [base64.b64decode(text, validate=True) for text in self.recorded["rng_state"]]
                set_rng_state(states, self.device)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"the random state in {self.options.reproduce!r} cannot be used: {error}") from None
        return rng_state(self.device)

    # ------------------------------------------------------------------ the record
    @cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the weights file."""
        if not Path(self.options.ckpt).is_file():
            raise CheckpointError(f"checkpoint {self.options.ckpt!r} is not a file")
        with open(self.options.ckpt, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)

    def _describe(self, picture: Picture, batch: Batch, state: Sequence[bytes] | None) -> dict[str, Any]:
        i = picture.index
        record: dict[str, Any] = {
            "prompt": batch.prompts[i],
            "negative_prompt": batch.negatives[i],
            "seed": batch.seeds[i],
            "options": {**recorded_options(self.options), "device": self.device.type},
            "model": {"config": _shown(self.options.config), "ckpt": _shown(self.options.ckpt), "sha256": self.weights_hash},
            "batch": {
                "index": i,
                "start": batch.start,
                "prompts": list(batch.prompts),
                "negatives": list(batch.negatives),
                "seeds": list(batch.seeds),
            },
            "machine": {"device": self.device.type, "threads": self.threads},
            "versions": {"ldm": version(), "torch": str(torch.__version__), "python": platform.python_version()},
            "watermark": {"method": self.options.watermark, "status": picture.mark},
        }
        if picture.verdict is not None:
            record["safety"] = {"flagged": picture.flagged, "scores": list(picture.verdict.scores)}
        if self.init_hash is not None:
            record["init_image"] = {"sha256": self.init_hash}
        if state is not None:
            record["rng_state"] = [base64.b64encode(part).decode("ascii") for part in state]
        return record

    def _check_record(self) -> None:
        """Refuse to draw again what cannot come out the same."""
        if self.recorded is None:
            return
        name = repr(self.options.reproduce)
        recorded_batch(self.recorded, str(self.options.reproduce))
        model = self.recorded.get("model") or {}
        if model.get("sha256") != self.weights_hash:
            raise UserError(f"{name} was drawn with other weights (sha256 {str(model.get('sha256'))[:12]}...): name them by --ckpt")
        if (self.recorded.get("init_image") or {}).get("sha256") != self.init_hash:
            raise UserError(f"{name} was drawn from another init image: name it by --init-img")
        machine = self.recorded.get("machine") or {}
        if machine.get("device") != self.device.type:
            log.warning("%s was drawn on %s: on %s the bits may differ", name, machine.get("device"), self.device.type)
        for package, now in (("ldm", version()), ("torch", str(torch.__version__))):
            then = (self.recorded.get("versions") or {}).get(package)
            if then != now:
                log.warning("%s was drawn with %s %s: with %s the bits may differ", name, package, then, now)


def version() -> str:
    """The version of this package."""
    return str(getattr(ldm, "__version__", "unknown"))


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _thread_count(recorded: dict[str, Any] | None) -> int:
    count = (recorded or {}).get("machine", {}).get("threads")
    return count if isinstance(count, int) and 1 <= count <= 1024 else torch.get_num_threads()


def _shown(path: str) -> str:
    """A path as it may stand in a picture: inside the project relative to it, otherwise as it was given."""
    full = Path(path).resolve()
    return full.relative_to(REPO).as_posix() if full.is_relative_to(REPO) else path


def recorded_options(options: Options) -> dict[str, Any]:
    """What a picture says about its flags: all that decides its pixels, nothing about where it was written."""
    left_out = {"outdir", "trust", "verbose", "reproduce", "prompts", "from_file", "repeat", "skip_grid", "skip_save", "given", "n_rows"}
    if not options.own_model:
        left_out |= {"config", "ckpt"}
    record = {name: value for name, value in asdict(options).items() if name not in left_out and value is not None}
    record.pop("own_model")
    return record


def recorded_batch(recorded: dict[str, Any], name: str) -> tuple[Batch, int]:
    """The batch a picture was drawn in, and its place there. Raises `UserError` when the record makes no sense."""
    try:
        batch = recorded["batch"]
        texts = [tuple(batch[key]) for key in ("prompts", "negatives")]
        seeds, index, start = tuple(batch["seeds"]), batch["index"], batch["start"]
        valid = (
            all(isinstance(text, str) for group in texts for text in group)
            and all(isinstance(seed, int) and 0 <= seed <= MAX_SEED for seed in seeds)
            and len(texts[0]) == len(texts[1]) == len(seeds)
            and isinstance(index, int)
            and isinstance(start, int)
            and 0 <= index < len(seeds) <= 1024
        )
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"the record of the batch in picture {name!r} is damaged")
    return Batch(start, texts[0], texts[1], seeds), index
