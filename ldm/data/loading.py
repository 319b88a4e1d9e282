"""A data loader that knows where it is, so that a training can stop after any batch and go on as if it never had.

Owns the order of items (a pure function of seed and epoch), the position in it, the split over processes, and the random state an
item is made with (a pure function of seed, epoch and index: the number of workers changes nothing). Knows no trainer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class ResumableSampler(Sampler[list[int]]):
    """Batches of indices; epoch `e` is a permutation that depends on (seed, e) only, and may start in its middle.

    Process `rank` of `world` takes its part of every global batch. With more than one process, the last global batch is filled up
    from the start of the epoch, so that every process has as much to do.
    """

    def __init__(
        self,
        length: int,  # items in the data set
        batch_size: int,  # items a batch of one process
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,  # leave out a last batch that is not full
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if length < 1:
            raise ValueError("the data set is empty")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shuffle, self.rank, self.world = shuffle, rank, world
        self.drop_last = drop_last and length >= batch_size * world
        self.epoch, self.start = 0, 0  # where the next iterator begins: epoch, and batches to leave out in it

    @property
    def global_batch(self) -> int:
        """Items a step takes over all processes."""
        return self.batch_size * self.world

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever the next iterator begins."""
        full, rest = divmod(self.length, self.global_batch)
        return full + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        """Indices (length,) in the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.length)
        return np.random.default_rng([self.seed, epoch]).permutation(self.length)

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self.epoch, self.start)  # the position counts from now, not from the first batch drawn

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        order = self.order(epoch)
        for i in range(start, len(self)):
            batch = order[i * self.global_batch : (i + 1) * self.global_batch]
            if self.world > 1 and len(batch) < self.global_batch:
                batch = np.concatenate([batch, np.resize(order, self.global_batch - len(batch))])
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size].tolist()


class SeededDataset(Dataset):
    """Makes every item under a random state that is a pure function of (seed, epoch, index), and leaves the outer state untouched."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # shared: persistent workers see a new epoch
        self._told: int | None = None  # the epoch that the data set of this process was told last
        if hasattr(dataset, "__getitems__"):
            self.__getitems__ = self._get_items

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Change the epoch, here and in workers that already run; the data set is told if it has a `set_epoch` too."""
        self._epoch[0] = epoch
        self._tell()

    def _tell(self) -> int:
        epoch = int(self._epoch[0])
        if epoch != self._told and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self._told = epoch
        return epoch

    def __getitem__(self, index: int) -> Any:
        with _seeded(self.seed, self._tell(), index):
            return self.dataset[index]

    def _get_items(self, indices: Sequence[int]) -> list[Any]:
        with _seeded(self.seed, self._tell(), *indices):
            return self.dataset.__getitems__(indices)


class _seeded:
    """Context: the global generators of python, numpy and torch (CPU) start from the given key, and are put back afterwards."""

    def __init__(self, *key: int) -> None:
        self.key = key

    def __enter__(self) -> None:
        self.state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        words = np.random.SeedSequence(self.key).generate_state(4)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.default_generator.manual_seed((int(words[2]) << 32) + int(words[3]))

    def __exit__(self, *exc: object) -> None:
        random.setstate(self.state[0])
        np.random.set_state(self.state[1])
        torch.set_rng_state(self.state[2])


class ResumableLoader(DataLoader):
    """A DataLoader over a map-style data set with `state_dict()` and `load_state_dict()`.

    The position is that of the last batch handed out, whatever workers have fetched ahead. Every new iterator begins a new epoch,
    but for the first one after `load_state_dict`, which goes on where the state was taken. `len()` is that of a whole epoch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        same_epoch: bool = False,  # every iterator is epoch 0 from its start, as a validation wants it
        num_workers: int = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        **options: Any,
    ) -> None:
        sampler = ResumableSampler(len(dataset), batch_size, seed, shuffle, drop_last, rank, world)
        generator = torch.Generator().manual_seed(seed)  # its own, so that iterating draws nothing from the global one
        super().__init__(
            SeededDataset(dataset, seed),
            batch_sampler=sampler,
            num_workers=num_workers,
            worker_init_fn=worker_init_fn,
            generator=generator,
            persistent_workers=num_workers > 0,
            **options,
        )
        self.same_epoch = same_epoch
        self.position = (0, 0)  # epoch, batches handed out in it
        self.limit: Callable[[], float] = lambda: float("inf")  # batches after which the trainer ends an epoch
        self._touched = False  # the running iterator has handed out something

    def __iter__(self) -> Iterator[Any]:
        if self.same_epoch:
            self.position = (0, 0)
        elif self._touched and self.position[1] > 0:  # the last iterator was left before its end
            self.position = (self.position[0] + 1, 0)
        self._touched = False
        sampler: Any = self.batch_sampler
        sampler.epoch, sampler.start = self.position
        self.dataset.set_epoch(self.position[0])
        return self._count(super().__iter__(), *self.position)

    def _count(self, batches: Iterator[Any], epoch: int, done: int) -> Iterator[Any]:
        for batch in batches:
            done += 1
            self.position = (epoch, done) if done < min(len(self), self.limit()) else (epoch + 1, 0)
            self._touched = True
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, batches taken in it, and what a batch and the order were."""
        sampler: Any = self.batch_sampler
        epoch, batches = self.position
        return {
            "epoch": epoch,
            "batches": batches,
            "global_batch": sampler.global_batch,
            "seed": sampler.seed,
            "length": sampler.length,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state; with another batch size, from the batch that holds the next unseen item."""
        sampler: Any = self.batch_sampler
        items = state["batches"] * state["global_batch"]
        batches = items // sampler.global_batch
        self.position = (state["epoch"], batches) if batches < len(self) else (state["epoch"] + 1, 0)
        self._touched = False
