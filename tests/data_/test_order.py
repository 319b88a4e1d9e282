"""Who reads what: loaders that are made anew in the middle of a training, streams that do not split themselves, and pairs of sizes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.loading import ResumableLoader
from ldm.data.personalized import WithPrior
from ldm.data.streams import DealtStream, NarrowedStream
from ldm.util import ConfigError, trust
from tests.training.toy import ToyModel

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*does not have many workers", "ignore:Your `Iter")


@pytest.fixture(autouse=True)
def _trusted() -> None:
    trust("tests")


# ---------------------------------------------------------------------- loaders made anew
class Keep(pl.Callback):
    """Writes a checkpoint after a batch, counted over all epochs."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: ToyModel, *args: object) -> None:
        if len(pl_module.seen) == self.after:
            trainer.save_checkpoint(self.path)


def fit(keep: Keep | None = None, resume: Path | None = None, **options: object) -> list[list[int]]:
    """The items of every batch that a training of the toy model sees, of three batches an epoch."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=keep, use_distributed_sampler=False, max_epochs=4, **quiet, **options)
    data = DataModuleFromConfig(4, train={"target": "tests.training.toy.NoisyData", "params": {"size": 12}}, num_workers=0, seed=5)
    model = ToyModel()
    trainer.fit(model, datamodule=data, ckpt_path=resume, weights_only=False)
    return model.seen


@pytest.mark.parametrize("limit", [1.0, 2])
def test_loaders_made_anew_in_every_epoch_change_nothing(tmp_path: Path, limit: float) -> None:
    expected = fit(limit_train_batches=limit)
    again = {"reload_dataloaders_every_n_epochs": 1, "limit_train_batches": limit}
    middle = Keep(tmp_path / "x.ckpt", 3 if limit == 2 else 4)  # after the first batch of the second epoch
    assert fit(middle, **again) == expected
    assert fit(resume=middle.path, **again) == expected[middle.after :]


def test_a_loader_left_in_the_middle_hands_over_the_next_epoch() -> None:
    class Numbers(Dataset):
        def __len__(self) -> int:
            return 9

        def __getitem__(self, i: int) -> int:
            return i

    def batches(loader: ResumableLoader) -> list[list[int]]:
        return [batch.tolist() for batch in loader]

    straight = ResumableLoader(Numbers(), 2, seed=1)
    expected = [batches(straight) for _ in range(2)]
    left, after = ResumableLoader(Numbers(), 2, seed=1), ResumableLoader(Numbers(), 2, seed=1)
    next(iter(left))
    after.take_over(left)
    assert batches(after) == expected[1]
    loaded, after = ResumableLoader(Numbers(), 2, seed=1), ResumableLoader(Numbers(), 2, seed=1)
    loaded.load_state_dict(left.state_dict())  # nothing is read of it yet
    after.take_over(loaded)
    assert batches(after) == expected[0][1:]


# ---------------------------------------------------------------------- streams
class Foreign(IterableDataset):
    """Gives everyone the same."""

    def __init__(self, length: int = 23) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


class Ids(Txt2ImgIterableBaseDataset):
    """Gives its ids and says who gave them."""

    def __init__(self, length: int = 23) -> None:
        super().__init__(length, list(range(length)))

    def __iter__(self) -> Iterator[int]:
        return iter(self.sample_ids)


class Splitting(Foreign):
    """Splits itself among workers."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(info.id, self.length, info.num_workers) if info else range(self.length))


def read(kind: str, rank: int = 0, world: int = 1, workers: int = 0, length: int = 23, **params: object) -> tuple[list[list[int]], int]:
    """(batches of one process, how many its loader promised)."""
    config = {"target": f"tests.data_.test_order.{kind}", "params": {"length": length}}
    data = DataModuleFromConfig(2, train=config, num_workers=workers, **params)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world)
    loader = data.loader("train")
    return [batch.tolist() for batch in loader], len(loader)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_a_stream_that_is_dealt_gives_the_same_batches_whatever_the_workers(workers: int) -> None:
    for length in (23, 24, 3):
        batches, promised = read("Foreign", workers=workers, length=length, stream_split="deal")
        assert batches == [list(range(i, min(i + 2, length))) for i in range(0, length, 2)]
        assert promised == len(batches)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (2, 2), (3, 2)])
