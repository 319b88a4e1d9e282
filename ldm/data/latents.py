"""Latents of a whole data set, computed once with the first stage and kept on disk, so that training neither draws nor encodes.

Owns the cache: its key, its files, and how it is filled. The first stage and the data set are reached through their configs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ldm.util import ConfigError, instantiate_from_config, plain

log = logging.getLogger(__name__)

# Parameters of a first stage that do not change what it encodes to; the weights count by content, not by file name.
_IRRELEVANT = ("ckpt_path", "lossconfig", "monitor", "ignore_keys")


class CachedLatents(Dataset):
    """Item i is {"z": float32 (C, h, w), "caption": str}: the first stage's latent, not scaled, of image i of `dataset`.

    The latent is the mode of the posterior, kept as float16. A data set with `caption_for(i, epoch)` gives a new caption every
    epoch (`set_epoch`); of others the caption is kept with the latent. The cache belongs to the data set's config and pictures and
    to the first stage's config and weights: when one of these changes, a new one is made. An interrupted one is gone on with.
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
    ) -> None:
        super().__init__()
        self.dataset_config, self.first_stage_config = plain(dataset), plain(first_stage)
        self.dataset = instantiate_from_config(self.dataset_config)
        self.image_key, self.caption_key = image_key, caption_key
        self.epoch = 0
        if len(self.dataset) == 0:
            raise ConfigError(f"{self.dataset_config['target']} is empty: there is nothing to encode")
        path = Path(cache_dir) / f"{self._key()}.npy"
        if not path.exists():
            _Filler(self, path, batch_size, workers, bf16, device).fill()
        self.path = path
        self.latents = np.load(path, mmap_mode="r")  # (N, C, h, w) float16
        captions = path.with_suffix(".captions.json")
        self.captions = json.loads(captions.read_text(encoding="utf-8")) if captions.exists() else None

    # ------------------------------------------------------------------ items
    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Change the captions, and only those."""
        self.epoch = epoch

    def __getitem__(self, i: int) -> dict[str, Tensor | str]:
        item: dict[str, Tensor | str] = {"z": torch.from_numpy(self.latents[i].astype(np.float32))}
        caption = self.caption(i)
        return item if caption is None else {**item, self.caption_key: caption}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor | str]]:
        return [self[i] for i in indices]

    def caption(self, i: int) -> str | None:
        """The caption of item i in the present epoch."""
        if hasattr(self.dataset, "caption_for"):
            return self.dataset.caption_for(i, self.epoch)
        return self.captions[i] if self.captions is not None else None

    # ------------------------------------------------------------------ key
    def _key(self) -> str:
        """Hash of everything that the latents depend on; two pictures stand for the code and files behind the data set."""
        config = self.first_stage_config
        params = dict(config.get("params") or {}) if isinstance(config, Mapping) else {}
        weights = params.get("ckpt_path")
        if not weights:
            raise ConfigError("CachedLatents: first_stage.params.ckpt_path is missing: latents of untrained weights are of no use")
        if not Path(weights).exists():
            raise ConfigError(f"CachedLatents: the first stage's weights {weights!r} do not exist; train it first")
        relevant = {key: value for key, value in params.items() if key not in _IRRELEVANT}
        digest = hashlib.sha256(json.dumps([self.dataset_config, config["target"], relevant], sort_keys=True, default=str).encode())
        with open(weights, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else _sha256(file))
        for i in (0, len(self) - 1):
            digest.update(np.ascontiguousarray(self.dataset[i][self.image_key]).tobytes())
        return digest.hexdigest()[:20]


def _sha256(file: Any) -> bytes:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.digest()


class _Filler:
    """Encodes a data set into `<key>.npy`. Until it is whole the file is called `<key>.partial.npy`, and a sidecar counts what is done."""

    def __init__(self, cached: CachedLatents, path: Path, batch_size: int, workers: int, bf16: bool, device: str) -> None:
        self.cached, self.path = cached, path
        self.partial, self.sidecar = path.with_suffix(".partial.npy"), path.with_suffix(".partial.json")
        self.batch_size, self.workers, self.bf16 = batch_size, workers, bf16
        self.device = _pick_device(device)
        self.keep_captions = not hasattr(cached.dataset, "caption_for")

    def fill(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            if self.path.exists():  # another process was faster
                return
            self._encode_all()

    def _encode_all(self) -> None:
        done, captions, latents = self._progress()
        model = instantiate_from_config(self.cached.first_stage_config).eval().to(self.device)
        total = len(self.cached)
        log.info("encoding %d of %d images into %s on %s", total - done, total, self.path, self.device.type)
        shown = done
        started, start = time.monotonic(), done
        for images, new_captions in self._batches(done):
            z = self._encode(model, images)
            if latents is None:
                latents = np.lib.format.open_memmap(self.partial, mode="w+", dtype=np.float16, shape=(total, *z.shape[1:]))
            latents[done : done + len(z)] = z
            done += len(z)
            captions += new_captions
            if done - shown >= max(total // 20, self.batch_size) or done == total:
                shown = done
                self._note(latents, done, captions)
                rate = (done - start) / max(time.monotonic() - started, 1e-9)
                log.info("encoded %d of %d, %.0f images/s, %.0f s left", done, total, rate, (total - done) / rate)
        self._finish(captions)

    def _progress(self) -> tuple[int, list[str], np.ndarray | None]:
        """What an earlier attempt left: images done, their captions, and the file."""
        try:
            state = json.loads(self.sidecar.read_text(encoding="utf-8"))
            latents = np.load(self.partial, mmap_mode="r+")
        except (OSError, ValueError):
            return 0, [], None
        return (state["done"], state["captions"], latents) if len(latents) == len(self.cached) else (0, [], None)

    def _batches(self, start: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Images (B, 3, H, W) from index `start` on, and their captions where these are to be kept."""
        cached = self.cached
        loader = DataLoader(
            Subset(cached.dataset, range(start, len(cached))),
            batch_size=self.batch_size,
            num_workers=self.workers,
            generator=torch.Generator(),  # or it would draw a seed from the global one
        )
        for batch in loader:
            images = torch.as_tensor(batch[cached.image_key]).float().movedim(-1, 1)
            yield images, list(batch.get(cached.caption_key, [])) if self.keep_captions else []

    def _encode(self, model: Any, images: Tensor) -> np.ndarray:
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            z = model.encode(images.to(self.device))
        z = z[0] if isinstance(z, tuple) else z
        z = z.mode() if hasattr(z, "mode") and not isinstance(z, Tensor) else z
        array = z.float().cpu().numpy()
        if not np.isfinite(array.astype(np.float16)).all():
            raise ConfigError("the first stage gives latents that are no numbers or beyond float16: are its weights sound?")
        return array.astype(np.float16)

    def _note(self, latents: np.ndarray, done: int, captions: list[str]) -> None:
        latents.flush()  # type: ignore[attr-defined]
        _write_whole(self.sidecar, json.dumps({"done": done, "captions": captions}))

    def _finish(self, captions: list[str]) -> None:
        if captions:
            _write_whole(self.path.with_suffix(".captions.json"), json.dumps(captions))
        os.replace(self.partial, self.path)
        self.sidecar.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _pick_device(device: str) -> torch.device:
    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the platform can lock files."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
