"""Buckets and streams in the loader: batches, epochs, and going on in the middle of one."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.buckets import Buckets
from ldm.data.datamodule import DataModuleFromConfig
from ldm.data.loading import BucketSampler, ResumableLoader
from ldm.data.shards import write_index
from ldm.data.streams import StreamLoader
from ldm.data.webdataset import ShardDataset
from ldm.util import ConfigError, UserError, instantiate_from_config
from tests.data_.conftest import shade_of

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


# ---------------------------------------------------------------------- buckets
def test_buckets_have_about_one_area() -> None:
    buckets = Buckets.of_area(512)
    assert (512, 512) in buckets.sizes
    assert all(h % 64 == w % 64 == 0 and 0.7 * 512**2 < h * w <= 512**2 for h, w in buckets.sizes)
    assert set(buckets.sizes) == {(w, h) for h, w in buckets.sizes}
    assert (768, 1344) in Buckets.of_area(1024, shortest=512, longest=2048).sizes  # one of SDXL's
    assert buckets.sizes[buckets.choose(1000, 1000)] == (512, 512)
    height, width = buckets.sizes[buckets.choose(900, 1600)]
    assert width / height == pytest.approx(16 / 9, rel=0.12)
    assert buckets.sizes[buckets.choose(1000, 100)][0] == 1024
    assert Buckets.from_config([[64, 128], [128, 64]]).choose(10, 30) == 0
    for wrong in ({"step": 64}, {"side": 64, "colour": 1}, [[64]], {"side": 10, "shortest": 20}):
        with pytest.raises(ConfigError):
            Buckets.from_config(wrong)


def test_batches_are_of_one_bucket_and_everything_comes_once() -> None:
    bucket_of = np.array([0] * 5 + [1] * 8 + [2])
    sampler = BucketSampler(bucket_of, 4, seed=1)
    for epoch in (0, 1):
        batches = sampler.plan(epoch)
        assert len(batches) == len(sampler) == 5
        assert sorted(chain(*batches)) == list(range(14))
        assert all(len(set(bucket_of[batch])) == 1 for batch in batches)
    assert [b.tolist() for b in sampler.plan(0)] != [b.tolist() for b in sampler.plan(1)]
    assert len(BucketSampler(bucket_of, 4, drop_last=True)) == 3
    parts = [list(BucketSampler(bucket_of, 2, 1, True, False, rank, 2)) for rank in (0, 1)]
    assert [len(a) for a in parts[0]] == [len(b) for b in parts[1]] == [2] * 5
    assert all(len({*bucket_of[a], *bucket_of[b]}) == 1 for a, b in zip(*parts, strict=True))


class Sized(torch.utils.data.Dataset):
    bucket_of = np.arange(11) % 2

    def __len__(self) -> int:
        return 11

    def __getitem__(self, i: int) -> dict:
        return {"index": i, "noise": np.random.rand()}


@pytest.mark.parametrize("workers", [0, 2])
def test_buckets_resume_in_the_middle_of_an_epoch(workers: int) -> None:
    def flat(loader: ResumableLoader) -> list:
        return [(batch["index"].tolist(), batch["noise"].tolist()) for batch in loader]

    straight = ResumableLoader(Sized(), 2, seed=4)
    expected = flat(straight) + flat(straight)
    stopped = ResumableLoader(Sized(), 2, seed=4, num_workers=workers)
    iterator = iter(stopped)
    for _ in range(4):
        next(iterator)
    resumed = ResumableLoader(Sized(), 2, seed=4, num_workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    assert flat(resumed) + flat(resumed) == expected[4:]


class Angry(Sized):
    def __getitem__(self, i: int) -> dict:
        raise UserError(f"image {i} is damaged")


def test_a_workers_complaint_is_one_line() -> None:
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^image \d+ is damaged$"):
            next(iter(ResumableLoader(Angry(), 2, num_workers=workers)))


# ---------------------------------------------------------------------- streams
def png(shade: int, size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for key, entries in samples.items():
            for kind, content in entries.items():
                info = tarfile.TarInfo(f"{key}.{kind}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five shards of four samples; sample n has shade 10 n and the caption "n"; the odd ones are twice as wide."""
    folder = tmp_path / "shards"
    for s in range(5):
        numbers = range(4 * s, 4 * s + 4)
        tar(
            folder / f"{s:05d}.tar",
            {
                f"{n:04d}": {"png": png(10 * n, (32, 16) if n % 2 else (16, 16)), "txt": f"{n}".encode(), "json": b'{"n": %d}' % n}
                for n in numbers
            },
        )
    write_index(folder)
    return folder


def captions(batches) -> list[list[str]]:
    return [batch["caption"] for batch in batches]


