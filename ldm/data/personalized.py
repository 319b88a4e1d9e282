"""A handful of pictures of one thing, to teach it to a model: with captions from templates, and beside pictures of the class (DreamBooth).

Owns the items. Pictures of the class are drawn by the model itself, once, and kept; the model is reached through its file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.files import check_options, digest_files
from ldm.data.folder import FolderDataset
from ldm.data.loading import seeded, tell_epoch
from ldm.data.shapes_text import Spec, caption, spec_of
from ldm.data.shapes_world import CANVAS, COLORS, KINDS, SHAPES, Scene, arrange, render, sample_scene
from ldm.data.store import file_digest
from ldm.data.transforms import to_float
from ldm.imaging import load_image
from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config, plain

log = logging.getLogger(__name__)

TEMPLATES = {
    "object": (
        "a photo of {}",
        "a picture of {}",
        "a close view of {}",
        "{}, seen from the side",
        "a bright photo of {}",
        "a dark photo of {}",
        "a small picture of {}",
        "a drawing of {}",
        "one more photo of {}",
        "{} in the middle of the picture",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a landscape in the style of {}",
        "a portrait in the style of {}",
        "a small drawing in the style of {}",
        "a detail, in the style of {}",
    ),
}


# ------------------------------------------------------------------------------------------------------------------ folder
class PersonalizedPictures(FolderDataset):
    """The pictures of a folder, each as often as `repeats` says, with captions made of `word` and a template.

    The template of an item is a pure function of (seed, epoch, item).
    """

    def __init__(
        self,
        root: str,
        word: str,  # what stands for the thing: a learnt word, or words such as "sks dog"
        templates: str | Sequence[str] = "object",  # object, style, or a list of texts with {} for the word
        repeats: int = 100,  # so that an epoch is worth its name
        size: int | Sequence[int] | None = 512,
        seed: int = 0,
        **options: Any,  # of FolderDataset: buckets, crop, flip, interpolation, image_key, caption_key
    ) -> None:
        check_options(type(self).__name__, FolderDataset, options, PersonalizedPictures)
        if isinstance(templates, str) and templates not in TEMPLATES:
            raise ConfigError(f"templates {templates!r} is unknown: use {' or '.join(TEMPLATES)}, or a list of texts with {{}} in them")
        self.templates = tuple(TEMPLATES[templates] if isinstance(templates, str) else templates)
        if wrong := [text for text in self.templates if text.count("{}") != 1]:
            raise ConfigError(f"template {wrong[0]!r} must have the word's place once, as {{}}")
        if repeats < 1 or not word.strip():
            raise ConfigError(f"PersonalizedPictures: repeats is {repeats} and word {word!r}: 1 or more, and a word, are needed")
        self.word, self.repeats, self.seed, self.epoch = word, repeats, seed, 0
        super().__init__(root, size, **{"captions": "none", **options})

    def __len__(self) -> int:
        return len(self.records) * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Change the captions, and only those."""
        self.epoch = epoch

    def caption_for(self, i: int, epoch: int) -> str:
        """The caption of item i in an epoch."""
        rng = np.random.default_rng([self.seed, epoch, i])
        return self.templates[int(rng.integers(len(self.templates)))].format(self.word)

    def path(self, i: int) -> Path:
        """The file of item i."""
        return super().path(i % len(self.records))

    def facts(self, i: int) -> Mapping[str, Any]:
        """The caption of item i in the present epoch."""
        return {"caption": self.caption_for(i, self.epoch)}


