"""The data of a training, built from a config.

Owns which loaders there are and how they are set up; the order of items and its position are in `loading`. Knows no model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sized
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.loading import PositionedLoader, ResumableLoader, tell_epoch
from ldm.data.streams import DealtStream, NarrowedStream, StreamLoader
from ldm.util import ConfigError, instantiate_from_config, plain

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test", "predict")


class WrappedDataset(Dataset):
    """Makes a Dataset of anything that has `__len__` and `__getitem__`."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset
        self.bucket_of = getattr(dataset, "bucket_of", None)

    def set_epoch(self, epoch: int) -> None:
        """Tell the data set, if it wants to know."""
        tell_epoch(self.data, epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def seed_worker(worker_id: int) -> None:
    """Worker init function: numpy's generator follows torch's, which differs in every worker."""
    import random

    import numpy as np

    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


class DataModuleFromConfig(pl.LightningDataModule):
    """Loaders for the splits that a config names, each `{target, params}`.

    The training order is a pure function of (seed, epoch); its position is part of every checkpoint, so a resumed training sees
    exactly the batches that were still to come. A split without config has no loader.
    """

    def __init__(
        self,
        batch_size: int,  # items a batch of one device
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        predict: Any = None,
        wrap: bool = False,  # put every data set into WrappedDataset
        num_workers: int | None = None,  # None: two for every item of a batch, at most one a core
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,  # seed numpy in the workers (iterable data sets; others are seeded item by item)
        shuffle_val_dataloader: bool = False,
        shuffle_train: bool = True,
        drop_last: bool = False,  # leave out the last training batch of an epoch when it is not full
        pin_memory: bool = False,
        seed: int | None = None,  # of the order; None: that of the run
        stream_split: str | None = None,  # foreign streams: deal (batches to all in turn), own (it splits itself); None: error if needed
    ) -> None:
        super().__init__()
        if stream_split not in (None, "deal", "own"):
            raise ConfigError(f"data.params.stream_split is {stream_split!r}: it must be deal, own or left out")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"data.params.batch_size is {batch_size!r}: it must be a whole number from 1 on")
        self.batch_size = batch_size
        self.num_workers = min(2 * batch_size, os.cpu_count() or 1) if num_workers is None else num_workers
        configs = {"train": train, "validation": validation, "test": test, "predict": predict}
        self.dataset_configs = {name: plain(config) for name, config in configs.items() if config is not None}
        self.wrap, self.use_worker_init_fn, self.pin_memory = wrap, use_worker_init_fn, pin_memory
        self.shuffle = {"train": shuffle_train, "validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self.drop_last, self.seed, self.stream_split = drop_last, seed, stream_split
        self.datasets: dict[str, Any] = {}
        self._train_loader: PositionedLoader | None = None
        self._resume_from: dict[str, Any] | None = None
        for split, hook in zip(SPLITS, ("train", "val", "test", "predict"), strict=True):
            if split in self.dataset_configs:
                setattr(self, f"{hook}_dataloader", self._loader_of(split))

    def _loader_of(self, split: str) -> Callable[[], Any]:
        return lambda: self.loader(split)

    def prepare_data(self) -> None:
        """Build the data sets on the first process of a machine before any other, for those that prepare files."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets (once)."""
        for split, config in self.dataset_configs.items():
            if split not in self.datasets:
                dataset = instantiate_from_config(config)
                wrap = self.wrap and not isinstance(dataset, IterableDataset)
                self.datasets[split] = WrappedDataset(dataset) if wrap else dataset
                size = len(dataset) if isinstance(dataset, Sized) else getattr(dataset, "epoch_size", "endless")
                log.info("data %s: %s, %s items an epoch", split, type(dataset).__name__, size)

    def sizes(self, split: str) -> tuple[int, int]:
        """(items a batch, workers) of a split."""
        return self.batch_size, self.num_workers

    def loader(self, split: str) -> DataLoader:
        """A loader for one of the splits that the config names."""
        self.setup()
        dataset = self.datasets[split]
        batch_size, workers = self.sizes(split)
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": self.pin_memory}
        init = seed_worker if self.use_worker_init_fn else None
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)
        options |= {"worker_init_fn": init}
        place = {"seed": self._order_seed(), "rank": rank, "world": world, "same_epoch": split != "train"}
        loader: PositionedLoader
        if isinstance(dataset, IterableDataset):
            if not hasattr(dataset, "batches"):
                if split == "train":
                    log.info("the training data is a foreign stream: a resumed training starts it anew")
                return DataLoader(self._split(split, dataset, rank, world), batch_size=batch_size, **options)
            loader = StreamLoader(dataset, batch_size, **place, **options)
        else:
            if len(dataset) == 0:
                raise ConfigError(f"the data set of data.params.{split} is empty")
            order = {"shuffle": self.shuffle.get(split, False), "drop_last": self.drop_last and split == "train"}
            loader = ResumableLoader(dataset, batch_size, **order, **place, **options)
        if split == "train":
            before, self._train_loader = self._train_loader, loader
            if self.trainer is not None:
                loader.limit = lambda: self.trainer.num_training_batches
            if self._resume_from is not None:
                self._check_resumed(loader)
                loader.load_state_dict(self._resume_from)
                self._resume_from = None
            elif before is not None and self.trainer is not None and self.trainer.reload_dataloaders_every_n_epochs:
                loader.take_over(before)
        return loader

    def _split(self, split: str, stream: Any, rank: int, world: int) -> Any:
        """A foreign stream, so that no two workers of all processes read the same."""
        batch_size, workers = self.sizes(split)
        if world * max(workers, 1) == 1 or self.stream_split == "own":
            return stream
        if self.stream_split == "deal":
            return DealtStream(stream, batch_size, rank, world)
        if isinstance(stream, Txt2ImgIterableBaseDataset) and stream.valid_ids is not None:
            return NarrowedStream(stream, rank, world)
        raise ConfigError(
            f"data.params.{split} is a stream ({type(stream).__name__}) that does not say how it is split: processes: {world}, workers in "
            f"each: {workers}, and all could read the same items. Set data.params.stream_split to own if the stream splits itself among "
            "them, or to deal if it gives all of them the same items in the same order: then each takes its batches in turn. Or take one "
            "process and data.params.num_workers: 0"
        )

    def _order_seed(self) -> int:
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))  # what seed_everything was given
        return self.seed

    def _check_resumed(self, loader: PositionedLoader) -> None:
        state, now = self._resume_from or {}, loader.state_dict()
        for key in ("global_batch", "seed", "length"):
            if state[key] != now[key]:
                log.warning("data: the checkpoint was made with %s %s, now it is %s: the order differs", key, state[key], now[key])

    def state_dict(self) -> dict[str, Any]:
        """Where the training is in its data."""
        if self._train_loader is None:
            return {}
        return dict(self._train_loader.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember where to go on; the next training loader starts there."""
        self._resume_from = state or None
        if self._train_loader is not None and state:
            self._train_loader.load_state_dict(state)
