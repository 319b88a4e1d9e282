"""The order of items, the position in it, and latents that are computed once."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.datamodule import DataModuleFromConfig, WrappedDataset
from ldm.data.latents import CachedLatents
from ldm.data.loading import ResumableLoader, ResumableSampler
from ldm.util import ConfigError, trust
from tests.training.toy import NoisyData


def batches(loader: ResumableLoader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    sampler = ResumableSampler(10, 4, seed=1)
    one = list(sampler)
    assert [len(batch) for batch in one] == [4, 4, 2]
    assert sorted(chain(*one)) == list(range(10))
    assert list(sampler) == one
    sampler.epoch = 1
    assert list(sampler) != one
    assert list(ResumableSampler(10, 4, seed=2)) != one
    assert len(ResumableSampler(10, 4, drop_last=True)) == 2
    assert list(ResumableSampler(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("length", [7, 8, 9, 3])
def test_processes_share_every_batch(length: int) -> None:
    whole = list(chain(*ResumableSampler(length, 4, seed=5)))
    parts = [list(ResumableSampler(length, 2, seed=5, rank=rank, world=2)) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1])
    assert all(len(a) == len(b) for a, b in zip(*parts, strict=True))
    joined = list(chain(*(a + b for a, b in zip(*parts, strict=True))))
    assert joined[:length] == whole
    assert set(joined) == set(range(length))


@pytest.mark.parametrize("workers", [0, 2])
def test_position(workers: int) -> None:
    def new() -> ResumableLoader:
        return ResumableLoader(NoisyData(10), 4, seed=3, num_workers=workers)

    straight = new()
    expected = batches(straight) + batches(straight)
    stopped = new()
    seen = []
    for batch in stopped:
        seen.append(batch["index"].tolist())
        if len(seen) == 2:
            state = stopped.state_dict()
            break
    assert state["batches"] == 2
    resumed = new()
    resumed.load_state_dict(state)
    assert len(resumed) == 3
    assert seen + batches(resumed) + batches(resumed) == expected
    assert stopped.state_dict()["epoch"] == 0
    assert batches(stopped) == expected[3:]  # left in its middle, a loader goes on with the next epoch


def test_items_do_not_depend_on_workers_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(0)
    one = [batch["image"] for batch in ResumableLoader(NoisyData(6), 2)]
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == after
    two = [batch["image"] for batch in ResumableLoader(NoisyData(6), 2, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_evaluation_is_the_same_every_time() -> None:
    loader = ResumableLoader(NoisyData(6), 4, shuffle=False, same_epoch=True)
    one, two = list(loader), list(loader)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, two, strict=True))


def module(**params: object) -> DataModuleFromConfig:
    trust("tests")
    return DataModuleFromConfig(**{"batch_size": 2, "num_workers": 0, **params})


def test_splits_without_config_have_no_loader() -> None:
    from pytorch_lightning.utilities.model_helpers import is_overridden

    data = module(train={"target": "tests.training.toy.NoisyData"}, wrap=True)
    assert is_overridden("train_dataloader", data)
    assert not is_overridden("val_dataloader", data)
    assert len(data.train_dataloader()) == 15
    assert isinstance(data.datasets["train"], WrappedDataset)


def test_empty_data_is_told() -> None:
    data = module(train={"target": "tests.training.toy.NoisyData", "params": {"size": 0}})
    with pytest.raises(ConfigError, match="empty"):
        data.train_dataloader()


def test_another_batch_size_goes_on_with_unseen_items(caplog: pytest.LogCaptureFixture) -> None:
    data = module(train={"target": "tests.training.toy.NoisyData"}, batch_size=4, seed=1)
    loader = data.train_dataloader()
    iterator = iter(loader)
    seen = next(iterator)["index"].tolist() + next(iterator)["index"].tolist()
    other = module(train={"target": "tests.training.toy.NoisyData"}, batch_size=2, seed=1)
    other.load_state_dict(data.state_dict())
    rest = list(chain(*batches(other.train_dataloader())))
    assert sorted(seen + rest) == list(range(30))
    assert "global_batch" in caplog.text


# ---------------------------------------------------------------------- latents
class Pictures(Dataset):
    """Counts in a file how often a picture is drawn."""

    def __init__(self, log: str, size: int = 7, fail_at: int | None = None) -> None:
        self.log, self.size, self.fail_at = Path(log), size, fail_at

    def __len__(self) -> int:
        return self.size

    def caption_for(self, i: int, epoch: int | None = None) -> str:
        return f"{i} in epoch {epoch}"

    def __getitem__(self, i: int) -> dict:
        if i == self.fail_at and self.log.with_suffix(".fail").exists():
            raise RuntimeError("interrupted")
        with open(self.log, "a") as file:
            file.write(f"{i}\n")
        return {"image": np.full((4, 4, 3), i / 10, dtype=np.float32), "caption": f"caption {i}"}

    def drawn(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []


class PlainPictures(Pictures):
    """Without a caption for every epoch."""

    caption_for = property()  # type: ignore[assignment]


class Posterior:
    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def mode(self) -> Tensor:
        return self.mean


class Encoder(nn.Module):
    """Halves the sides and scales by its one weight."""

    def __init__(self, ckpt_path: str, factor: int = 2) -> None:
        super().__init__()
        self.scale = float(json.loads(Path(ckpt_path).read_text()))
        self.factor = factor

    def encode(self, x: Tensor) -> Posterior:
        return Posterior(self.scale * nn.functional.avg_pool2d(x, self.factor))


@pytest.fixture
def latents(tmp_path: Path):
    trust("tests")
    (tmp_path / "weights").write_text("2.0")

    def make(kind: str = "Pictures", size: int = 7, fail_at: int | None = None, **first_stage: object) -> CachedLatents:
        dataset = {"target": f"tests.training.test_data.{kind}", "params": {"log": str(tmp_path / "log"), "size": size, "fail_at": fail_at}}
        params = {"ckpt_path": str(tmp_path / "weights"), **first_stage}
        encoder = {"target": "tests.training.test_data.Encoder", "params": params}
        return CachedLatents(dataset, encoder, cache_dir=str(tmp_path / "cache"), batch_size=2, workers=0, device="cpu")

    return make


def files(tmp_path: Path) -> list[str]:
    return sorted(path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")


def test_latents_are_encoded_once(latents, tmp_path: Path) -> None:
    data = latents()
    assert len(data) == 7
    assert data[3]["z"].shape == (3, 2, 2)
    assert data[3]["z"].dtype == torch.float32
    assert data[3]["z"].flatten().tolist() == pytest.approx([0.6] * 12, abs=1e-3)
    assert sorted(set(data.dataset.drawn())) == list(range(7))
    drawn = len(data.dataset.drawn())
    again = latents()
    assert len(again.dataset.drawn()) == drawn + 2  # first and last picture, for the key
    _ = [again[i] for i in range(7)]
    assert len(again.dataset.drawn()) == drawn + 2
    assert files(tmp_path) == [".npy"]


def test_captions_follow_the_epoch(latents) -> None:
    loader = ResumableLoader(latents(), 4, shuffle=False)
    assert next(iter(loader))["caption"] == [f"{i} in epoch 0" for i in range(4)]
    loader.load_state_dict({**loader.state_dict(), "epoch": 5, "batches": 1})
    assert next(iter(loader))["caption"] == [f"{i} in epoch 5" for i in range(4, 7)]


def test_kept_captions(latents) -> None:
    assert latents("PlainPictures")[6]["caption"] == "caption 6"


def test_another_encoder_or_data_set_is_another_cache(latents, tmp_path: Path) -> None:
    paths = {latents().path, latents(size=6).path, latents(factor=1).path}
    (tmp_path / "weights").write_text("3.0")
    paths.add(latents().path)
    assert len(paths) == 4


def test_interrupted_cache_is_gone_on_with(latents, tmp_path: Path) -> None:
    (tmp_path / "log.fail").touch()
    with pytest.raises(RuntimeError, match="interrupted"):
        latents(fail_at=5)
    assert ".npy" in files(tmp_path)
    (tmp_path / "log.fail").unlink()
    before = (tmp_path / "log").read_text().count("\n")
    data = latents(fail_at=5)
    assert data.dataset.drawn()[before:] == [0, 6, 4, 5, 6]  # two for the key, then the rest
    assert [round(float(data[i]["z"].mean()), 2) for i in range(7)] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    assert files(tmp_path) == [".npy"]


def test_missing_weights_are_told(latents, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not exist"):
        latents(ckpt_path=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="ckpt_path is missing"):
        latents(ckpt_path=None)