# ------------------------------------------------------------------------------------------------------------------ shapes
class ShapesOfOne(Dataset):
    """A handful of pictures of one combination of the shapes world, such as a purple heart, which its training never shows.

    Item i is {"image": float32 (H, W, 3) in [-1, 1], "caption": str}. There are `pictures` different ones, each `repeats` times; what
    a caption names besides the combination is a pure function of (seed, epoch, item). With `word` the caption says that instead.
    """

    def __init__(
        self,
        color: str,
        shape: str,
        word: str | None = None,  # instead of "purple heart"
        pictures: int = 8,
        repeats: int = 50,
        image_size: int = CANVAS,
        kinds: Sequence[str] = ("single",),  # of scenes, evenly
        seed: int = 0,
    ) -> None:
        wrong = [f"color {color!r} must be one of {', '.join(COLORS)}"] if color not in COLORS else []
        wrong += [f"shape {shape!r} must be one of {', '.join(SHAPES)}"] if shape not in SHAPES else []
        wrong += [f"pictures {pictures} and repeats {repeats} must be at least 1"] if min(pictures, repeats) < 1 else []
        wrong += [f"image_size {image_size} must be at least 32"] if image_size < 32 else []
        if isinstance(kinds, str) or not kinds or any(kind not in KINDS for kind in kinds):
            wrong.append(f"kinds {kinds!r} must be a list out of {', '.join(KINDS)}")
        if wrong:
            raise ConfigError("ShapesOfOne: " + "; ".join(wrong))
        self.name, self.word = f"{color} {shape}", word
        self.repeats, self.image_size, self.seed, self.epoch = repeats, image_size, seed, 0
        self.scenes = [_scene_of(np.random.default_rng([seed, 0, i]), kinds[i % len(kinds)], color, shape) for i in range(pictures)]

    def __len__(self) -> int:
        return len(self.scenes) * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """Change the captions, and only those."""
        self.epoch = epoch

    def caption_for(self, i: int, epoch: int) -> str:
        """The caption of item i in an epoch."""
        spec = spec_of(self.scenes[i % len(self.scenes)], np.random.default_rng([self.seed, 1, epoch, i]))
        return say(spec, self.name, self.word)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of a data set of {len(self)}")
        image = render(self.scenes[i % len(self.scenes)], self.image_size)
        return {"image": image.astype(np.float32) / 127.5 - 1, "caption": self.caption_for(i, self.epoch)}


def _scene_of(rng: np.random.Generator, kind: str, color: str, shape: str) -> Scene:
    """A scene of this kind in which one object, or all of a count, are of this color and shape."""
    while True:
        scene = sample_scene(rng, kind)
        chosen = range(len(scene.objects)) if kind == "count" else [int(rng.integers(len(scene.objects)))]
        objects = [replace(o, color=color, shape=shape) if i in chosen else o for i, o in enumerate(scene.objects)]
        if kind in ("single", "count") or len({(o.color, o.shape) for o in objects}) == 2:  # or it would read as a count
            return replace(scene, objects=arrange(rng, objects, scene.relation))


def say(spec: Spec, name: str, word: str | None = None) -> str:
    """The canonical caption, `word` said instead of `name`, such as "purple heart"."""
    return caption(spec) if word is None else caption(spec).replace(name, word)


# ------------------------------------------------------------------------------------------------------------------- prior
class WithPrior(Dataset):
    """Items of `instance`, each with one of `prior` under the key "prior": what DreamBooth's loss needs (arXiv:2208.12242, Eq. 2).

    Both are data sets, {target, params}, whose items the model reads alike. The shorter one begins again.
    """

    def __init__(self, instance: Any, prior: Any) -> None:
        self.instance, self.prior = (instantiate_from_config(plain(config)) for config in (instance, prior))
        if min(len(self.instance), len(self.prior)) == 0:
            raise ConfigError("WithPrior: one of its data sets is empty")
        self.bucket_of = self._buckets()  # None: all items are of one size

    def __len__(self) -> int:
        return max(len(self.instance), len(self.prior))

    def _buckets(self) -> np.ndarray | None:
        """A number for each pair of sizes, of the instance's picture and the prior's."""
        places = np.arange(len(self))
        numbers = np.zeros(len(self), dtype=np.int64)
        found = False
        for dataset in (self.instance, self.prior):
            buckets = getattr(dataset, "bucket_of", None)
            if buckets is not None:
                own = np.asarray(buckets)[places % len(dataset)]
                numbers, found = numbers * (int(own.max()) + 1) + own, True
        return numbers if found else None

    def set_epoch(self, epoch: int) -> None:
        """Tell both, if they want to know."""
        for dataset in (self.instance, self.prior):
            tell_epoch(dataset, epoch)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.instance[i % len(self.instance)], "prior": self.prior[i % len(self.prior)]}


