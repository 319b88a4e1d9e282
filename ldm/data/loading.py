"""A data loader that knows where it is, so that a training can stop after any batch and go on as if it never had.

Owns the order of items (a pure function of seed and epoch), the position in it, the split over processes, and the random state an
item is made with (a pure function of seed, epoch and index: the number of workers changes nothing). Knows no trainer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm.util import UserError


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

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The global batches of this epoch."""
        return self._cut(self.order(epoch), len(self))

    def _cut(self, order: np.ndarray, batches: int) -> list[np.ndarray]:
        size = self.global_batch
        if self.world > 1:
            order = np.concatenate([order, np.resize(order, max(batches * size - len(order), 0))])
        return [order[i * size : (i + 1) * size] for i in range(batches)]

    def __iter__(self) -> Iterator[list[int]]:
        return self._batches(self.epoch, self.start)  # the position counts from now, not from the first batch drawn

    def _batches(self, epoch: int, start: int) -> Iterator[list[int]]:
        for batch in self.plan(epoch)[start:]:
            yield batch[self.rank * self.batch_size : (self.rank + 1) * self.batch_size].tolist()


class BucketSampler(ResumableSampler):
    """As ResumableSampler; all items of a global batch are of one bucket, and the order of the batches is drawn too.

    Every bucket ends with a batch that is not full (or is filled up, or left out), so an epoch may have a few batches more or fewer
    than one without buckets.
    """

    def __init__(self, bucket_of: Sequence[int] | np.ndarray, batch_size: int, *args: Any, **options: Any) -> None:
        super().__init__(len(bucket_of), batch_size, *args, **options)
        self.bucket_of = np.asarray(bucket_of)
        sizes = np.unique(self.bucket_of, return_counts=True)[1]
        if self.drop_last and not (sizes >= self.global_batch).any():
            self.drop_last = False
        self._counts = [int(n // self.global_batch if self.drop_last else -(-n // self.global_batch)) for n in sizes]

    def __len__(self) -> int:
        return sum(self._counts)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The global batches of this epoch."""
        order = self.order(epoch)
        buckets = self.bucket_of[order]
        parts = [order[buckets == number] for number in np.unique(self.bucket_of)]
        batches = [batch for part, count in zip(parts, self._counts, strict=True) for batch in self._cut(part, count)]
        if self.shuffle:
            batches = [batches[i] for i in np.random.default_rng([self.seed, epoch, 1]).permutation(len(batches))]
        return batches


def tell_epoch(dataset: Any, epoch: int) -> None:
    """Tell a data set the epoch, if it wants to know."""
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)


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
        if epoch != self._told:
            tell_epoch(self.dataset, epoch)
        self._told = epoch
        return epoch

    def __getitem__(self, index: int) -> Any:
        with seeded(self.seed, self._tell(), index):
            return self.dataset[index]

    def _get_items(self, indices: Sequence[int]) -> list[Any]:
        with seeded(self.seed, self._tell(), *indices):
            return self.dataset.__getitems__(indices)


class seeded:
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


class PositionedLoader(DataLoader):
    """A DataLoader with `state_dict()` and `load_state_dict()`: what its kinds have in common.

    The position is that of the last batch handed out, whatever workers have fetched ahead. Every new iterator begins a new epoch,
    but for the first one after `load_state_dict`, which goes on where the state was taken. `len()` is that of a whole epoch.
    """

    def _place(self, same_epoch: bool) -> None:
        """Begin with epoch 0. `same_epoch`: every iterator is epoch 0 from its start, as a validation wants it."""
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
        self._begin(*self.position)
        return self._count(super().__iter__(), *self.position)

    def _begin(self, epoch: int, done: int) -> None:
        """Let the next iterator start after `done` batches of an epoch."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it starts in the middle of an epoch")

    def state_dict(self) -> dict[str, Any]:
        """Where this loader is."""
        raise NotImplementedError(f"{type(self).__name__} does not say where it is")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        raise NotImplementedError(f"{type(self).__name__} cannot go on from a state")

    def take_over(self, other: PositionedLoader) -> None:
        """Begin where the next iterator of another loader of the same data would."""
        self.load_state_dict(other.state_dict())
        self._touched = other._touched

    def _received(self, batch: Any) -> Any:
        """What to hand out of what came from a worker; `position` is already the one after it."""
        return batch

    def _count(self, batches: Iterator[Any], epoch: int, done: int) -> Iterator[Any]:
        for batch in in_own_words(batches):
            done += 1
            self.position = (epoch, done) if done < min(len(self), self.limit()) else (epoch + 1, 0)
            self._touched = True
            yield self._received(batch)


def in_own_words(batches: Iterable[Any]) -> Iterator[Any]:
    """The same batches; what a worker says of a user's mistake comes without the worker's traceback."""
    try:
        yield from batches
    except UserError as error:
        last = str(error).strip().splitlines()[-1]
        raise type(error)(last.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")) from None


class ResumableLoader(PositionedLoader):
    """A PositionedLoader over a map-style data set; one with `bucket_of` gets batches of one bucket each."""

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        same_epoch: bool = False,
        num_workers: int = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        **options: Any,
    ) -> None:
        buckets = getattr(dataset, "bucket_of", None)
        order = (batch_size, seed, shuffle, drop_last, rank, world)
        sampler = ResumableSampler(len(dataset), *order) if buckets is None else BucketSampler(buckets, *order)
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
        self._place(same_epoch)

    def _begin(self, epoch: int, done: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.epoch, sampler.start = epoch, done
        self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; with another batch size, from the batch that holds the next unseen item (with buckets: near it)."""
        sampler: Any = self.batch_sampler
        items = state["batches"] * state["global_batch"]
        batches = items // sampler.global_batch
        self.position = (state["epoch"], batches) if batches < len(self) else (state["epoch"] + 1, 0)
        self._touched = False
