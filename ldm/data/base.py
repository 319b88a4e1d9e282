"""What the data sets with published names are made of: pictures named by a list of paths, and the interface of text-and-image streams.

Sources of the addresses: latent-diffusion and taming-transformers (`taming.data.base` is this module too).
"""

from __future__ import annotations

import bisect
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

from ldm.data.transforms import SquareCrop, to_float
from ldm.imaging import load_image
from ldm.util import ConfigError, UserError

log = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Base of data sets that stream records, each {"image": ..., "caption": ...}; several can be chained.

    A subclass says how to iterate over `sample_ids`; `valid_ids` are all it could give. Where several processes or workers read, the
    data module narrows `sample_ids` to a share for each.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        self.num_records = num_records
        self.valid_ids = valid_ids
        self.sample_ids = valid_ids
        self.size = size
        log.info("%s: %d records", type(self).__name__, num_records)

    def __len__(self) -> int:
        return self.num_records

    def narrow(self, rank: int, world: int, worker: int = 0, workers: int = 1) -> None:
        """Keep the ids of one worker of one process. Every process has as many, so up to world - 1 ids are left out."""
        ids = self.valid_ids if self.valid_ids is not None else ()
        each = len(ids) // world
        if each == 0:
            raise ConfigError(f"{type(self).__name__} has {len(ids)} ids for {world} processes: each needs one, so take fewer processes")
        first, last = (rank * each + each * number // workers for number in (worker, worker + 1))
        self.sample_ids = ids[first:last]

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """The records of this process."""


class ConcatDatasetWithIndex(ConcatDataset):
    """Data sets one after another; an item is (item, number of the data set it comes from)."""

    def __getitem__(self, idx: int) -> tuple[Any, int]:
        item = super().__getitem__(idx)
        return item, bisect.bisect_right(self.cumulative_sizes, idx % len(self))


class ImagePaths(Dataset):
    """Pictures by path, as squares: {"image": float32 (size, size, 3) in [-1, 1], "file_path_": str} and what `labels` gives."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        size: int | None = None,  # side of the square in pixels; None or 0: pictures as they are
        random_crop: bool = False,
        labels: Mapping[str, Sequence[Any]] | None = None,  # further entries, one value a picture
    ) -> None:
        self.size, self.random_crop = size, random_crop
        self.labels = {**(labels or {}), "file_path_": [str(path) for path in paths]}
        self._crop = SquareCrop(size or None, random=random_crop)

    def __len__(self) -> int:
        return len(self.labels["file_path_"])

    def load(self, path: str) -> Image.Image:
        """The picture in a file, RGB."""
        return load_image(path)

    def preprocess_image(self, image_path: str) -> np.ndarray:
        """float32 (H, W, 3) in [-1, 1]."""
        return to_float(self._crop(self.load(image_path))[0])

    def __getitem__(self, i: int) -> dict[str, Any]:
        labels = {key: values[i] for key, values in self.labels.items()}
        return {"image": self.preprocess_image(labels["file_path_"]), **labels}


class NumpyPaths(ImagePaths):
    """As ImagePaths; a file that ends in .npy holds a uint8 array (1, 3, H, W)."""

    def load(self, path: str) -> Image.Image:
        """The picture in a file, RGB."""
        if not path.lower().endswith(".npy"):
            return load_image(path)
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"image {path!r} cannot be read: {error}") from None
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[:2] != (1, 3):
            raise UserError(f"image {path!r} holds {array.dtype} {array.shape}: uint8 (1, 3, H, W) is needed")
        return Image.fromarray(np.ascontiguousarray(array[0].transpose(1, 2, 0)))
