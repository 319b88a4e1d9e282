"""Latents and text embeddings of a whole data set, computed once and kept on disk, so that training runs neither frozen network.

Owns what belongs into the caches and under which key. The networks and the data set are reached through their configs; files are in
`store`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ldm.data.loading import SeededDataset, in_own_words, seeded
from ldm.data.store import ArrayStore, Part, as_float16, file_digest, network_key, pick_device
from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config, plain

log = logging.getLogger(__name__)

Item = dict[str, Any]


class CachedLatents(Dataset):
    """Item i is {"z": float32 (C, h, w), "caption": str, ...}: the first stage's latent, not scaled, of image i of `dataset`.

    The latent is the mode of the posterior, kept as float16. With `text_encoder` there is also "c": float32 (L, D), the embedding of
    the caption. What the data set tells without the picture (`facts`: caption, class) is asked of it each time; what else an item has
    (the three sizes of SDXL, say) is kept with the latent; random crops and mirrors are drawn once. A data set with
    `caption_for(i, epoch)` gives a new caption every epoch (`set_epoch`).

    The cache belongs to the data set's config and pictures (all of them where the data set has `content()`, else the first and the
    last) and to the first stage's config and weights: when one of these changes, a new one is made. An interrupted one is gone on
    with. A data set with buckets has a file for each, and batches of one bucket each.
    """

    def __init__(
        self,
        dataset: Any,  # {target, params}: items with `image`, (H, W, 3) in [-1, 1]
        first_stage: Any,  # {target, params}, with its weights as params.ckpt_path
        cache_dir: str = "logs/latents",
        batch_size: int = 32,  # images encoded at a time
        workers: int = 1,  # processes that draw images meanwhile; 0: none
        bf16: bool = False,  # encode in bfloat16 autocast
        device: str = "auto",  # where to encode: auto takes an accelerator when there is one
        image_key: str = "image",
        caption_key: str = "caption",
        text_encoder: Any = None,  # {target, params} of a frozen cond stage
        ckpt: str | None = None,  # a whole model's weights, for both networks; None: their own params name theirs
    ) -> None:
        super().__init__()
        self.dataset_config, self.first_stage_config = plain(dataset), plain(first_stage)
        self.dataset = instantiate_from_config(self.dataset_config)
        self.image_key, self.caption_key, self.ckpt = image_key, caption_key, ckpt
        self.epoch = 0
        if len(self.dataset) == 0:
            raise ConfigError(f"{self.dataset_config['target']} is empty: there is nothing to encode")
        self.bucket_of = getattr(self.dataset, "bucket_of", None)
        self.path = Path(cache_dir) / f"{self._key(Path(cache_dir))}.npy"
        filler = _LatentFiller(self, batch_size, workers, bf16, pick_device(device))
        with seeded(0):  # a run that finds the latents must not differ from the one that made them
            self._load(filler)
        self.texts = None
        if text_encoder is not None:
            if hasattr(self.dataset, "caption_for"):
                raise ConfigError("text_encoder: this data set has other captions in every epoch, so their embeddings cannot be kept")
            captions = [self._caption_at(i) for i in range(len(self))]
            self.texts = CachedTexts(captions, text_encoder, ckpt, cache_dir, batch_size, device)

    def _load(self, filler: _LatentFiller) -> None:
        """Rows and notes of every bucket (or of all), and where each item is in them."""
        self.parts: list[np.ndarray] = []  # (n, C, h, w) float16
        self.notes: list[list[Any] | None] = []
        self._place = np.empty((len(self), 2), dtype=np.int64)
        numbers = [None] if self.bucket_of is None else np.unique(self.bucket_of).tolist()
        for number in numbers:
            members = np.arange(len(self)) if number is None else np.flatnonzero(self.bucket_of == number)
            path = self.path if number is None else self.path.with_name(f"{self.path.stem}.{number}.npy")
            rows, notes = ArrayStore(path, len(members), "images").filled(filler.batches_of(members))
            self._place[members] = np.stack([np.full(len(members), len(self.parts)), np.arange(len(members))], axis=1)
            self.parts.append(rows)
            self.notes.append(notes)

    # ------------------------------------------------------------------ items
    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Change the captions, and only those."""
        self.epoch = epoch

    def __getitem__(self, i: int) -> Item:
        part, row = self._place[i]
        item: Item = {"z": torch.from_numpy(self.parts[part][row].astype(np.float32)), **_restored(self._note(i)), **self.facts(i)}
        if hasattr(self.dataset, "caption_for"):
            item[self.caption_key] = self.dataset.caption_for(i, self.epoch)
        if self.texts is not None:
            item["c"] = self.texts[self._caption_at(i)]
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        return [self[i] for i in indices]

    def _note(self, i: int) -> Mapping[str, Any]:
        part, row = self._place[i]
        notes = self.notes[part]
        return notes[row] if notes is not None else {}

    def facts(self, i: int) -> Item:
        """What the data set knows of picture i without opening it, as it is now: captions may change, and the pictures stay."""
        if not hasattr(self.dataset, "facts"):
            return {}
        facts = dict(self.dataset.facts(i))
        if "caption" in facts:
            facts[self.caption_key] = facts.pop("caption")
        return facts

    def _caption_at(self, i: int) -> str:
        caption = {**self._note(i), **self.facts(i)}.get(self.caption_key)
        if not isinstance(caption, str):
            raise ConfigError(f"text_encoder: item {i} of {self.dataset_config['target']} has no caption under {self.caption_key!r}")
        return caption

    def caption(self, i: int) -> str | None:
        """The caption of item i in the present epoch."""
        return self[i].get(self.caption_key)

    # ------------------------------------------------------------------ key
    def _key(self, cache_dir: Path) -> str:
        """Hash of everything that the latents depend on."""
        config = self.first_stage_config
        params = dict(config.get("params") or {}) if isinstance(config, Mapping) else {}
        weights = self.ckpt or params.get("ckpt_path")
        if not weights:
            raise ConfigError(
                "CachedLatents: first_stage.params.ckpt_path is missing (or ckpt): latents of untrained weights are of no use"
            )
        if not Path(weights).exists():
            raise ConfigError(f"CachedLatents: the first stage's weights {weights!r} do not exist; train it first")
        described, contents = dict(self.dataset_config), hasattr(self.dataset, "content")
        if contents:  # the place of the files does not matter, what is in them does
            described["params"] = {k: v for k, v in (described.get("params") or {}).items() if k not in ("root", "path", "data_root")}
        digest = hashlib.sha256(json.dumps([described, *network_key(config)], sort_keys=True, default=str).encode())
        digest.update(file_digest(Path(weights)))
        if contents:
            place = hashlib.sha256(json.dumps(self.dataset_config, sort_keys=True, default=str).encode()).hexdigest()[:12]
            digest.update(self.dataset.content(cache_dir / f"files-{place}.json").encode())
        else:  # two pictures stand for the code and files behind the data set, drawn as they are for the cache
            pictures = SeededDataset(self.dataset, 0)
            for i in (0, len(self) - 1):
                digest.update(np.ascontiguousarray(pictures[i][self.image_key]).tobytes())
        return digest.hexdigest()[:20]