def test_processes_get_as_many_batches_and_none_twice(world: int, workers: int) -> None:
    parts = [read("Foreign", rank, world, workers, stream_split="deal") for rank in range(world)]
    whole = 23 // (2 * world)
    assert all(len(batches) == promised == whole for batches, promised in parts)
    assert sorted(chain(*chain(*(batches for batches, _ in parts)))) == list(range(whole * world * 2))
    assert {len(batch) for batches, _ in parts for batch in batches} == {2}


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (1, 3), (2, 0), (2, 2), (3, 2)])
def test_streams_of_ids_are_narrowed_for_every_worker(world: int, workers: int) -> None:
    parts = [read("Ids", rank, world, workers)[0] for rank in range(world)]
    items = list(chain(*chain(*parts)))
    assert len(set(items)) == len(items) == 23 // world * world
    assert len({len(batches) for batches in parts}) == 1, "a process with fewer batches would let the others wait"


def test_a_stream_that_may_not_be_split_is_an_error_where_it_matters() -> None:
    everything = [list(range(i, min(i + 2, 23))) for i in range(0, 23, 2)]
    assert read("Foreign", workers=0)[0] == read("Foreign", workers=1)[0] == read("Ids")[0] == everything
    for world, workers in ((2, 0), (1, 2)):
        with pytest.raises(ConfigError, match=rf"\(Foreign\).*processes: {world}, workers in each: {workers}.*stream_split to own.*deal"):
            read("Foreign", world=world, workers=workers)
    assert sorted(chain(*read("Splitting", workers=2, stream_split="own")[0])) == list(range(23))
    with pytest.raises(ConfigError, match="stream_split is 'no'"):
        read("Foreign", stream_split="no")
    with pytest.raises(ConfigError, match="Foreign has 3 items: 2 processes need a batch of 2 each"):
        list(DealtStream(Foreign(3), 2, 0, 2))
    with pytest.raises(ConfigError, match="Ids has 1 ids for 2 processes"):
        list(NarrowedStream(Ids(1), 0, 2))


# ---------------------------------------------------------------------- sizes
class OfSizes(Dataset):
    """Pictures of 8 or 12 rows (of 8 only, without buckets)."""

    def __init__(self, length: int, buckets: bool = True) -> None:
        self.length = length
        self.bucket_of = np.arange(length) // 2 % 2 if buckets else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < self.length:
            raise IndexError(i)
        rows = 8 if self.bucket_of is None else (8, 12)[self.bucket_of[i]]
        return {"image": np.zeros((rows, 4, 3), np.float32), "index": i}


@pytest.mark.parametrize("instance, prior", [(True, False), (False, True), (True, True)])
def test_a_batch_with_a_prior_has_one_size_of_each(instance: bool, prior: bool) -> None:
    def of(length: int, buckets: bool) -> dict:
        return {"target": "tests.data_.test_order.OfSizes", "params": {"length": length, "buckets": buckets}}

    data = WithPrior(of(9, instance), of(14, prior))
    seen, sizes = [], set()
    for batch in ResumableLoader(data, 2, seed=3):
        sizes.add((batch["image"].shape[1], batch["prior"]["image"].shape[1]))
        seen += batch["prior"]["index"].tolist()
    assert sorted(seen) == list(range(14))
    assert sizes == {(a, b) for a in ((8, 12) if instance else (8,)) for b in ((8, 12) if prior else (8,))}
    assert WithPrior(of(9, False), of(3, False)).bucket_of is None