class DrawnPictures(Dataset):
    """Pictures that a model draws of `prompts`, made when they are first asked for and kept: what it knows before it is taught more.

    The folder `<cache_dir>/<key>` holds 00000.png ... and metadata.jsonl; the key is that of the weights' content, the model's config,
    the prompts and the settings. Picture k is drawn from seed + k, so an interrupted folder is gone on with. They are training data:
    neither checked for safety nor marked.
    """

    def __init__(
        self,
        prompts: Any,  # a text, several in turn, or {target, params} of a data set whose captions they are
        pictures: int = 200,
        ckpt: str | None = None,  # weights of the model; None: the model that ships
        config: str | None = None,  # its YAML; None: beside the weights, or found from them
        size: int | None = None,  # side in pixels; None: the model's own
        negative_prompt: str = "",
        sampler: str = "ddim",
        steps: int = 50,
        scale: float = 7.5,
        seed: int = 0,
        batch_size: int = 4,
        precision: str = "full",  # full, autocast or bf16
        device: str = "auto",
        cache_dir: str = "logs/drawn",
        image_key: str = "image",
        caption_key: str = "caption",
    ) -> None:
        self.prompts = _texts(prompts, pictures)
        if not self.prompts or pictures < 1:
            raise ConfigError(f"DrawnPictures: {len(self.prompts)} prompts and {pictures} pictures: at least one of each is needed")
        self.pictures, self.image_key, self.caption_key = pictures, image_key, caption_key
        found, self.ckpt = get_obj_from_str("ldm.inference.facts.find_model")(config, ckpt)
        self.config = get_obj_from_str("ldm.inference.facts.read_config")(found)
        facts = get_obj_from_str("ldm.inference.facts.read_facts")(self.config)
        side = facts.image_size * facts.factor if size is None else size
        self.settings = {"height": side, "width": side, "factor": facts.factor, "sampler": sampler, "steps": steps, "scale": scale}
        self.settings["precision"] = precision
        self.negative_prompt, self.seed, self.batch_size, self.device = negative_prompt, seed, batch_size, device
        self.folder = Path(cache_dir) / self._key()
        missing = [i for i in range(pictures) if not self.path(i).is_file()]
        if missing:
            with seeded(seed):  # a run that finds them drawn must not differ from the one that drew them
                self._draw(missing)

    def __len__(self) -> int:
        return self.pictures

    def path(self, i: int) -> Path:
        """The file of picture i."""
        return self.folder / f"{i:05}.png"

    def caption(self, i: int) -> str:
        """The prompt of picture i."""
        return self.prompts[i % len(self.prompts)]

    def facts(self, i: int) -> Mapping[str, Any]:
        """The caption of picture i."""
        return {"caption": self.caption(i)}

    def content(self, memo: Path | None = None) -> str:
        """A digest of what was drawn and of the pictures; `memo` as for `FolderDataset.content`."""
        return f"{self.folder.name} {digest_files(self.folder, [self.path(i).name for i in range(self.pictures)], memo)}"

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < self.pictures:
            raise IndexError(f"picture {i} of {self.pictures}")
        return {self.image_key: to_float(load_image(self.path(i))), self.caption_key: self.caption(i)}

    def _key(self) -> str:
        described = [self.prompts, self.negative_prompt, self.seed, self.settings, self.config["model"]]
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
        digest.update(file_digest(Path(self.ckpt)))
        return digest.hexdigest()[:20]

    def _draw(self, missing: Sequence[int]) -> None:
        log.info("drawing %d of %d pictures with %s into %s", len(missing), self.pictures, self.ckpt, self.folder)
        device = get_obj_from_str("ldm.inference.models.pick_device")(self.device)
        model = get_obj_from_str("ldm.inference.models.load_model")(self.config, self.ckpt, device)
        settings = get_obj_from_str("ldm.inference.pipeline.Settings")(**self.settings)
        pipeline = get_obj_from_str("ldm.inference.pipeline.Text2Image")(model, settings)
        batch = get_obj_from_str("ldm.inference.prompts.Batch")
        self.folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(missing), self.batch_size):
            chosen = missing[first : first + self.batch_size]
            texts = tuple(self.caption(i) for i in chosen)
            seeds = tuple(self.seed + i for i in chosen)
            for i, image in zip(chosen, pipeline.draw(batch(first, texts, (self.negative_prompt,) * len(chosen), seeds)), strict=True):
                temporary = self.path(i).with_suffix(f".{os.getpid()}.tmp")
                Image.fromarray(image).save(temporary, "PNG")
                os.replace(temporary, self.path(i))
            if (first // self.batch_size) % 10 == 0:
                log.info("drawn %d of %d", first + len(chosen), len(missing))
        lines = [json.dumps({"file_name": self.path(i).name, "text": self.caption(i)}) for i in range(self.pictures)]
        (self.folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _texts(prompts: Any, n: int) -> list[str]:
    """A text or several as they are, or the first n captions of a data set, of which no picture is opened."""
    if isinstance(prompts, str):
        return [prompts]
    if not hasattr(prompts, "keys"):
        return list(prompts)
    dataset = instantiate_from_config(plain(prompts))
    places = range(min(n, len(dataset)))
    if hasattr(dataset, "caption_for"):
        return [dataset.caption_for(i, 0) for i in places]
    facts = [dataset.facts(i) if hasattr(dataset, "facts") else {} for i in places]
    if not all("caption" in fact for fact in facts):
        name = type(dataset).__name__
        raise ConfigError(f"DrawnPictures: {name} tells no captions without its pictures: give prompts as a list of texts")
    return [fact["caption"] for fact in facts]