class _LatentFiller:
    """Draws and encodes the pictures of a CachedLatents; the first stage is built when the first picture is due."""

    def __init__(self, cached: CachedLatents, batch_size: int, workers: int, bf16: bool, device: torch.device) -> None:
        self.cached, self.batch_size, self.workers, self.bf16, self.device = cached, batch_size, workers, bf16, device
        self._model: Any = None

    def batches_of(self, members: np.ndarray) -> Any:
        """What `ArrayStore.filled` asks for: the parts of these items from a first row on."""
        return lambda start: self._batches(members[start:])

    def _batches(self, members: np.ndarray) -> Iterator[Part]:
        loader = DataLoader(
            Subset(SeededDataset(self.cached.dataset, 0), members.tolist()),
            batch_size=self.batch_size,
            num_workers=self.workers,
            collate_fn=list,
            generator=torch.Generator(),  # or it would draw a seed from the global one
        )
        for items in in_own_words(loader):
            images = torch.stack([torch.as_tensor(item[self.cached.image_key]) for item in items]).float().movedim(-1, 1)
            beside = [self._kept(item) for item in items]
            yield self._encode(images), beside if any(beside) else []

    def _kept(self, item: Mapping[str, Any]) -> Item:
        """What is kept beside a latent: everything small but the image, and captions that stay the same."""
        left_out = {self.cached.image_key} | ({self.cached.caption_key} if hasattr(self.cached.dataset, "caption_for") else set())
        return {key: _jsonable(key, value) for key, value in item.items() if key not in left_out}

    def _encode(self, images: Tensor) -> np.ndarray:
        if self._model is None:
            self._model = _network(self.cached.first_stage_config, self.cached.ckpt).to(self.device)
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            z = self._model.encode(images.to(self.device))
        z = z[0] if isinstance(z, tuple) else z
        return as_float16(z.mode() if hasattr(z, "mode") and not isinstance(z, Tensor) else z, "the first stage")


