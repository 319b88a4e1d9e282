"""What is added to an item of any data set: further entries, made of those it has.

`WrappedItems` does it to a data set that is asked item by item; a stream takes the same things as its `postprocess`. Random choices come
from numpy's global generator, which both seed for every item. Masks are in `masks`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data import degradation as degradations
from ldm.data.loading import seeded, tell_epoch
from ldm.data.transforms import to_float
from ldm.util import ConfigError, instantiate_from_config, plain

Item = dict[str, Any]
Addition = Callable[[Item], Item]


class WrappedItems(Dataset):
    """The items of `dataset`, each after all `additions`, which see one generator a (seed, epoch, index): no matter who asks, and when.

    Buckets, captions that change with the epoch and the like stay those of the data set. With `fixed` the epoch counts for nothing.
    """

    def __init__(
        self,
        dataset: Any,  # {target, params}, or a data set
        additions: Any,  # {target, params} of something that takes an item and gives one, or a list of these
        seed: int = 0,
        fixed: bool = False,  # the same in every epoch, for validation
    ) -> None:
        super().__init__()
        self.dataset = instantiate_from_config(plain(dataset)) if _is_config(dataset) else dataset
        entries = plain(additions)
        entries = list(entries) if isinstance(entries, (list, tuple)) else [entries]
        self.additions: list[Addition] = [instantiate_from_config(entry) if _is_config(entry) else entry for entry in entries]
        if wrong := [type(addition).__name__ for addition in self.additions if not callable(addition)]:
            raise ConfigError(f"additions: {', '.join(wrong)} cannot be called with an item")
        self.seed, self.fixed = seed, fixed
        self.bucket_of = getattr(self.dataset, "bucket_of", None)
        if hasattr(self.dataset, "caption_for"):  # others ask whether there is one
            self.caption_for = self._caption_for
        if hasattr(self.dataset, "content") and hasattr(self.dataset, "facts"):
            self.content = self._content
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # shared: running workers see a new epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Make other additions, and tell the data set, if it wants to know."""
        self._epoch[0] = epoch
        tell_epoch(self.dataset, epoch)

    def _caption_for(self, i: int, epoch: int | None = None) -> str:
        """The data set's caption of item i in an epoch."""
        return self.dataset.caption_for(i, epoch)

    def _content(self, memo: Path | None = None) -> str:
        """A digest of the data set's pictures and of what it knows of them, since additions may depend on both."""
        facts = [self.dataset.facts(i) for i in range(len(self))]
        return hashlib.sha256(json.dumps([self.dataset.content(memo), facts], sort_keys=True).encode()).hexdigest()

    def __getitem__(self, i: int) -> Item:
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of a data set of {len(self)}")
        item = self.dataset[i]
        with seeded(self.seed, 0 if self.fixed else int(self._epoch[0]), i % len(self)):
            for add in self.additions:
                item = add(item)
        return item


def _is_config(value: Any) -> bool:
    return hasattr(value, "keys") and "target" in value


def image_of(item: Item, key: str, owner: str) -> np.ndarray:
    """item[key], which is (H, W, 3); a ConfigError that names the item's entries when there is no such picture."""
    value = item.get(key)
    if not isinstance(value, np.ndarray) or value.ndim != 3 or value.shape[2] != 3:
        raise ConfigError(f"{owner}: the item has no picture (H, W, 3) under {key!r}; it has {', '.join(sorted(item))}")
    return value


class AddLowResolution:
    """Adds the small, degraded copy of the image that a super-resolution model starts from.

    `image` float32 (H, W, 3) in [-1, 1] gives `key` float32 (H / downscale_f, W / downscale_f, 3) in [-1, 1]. The diffusion models of
    this package join it to the latent, so downscale_f is the factor of the first stage.
    """

    def __init__(
        self,
        downscale_f: int = 4,
        degradation: str = "pil_bicubic",  # see ldm.data.degradation; bsrgan and bsrgan_light are random
        image_key: str = "image",
        key: str = "LR_image",  # Stable Diffusion's upscaler says lr
    ) -> None:
        self.downscale_f, self.image_key, self.key = downscale_f, image_key, key
        self.degrade = degradations.degradation(degradation, downscale_f)

    def __call__(self, item: Item) -> Item:
        """The item with the small picture."""
        image = image_of(item, self.image_key, type(self).__name__)
        if image.shape[0] % self.downscale_f or image.shape[1] % self.downscale_f:
            raise ConfigError(f"{type(self).__name__}: a picture of {image.shape[:2]} cannot be divided by downscale_f {self.downscale_f}")
        pixels = np.clip(np.rint((image + 1.0) * 127.5), 0, 255).astype(np.uint8)
        return {**item, self.key: to_float(self.degrade(pixels))}


class AddLabelFromCaption:
    """Adds `class_label`, the position in `names` of the one that the caption has, and it as `human_label`. One it must be."""

    def __init__(self, names: Sequence[str], caption_key: str = "caption", key: str = "class_label") -> None:
        self.names, self.caption_key, self.key = list(names), caption_key, key

    def __call__(self, item: Item) -> Item:
        """The item with its label."""
        caption = str(item.get(self.caption_key, ""))
        found = [number for number, name in enumerate(self.names) if name in caption]
        if len(found) != 1:
            raise ConfigError(f"{type(self).__name__}: caption {caption!r} has {len(found)} of the names {', '.join(self.names)}, not one")
        return {**item, self.key: found[0], "human_label": self.names[found[0]]}
