"""A data loader over a stream that can be cut into shares, with an epoch of fixed length and a position to go on from.

Owns how the shares of processes and workers make up an epoch, and how a resumed training finds its place in each. What a share holds is
the stream's business: anything with `epoch_size` and `batches(share)`. Other streams are only dealt out, and have no position.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ldm.data.loading import PositionedLoader
from ldm.util import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """What one worker of one process gives in one epoch: part `unit` of `units`, in batches, the first `skip` groups left out."""

    seed: int
    epoch: int
    unit: int = 0
    units: int = 1
    batch_size: int = 1
    skip: int = 0


class Stream(Protocol):
    """What `StreamLoader` reads. `batches` is endless and a pure function of the share; its numbers count the groups of samples
    formed so far, also those that made no batch, so that `skip` finds the same place again.
    """

    epoch_size: int  # samples of an epoch, over all processes

    def batches(self, share: Share) -> Iterator[tuple[int, Any]]:
        """(groups so far, batch) of a share."""

    def begin_epoch(self) -> None:
        """Called in the main process before an epoch's workers start."""


class _Part(IterableDataset):
    """A stream as a worker sees it. What `Part.begin` sets reaches workers because every epoch starts new ones."""

    def __init__(self, stream: Stream, seed: int, batch_size: int, rank: int, world: int) -> None:
        self.stream, self.seed, self.batch_size = stream, seed, batch_size
        self.rank, self.world = rank, world
        self.epoch, self.length, self.done = 0, 0, 0
        self.positions: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        info = get_worker_info()
        slot, workers = (info.id, info.num_workers) if info else (0, 1)
        number = (slot + self.done) % workers  # the loader asks slot 0 first, and it is the turn of this worker
        left = len(range(number, self.length, workers)) - len(range(number, self.done, workers))
        units = self.world * workers
        share = Share(self.seed, self.epoch, self.rank * workers + number, units, self.batch_size, self.positions[number])
        for position, batch in itertools.islice(self.stream.batches(share), left):
            yield number, position, batch


class StreamLoader(PositionedLoader):
    """A PositionedLoader over a `Stream`. An epoch has epoch_size // (batch_size x processes) batches, at least one."""

    def __init__(
        self,
        stream: Any,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        same_epoch: bool = False,
        num_workers: int = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            _Part(stream, seed, batch_size, rank, world),
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=worker_init_fn,
            generator=torch.Generator().manual_seed(seed),  # its own, so that iterating draws nothing from the global one
            **options,
        )
        self._place(same_epoch)
        self.streams = max(num_workers, 1)
        self._positions = [0] * self.streams  # groups formed by each worker in this epoch

    def __len__(self) -> int:
        part: Any = self.dataset
        return max(part.stream.epoch_size // (part.batch_size * part.world), 1)

    def _begin(self, epoch: int, done: int) -> None:
        part: Any = self.dataset
        if done == 0:
            self._positions = [0] * self.streams
        part.epoch, part.length, part.done, part.positions = epoch, len(self), done, list(self._positions)
        part.stream.begin_epoch()

    def _received(self, batch: Any) -> Any:
        number, position, content = batch
        self._positions[number] = position
        if self.position[1] == 0:  # that was the last batch of the epoch
            self._positions = [0] * self.streams
        return content

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches taken in it, the workers' places, and what a batch and the order were."""
        part: Any = self.dataset
        epoch, batches = self.position
        return {
            "epoch": epoch,
            "batches": batches,
            "positions": list(self._positions),
            "global_batch": part.batch_size * part.world,
            "seed": part.seed,
            "length": part.stream.epoch_size,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state. With another batch size or number of workers the shares are others: about as many samples are skipped."""
        part: Any = self.dataset
        now = part.batch_size * part.world
        batches, positions = state["batches"], list(state.get("positions", ()))  # none: the run had another kind of data before
        if len(positions) != self.streams or state["global_batch"] != now:
            log.warning("data: the batch size or the number of workers has changed, so some samples of this epoch come twice or never")
            batches = batches * state["global_batch"] // now
            positions = [len(range(number, batches, self.streams)) for number in range(self.streams)]
        self.position = (state["epoch"], batches) if batches < len(self) else (state["epoch"] + 1, 0)
        self._positions = positions if self.position[1] else [0] * self.streams
        self._touched = False


# ---------------------------------------------------------------------- streams that cannot be cut into shares
class DealtStream(IterableDataset):
    """A foreign stream, its batches dealt to processes and workers in turn: the same batches, whatever the number of workers.

    Everyone reads the whole stream and gives only its own batches, so the stream must have the same order for all. Several processes
    get as many batches each, and what is left of the stream then is left out: a process with one batch more would wait for the others.
    """

    def __init__(self, stream: Any, batch_size: int, rank: int, world: int) -> None:
        super().__init__()
        self.stream, self.batch_size, self.rank, self.world = stream, batch_size, rank, world

    def __len__(self) -> int:
        """Items of this process, where the stream knows its length."""
        length = len(self.stream)
        return length if self.world == 1 else length // (self.batch_size * self.world) * self.batch_size

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        together, own, place = self.batch_size * self.world, [], -1
        for place, item in enumerate(self.stream):
            turn, at = divmod(place, together)  # a turn is a batch for every process
            if turn % workers == worker and at // self.batch_size == self.rank:
                own.append(item)
            if at == together - 1:
                yield from own
                own = []
        if self.world == 1:
            yield from own
        elif place + 1 < together:
            raise ConfigError(
                f"{type(self.stream).__name__} has {place + 1} items: {self.world} processes need a batch of {self.batch_size} each, so "
                "take a smaller data.params.batch_size, or fewer processes"
            )


class NarrowedStream(IterableDataset):
    """A stream with `narrow(rank, world, worker, workers)`, told in every worker of every process which part it is to give."""

    def __init__(self, stream: Any, rank: int, world: int) -> None:
        super().__init__()
        self.stream, self.rank, self.world = stream, rank, world

    def __len__(self) -> int:
        return len(self.stream) // self.world

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self.stream.narrow(self.rank, self.world, worker, workers)
        yield from self.stream