def _network(config: Mapping[str, Any], ckpt: str | None) -> Any:
    """A frozen network with its own weights, or with its part of a whole model's."""
    if ckpt is None:
        return instantiate_from_config(config).eval()
    params = {key: value for key, value in (config.get("params") or {}).items() if key != "ckpt_path"}
    model = instantiate_from_config({"target": config["target"], "params": params})
    get_obj_from_str("ldm.inference.checkpoint.load_weights")(model, ckpt, allow_missing=("loss.",))
    return model.eval()


def _jsonable(key: str, value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    array = np.asarray(value)
    if array.size > 64 or array.dtype.kind not in "iuf":
        raise ConfigError(f"CachedLatents: the entry {key!r}, {array.dtype} {array.shape}, is too much to keep beside a latent")
    return {"dtype": str(array.dtype), "values": array.tolist()}


def _restored(note: Mapping[str, Any]) -> Item:
    return {key: np.asarray(v["values"], dtype=v["dtype"]) if isinstance(v, dict) else v for key, v in note.items()}


class CachedTexts:
    """Embeddings of captions, (L, D) each, by caption. The key is the texts, the encoder's config, and its weights by content."""

    def __init__(
        self,
        captions: Sequence[str],
        encoder: Any,  # {target, params}: has encode(list[str]) -> (B, L, D)
        ckpt: str | None,  # a whole model's weights; None: the encoder's params name its own
        cache_dir: str,
        batch_size: int,
        device: str,
    ) -> None:
        self.config, self.ckpt, self.batch_size, self.device = plain(encoder), ckpt, batch_size, pick_device(device)
        self.unique = sorted(set(captions))
        self._row = {caption: row for row, caption in enumerate(self.unique)}
        path = Path(cache_dir) / f"{self._key()}.npy"
        with seeded(0):  # as for the latents
            self.rows, _ = ArrayStore(path, len(self.unique), "captions").filled(self._batches)

    def __getitem__(self, caption: str) -> Tensor:
        return torch.from_numpy(self.rows[self._row[caption]].astype(np.float32))

    def _key(self) -> str:
        own = [v for v in (self.config.get("params") or {}).values() if isinstance(v, str) and Path(v).exists()]
        files = [Path(file) for file in ([self.ckpt] if self.ckpt else own)]
        if not files:
            raise ConfigError("text_encoder: its params name no weights that exist: give them, or a whole model's as ckpt")
        if not files[0].exists():
            raise ConfigError(f"text_encoder: the weights {str(files[0])!r} do not exist")
        digest = hashlib.sha256(json.dumps([self.unique, *network_key(self.config)], sort_keys=True, default=str).encode())
        for file in files:
            digest.update(file_digest(file))
        return digest.hexdigest()[:20]

    def _batches(self, start: int) -> Iterator[Part]:
        model = _network(self.config, self.ckpt).to(self.device)
        for i in range(start, len(self.unique), self.batch_size):
            with torch.inference_mode():
                c = model.encode(self.unique[i : i + self.batch_size])
            if not isinstance(c, Tensor) or c.ndim != 3:
                raise ConfigError(f"text_encoder {self.config['target']} gives {type(c).__name__}: one (B, L, D) tensor can be kept")
            yield as_float16(c, "the text encoder"), []