def test_one_epoch_of_one_worker_is_all_samples(shards: Path) -> None:
    data = ShardDataset(str(shards), size=8, shuffle=7)
    assert data.epoch_size == 20
    loader = StreamLoader(data, 4, seed=1)
    one, two = captions(loader), captions(loader)
    assert len(loader) == len(one) == 5
    assert sorted(map(int, chain(*one))) == sorted(map(int, chain(*two))) == list(range(20))
    assert one != two
    assert captions(StreamLoader(data, 4, seed=1)) == one
    assert captions(StreamLoader(data, 4, seed=2)) != one
    batch = next(iter(loader))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert [shade_of(x) for x in batch["image"]] == [10 * int(n) for n in batch["caption"]]
    in_order = captions(StreamLoader(ShardDataset(str(shards), size=8, shuffle=0), 4))
    assert list(chain(*in_order)) == [str(n) for n in range(20)]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 2), (2, 2), (4, 2)])
def test_processes_and_workers_share_the_samples(shards: Path, world: int, workers: int) -> None:
    """With five shards, up to five streams get shards of their own; eight get every eighth sample."""
    data = ShardDataset(str(shards), size=8, shuffle=3)
    seen = [list(chain(*captions(StreamLoader(data, 1, 5, rank, world, num_workers=workers)))) for rank in range(world)]
    assert [len(part) for part in seen] == [20 // world] * world
    own = [set(part) for part in seen]
    if world * max(workers, 1) <= 5:
        assert all(not (a & b) for i, a in enumerate(own) for b in own[:i])
    if (world, workers) == (4, 2):
        assert len(set(chain(*seen))) >= 16  # eight streams of two or three samples each, and all give as many


@pytest.mark.parametrize(("workers", "stop"), [(0, 4), (0, 7), (2, 1), (2, 9), (3, 4)])
def test_a_stream_resumes_where_it_was(shards: Path, workers: int, stop: int) -> None:
    def new() -> StreamLoader:
        data = ShardDataset(str(shards), size=8, shuffle=5, flip=0.5, crop="random", epoch_size=14)
        return StreamLoader(data, 2, seed=3, num_workers=workers)

    def flat(loader: StreamLoader) -> list:
        return [(batch["caption"], batch["image"].sum().item()) for batch in loader]

    straight = new()
    expected = flat(straight) + flat(straight)
    stopped, seen = new(), []
    while len(seen) < stop:
        for batch in stopped:
            seen.append((batch["caption"], batch["image"].sum().item()))
            if len(seen) == stop:
                state = json.loads(json.dumps(stopped.state_dict()))
                break
    resumed = new()
    resumed.load_state_dict(state)
    rest = flat(resumed)
    rest = rest + flat(resumed) if len(seen) + len(rest) < len(expected) else rest
    assert seen + rest == expected


def test_a_short_stream_begins_again_and_a_long_one_is_cut(shards: Path) -> None:
    long = captions(StreamLoader(ShardDataset(str(shards), size=8, epoch_size=30), 3))
    assert len(long) == 10
    assert len(set(chain(*long))) == 20
    assert len(captions(StreamLoader(ShardDataset(str(shards), size=8, epoch_size=6), 3))) == 2


def test_a_batch_of_a_stream_is_of_one_bucket(shards: Path) -> None:
    data = ShardDataset(str(shards), buckets=[[8, 16], [8, 8]], shuffle=6)
    shapes = set()
    for batch in StreamLoader(data, 2):
        shapes.add(tuple(batch["image"].shape[1:]))
        assert len({int(n) % 2 for n in batch["caption"]}) == 1
        assert batch["target_size_as_tuple"].tolist() == [list(batch["image"].shape[1:3])] * 2
    assert shapes == {(8, 16, 3), (8, 8, 3)}


def test_bad_samples_are_counted_and_left_out(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar(shards / "00001.tar", {
        "a": {"png": b"no picture", "txt": b"bad"}, "b": {"png": png(40)}, "c": {"png": png(50), "txt": b"5"},
        "d": {"png": png(60), "txt": b"6"},
    })  # fmt: skip
    (shards / "00002.tar").write_bytes((shards / "00002.tar").read_bytes()[:3000])  # in the middle of a picture's entry or after
    data = ShardDataset(str(shards), size=8, shuffle=4)
    loader = StreamLoader(data, 2, seed=1)
    said = list(chain(*captions(loader)))
    assert "bad" not in said
    assert len(said) == 20
    assert data.corrupt >= 3
    assert "a in" in caplog.text
    strict = ShardDataset(str(shards), size=8, shuffle=4, max_corrupt=1)
    with pytest.raises(UserError, match="more than max_corrupt 1"):
        list(StreamLoader(strict, 2, seed=1, num_workers=1))


def test_a_resumed_stream_with_bad_samples_is_the_same(shards: Path) -> None:
    bad = {str(n): {"png": b"broken" if n % 2 else png(n), "txt": str(n).encode()} for n in range(8)}
    tar(shards / "00001.tar", bad)

    def new() -> StreamLoader:
        return StreamLoader(ShardDataset(str(shards), size=8, shuffle=4), 1, seed=2, num_workers=2)

    expected = captions(new())
    stopped = new()
    iterator = iter(stopped)
    seen = [next(iterator)["caption"] for _ in range(9)]
    resumed = new()
    resumed.load_state_dict(stopped.state_dict())
    assert seen + captions(resumed) == expected


def test_no_sample_with_the_wanted_entries_is_an_error(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"no sample has the wanted entries jpg and text.*png, txt"):
        next(iter(StreamLoader(ShardDataset(str(shards), size=8, image_file="jpg", caption_file="text"), 2, num_workers=1)))
    with pytest.raises(ConfigError, match="where"):
        next(iter(StreamLoader(ShardDataset(str(shards), size=8, where={"n": {"min": 100}}), 2)))


def test_where_and_json_captions(shards: Path) -> None:
    names = {"caption_file": "json.n", "image_key": "jpg", "caption_key": "txt"}
    data = ShardDataset(str(shards), size=8, where={"n": {"min": 4, "max": 9}}, epoch_size=6, **names)
    items = list(data)
    assert sorted(int(item["txt"]) for item in items) == list(range(4, 10))
    assert items[0]["jpg"].shape == (8, 8, 3)
    assert data.corrupt == 0


def test_what_is_wrong_with_shards_is_told(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, match in (
        ("nowhere", "nowhere"), (str(shards / "{00000..00009}.tar"), r"00005\.tar"), ("pipe:cat x.tar", "LDM_REMOTE_DATA"),
        ("https://example.org/x.tar", "LDM_REMOTE_DATA"), ([], "no shards"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            ShardDataset(source, size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="make_shards"):
        ShardDataset(str(tmp_path / "empty"), size=8)
    with pytest.raises(ConfigError, match="one of size, buckets"):
        ShardDataset(str(shards))
    (shards / "shards.json").unlink()
    with pytest.raises(ConfigError, match="epoch_size"):
        ShardDataset(str(shards), size=8)
    assert len(ShardDataset(str(shards / "{00000..00002}.tar"), size=8, epoch_size=3).shards) == 3


def test_the_data_module_keeps_the_place_in_a_stream(shards: Path) -> None:
    params = {"shards": str(shards), "size": 8, "shuffle": 5}
    config = {"target": "ldm.data.webdataset.ShardDataset", "params": params}

    def new() -> DataModuleFromConfig:
        return DataModuleFromConfig(2, train=config, validation=config, num_workers=2, wrap=True, seed=1)

    expected = captions(new().train_dataloader())
    data = new()
    iterator = iter(data.train_dataloader())
    seen = [next(iterator)["caption"] for _ in range(3)]
    again = new()
    again.load_state_dict(data.state_dict())
    assert seen + captions(again.train_dataloader()) == expected
    validation = data.val_dataloader()
    assert captions(validation) == captions(validation)


def test_the_data_module_of_stable_diffusions_configs(shards: Path) -> None:
    resize = {"target": "torchvision.transforms.Resize", "params": {"size": 12, "interpolation": 3}}
    crop = {"target": "torchvision.transforms.CenterCrop", "params": {"size": 12}}
    split = {"shards": "{00000..00004}.tar", "shuffle": 10, "image_key": "png", "image_transforms": [resize, crop], "epoch_size": 8}
    params = {"tar_base": str(shards), "batch_size": 4, "num_workers": 0, "multinode": True, "train": split, "validation": split}
    data = instantiate_from_config({"target": "ldm.data.laion.WebDataModuleFromConfig", "params": {**params, "val_batch_size": 2}})
    batch = next(iter(data.train_dataloader()))
    assert batch["png"].shape == (4, 12, 12, 3)
    assert [shade_of(x) for x in batch["png"]] == [10 * int(n) for n in batch["txt"]]
    assert len(next(iter(data.val_dataloader()))["txt"]) == 2
    for limits in ({"max_pwatermark": 0.5}, {"min_size": 64}, {"p_unsafe_threshold": 0.1}):  # the notes say nothing of these
        data = instantiate_from_config({"target": "ldm.data.laion.WebDataModuleFromConfig", "params": {**params, **limits}})
        with pytest.raises(ConfigError, match="where"):
            next(iter(data.train_dataloader()))
    masked = {**split, "postprocess": {"target": "ldm.data.laion.AddMask", "params": {"mode": "512train-large", "image_key": "png"}}}
    data = instantiate_from_config({"target": "ldm.data.laion.WebDataModuleFromConfig", "params": {**params, "train": masked}})
    batch = next(iter(data.train_dataloader()))
    assert batch["mask"].shape == (4, 12, 12, 1) and 0 < float(batch["mask"].mean()) < 1
    assert torch.equal(batch["masked_image"], batch["png"] * (batch["mask"] < 0.5))
    with pytest.raises(ConfigError, match="filter_word_list"):
        instantiate_from_config({"target": "ldm.data.laion.WebDataModuleFromConfig", "params": {**params, "filter_word_list": "x"}})
