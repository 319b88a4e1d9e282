"""The data module over shards that Stable Diffusion's training configs name: LAION's files, with their notes in a JSON entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.data import masks
from ldm.data.datamodule import DataModuleFromConfig
from ldm.util import ConfigError, plain

_TARGET = "ldm.data.webdataset.ShardDataset"
_SPLITS = ("train", "validation", "test")
_AREAS = {"train": (0.05, 0.5), "train-large": (0.1, 0.7), "narrow": (0.01, 0.2)}  # shares of the picture
_SIDES = ("256", "512", "768")


class WebDataModuleFromConfig(DataModuleFromConfig):
    """Loaders over shards; an item has the picture as `jpg` (float32 HWC in [-1, 1]), the caption as `txt`, and `__key__`.

    A split is {shards, shuffle, image_key, image_transforms, postprocess} as published, and anything else that
    `ldm.data.webdataset.ShardDataset` takes, such as epoch_size. A sample without the notes that a limit needs is left out.
    """

    def __init__(
        self,
        tar_base: str | None,  # folder or address that the names of shards are relative to
        batch_size: int,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        num_workers: int = 4,
        multinode: bool = True,
        min_size: int | None = None,  # least width and height of the original
        max_pwatermark: float = 1.0,  # greatest probability of a watermark
        p_unsafe_threshold: float | None = None,  # greatest probability of being unsafe
        val_batch_size: int | None = None,
        val_num_workers: int | None = None,
        pin_memory: bool = False,
        seed: int | None = None,  # of the order; None: that of the run
    ) -> None:
        if not multinode:
            raise ConfigError("multinode: false is not supported: shards are always split over all processes")
        limits: dict[str, dict[str, float]] = {}
        if min_size:
            limits |= {"original_width": {"min": min_size}, "original_height": {"min": min_size}}
        if max_pwatermark < 1:
            limits["pwatermark"] = {"max": max_pwatermark}
        if p_unsafe_threshold is not None:
            limits["punsafe"] = {"max": p_unsafe_threshold}
        given = zip(_SPLITS, (train, validation, test), strict=True)
        splits = {name: _shards_config(plain(split), tar_base, limits) for name, split in given if split is not None}
        super().__init__(
            batch_size,
            train=splits.get("train"),
            validation=splits.get("validation"),
            test=splits.get("test"),
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )
        self._evaluation = (val_batch_size or batch_size, num_workers if val_num_workers is None else val_num_workers)

    def sizes(self, split: str) -> tuple[int, int]:
        """(items a batch, workers)."""
        return super().sizes(split) if split == "train" else self._evaluation


def _shards_config(split: Mapping[str, Any], tar_base: str | None, limits: Mapping[str, Any]) -> dict[str, Any]:
    params = dict(split)
    shards = params.pop("shards", None)
    if not shards:
        raise ConfigError(f"a split needs shards; this one has {', '.join(split) or 'nothing'}")
    names = [shards] if isinstance(shards, str) else list(shards)
    if tar_base is not None:
        names = [f"{tar_base.rstrip('/')}/{name}" for name in names]
    image = params.pop("image_key", "jpg")
    usual = {"image_file": image, "image_key": image, "caption_key": "txt", "where": limits, "image_transforms": [], "shuffle": 0}
    if "size" in params or "buckets" in params:
        del usual["image_transforms"]
    return {"target": _TARGET, "params": {"shards": names, **usual, **params}}


class AddMask(masks.AddMask):
    """`mask` and `masked_image` as Stable Diffusion 2's inpainting config asks for them, beside the picture `jpg`.

    The mode stands for how much is masked. The masks are those of `ldm.data.masks`, not draw for draw the original's.
    """

    def __init__(
        self,
        mode: str = "512train",  # side (of no effect: masks are drawn in shares of the picture) and train, train-large or narrow
        p_drop: float = 0.0,  # share of pictures that are masked whole
        image_key: str = "jpg",
    ) -> None:
        known = {side + kind: area for side in _SIDES for kind, area in _AREAS.items()}
        if mode not in known:
            raise ConfigError(f"AddMask: mode {mode!r} is unknown; it is one of {', '.join(known)}")
        if not 0 <= p_drop <= 1:
            raise ConfigError(f"AddMask: p_drop {p_drop} is not a share between 0 and 1")
        kinds = {"strokes": (1 - p_drop) / 2, "boxes": (1 - p_drop) / 2, "whole": p_drop}
        super().__init__(kinds, known[mode], image_key)
