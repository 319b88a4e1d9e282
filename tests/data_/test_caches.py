"""Caches of latents and embeddings: their keys, what an interruption leaves, and that a training does not notice them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.folder import FolderDataset
from ldm.data.latents import CachedLatents
from ldm.data.shapes import ShapesDataset
from ldm.data.store import ArrayStore, file_digest
from ldm.data.weighted import WeightedDataset
from ldm.data.wrappers import WrappedItems
from ldm.util import ConfigError, trust

SHAPES = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 5, "image_size": 32, "seed": 3}}


class Cropped(Dataset):
    """Pictures at random places of noise, as a data set that augments has them; it cannot tell when its files change."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> dict:
        top, left = np.random.randint(5), int(torch.randint(5, ()))
        return {"image": np.random.default_rng(i).random((12, 12, 3), dtype=np.float32)[top : top + 8, left : left + 8], "caption": "x"}


class Drawing(nn.Module):
    """A network whose building draws its first weights from the global generator."""

    def __init__(self, ckpt_path: str) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def encode(self, x: Tensor | list[str]) -> Tensor:
        return torch.zeros(len(x), 2, 3) if isinstance(x, list) else nn.functional.avg_pool2d(x, 2)


@pytest.fixture
def network(tmp_path: Path) -> dict:
    trust("tests")
    (tmp_path / "weights").write_text("1.0")
    return {"target": "tests.data_.test_caches.Drawing", "params": {"ckpt_path": str(tmp_path / "weights")}}


def cached(dataset: dict, network: dict, **options: object) -> CachedLatents:
    return CachedLatents(dataset, network, "cache", workers=0, device="cpu", **options)


# ---------------------------------------------------------------------- key
def test_pictures_that_are_cut_at_random_are_found_again(network: dict) -> None:
    dataset = {"target": "tests.data_.test_caches.Cropped", "params": {}}
    paths = set()
    for seed in range(4):
        np.random.seed(seed)
        torch.manual_seed(seed)
        paths.add(cached(dataset, network).path)
    assert len(paths) == 1


def test_the_key_of_pictures_without_chance_stays(network: dict, tmp_path: Path) -> None:
    """Caches that lie on people's disks must be found."""
    data = ShapesDataset(**SHAPES["params"])
    digest = hashlib.sha256(json.dumps([SHAPES, network["target"], {}], sort_keys=True).encode())
    digest.update(file_digest(tmp_path / "weights") + data[0]["image"].tobytes() + data[4]["image"].tobytes())
    assert cached(SHAPES, network).path.stem == digest.hexdigest()[:20]


def test_a_training_does_not_depend_on_whether_the_cache_was_there(network: dict, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("a caption")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    dataset = {"target": "ldm.data.folder.FolderDataset", "params": {"root": str(tmp_path)}}
    drawn = []
    for options in ({}, {"text_encoder": network}, {"text_encoder": network}):  # empty; embeddings are missing; all is there
        torch.manual_seed(0)
        data = cached(dataset, network, **options)
        drawn.append(float(torch.rand(())))
    assert data[0]["c"].shape == (2, 3)
    assert len(set(drawn)) == 1


# ---------------------------------------------------------------------- interruptions
def rows(start: int, stop: int):
    for i in range(start, stop):
        yield np.full((1, 2), i + 1, np.float16), [f"note {i}"]


@pytest.mark.parametrize("harm", ["missing", "damaged", "another length"])
def test_progress_without_its_rows_is_not_believed_later(tmp_path: Path, harm: str) -> None:
    store = ArrayStore(tmp_path / "a.npy", 40, "rows")

    def interrupted(start: int, after: int):
        yield from rows(start, start + after)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.filled(lambda start: interrupted(start, 30))
    assert json.loads(store.progress.read_text())["done"] == 30
    if harm == "missing":
        store.partial.unlink()
    elif harm == "damaged":
        store.partial.write_bytes(b"?")
    else:
        np.save(store.partial, np.zeros((39, 2), np.float16))
    with pytest.raises(KeyboardInterrupt):
        store.filled(lambda start: interrupted(start, 1))  # killed again before anything new is kept
    values, notes = store.filled(lambda start: rows(start, 40))
    np.testing.assert_array_equal(values[:, 0], np.arange(1, 41))
    assert notes == [f"note {i}" for i in range(40)]
    assert not store.progress.exists() and not store.partial.exists()


def test_too_few_rows_are_not_taken_for_all(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path / "a.npy", 4, "rows")
    with pytest.raises(ConfigError, match="only 3 of 4 rows were encoded"):
        store.filled(lambda start: rows(start, 3))
    assert not store.path.exists()
    assert store.filled(lambda start: rows(start, 4))[0][:, 0].tolist() == [1, 2, 3, 4]


def test_progress_is_kept_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.data.store._KEEP_EVERY", 0.0)
    store = ArrayStore(tmp_path / "a.npy", 1000, "rows")

    def three(start: int):
        yield from rows(start, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.filled(three)
    assert json.loads(store.progress.read_text())["done"] == 3


# ---------------------------------------------------------------------- data sets inside data sets
@pytest.fixture
def folder(tmp_path: Path, picture) -> Path:
    for i in range(4):
        picture(tmp_path / "mine" / f"{i}.png", 40 * i, (8, 8)).with_suffix(".txt").write_text("often" if i == 1 else "seldom")
    return tmp_path / "mine"


def test_a_cache_of_weighted_items_follows_pictures_and_captions(folder: Path, network: dict) -> None:
    inner = {"target": "ldm.data.folder.FolderDataset", "params": {"root": str(folder)}}
    params = {"dataset": inner, "key": "caption", "weights": {"often": 3}}
    dataset = {"target": "ldm.data.weighted.WeightedDataset", "params": params}
    plain = {**dataset, "params": {"dataset": inner, "key": "class_label", "weights": {}}}
    with pytest.raises(ConfigError, match="no fact 'class_label'"):
        cached(plain, network)

    def shades() -> list[int]:
        data = cached(dataset, network)
        paths.append(data.path)
        assert [data[i]["caption"] for i in range(6)] == [WeightedDataset(**params)[i]["caption"] for i in range(6)]
        return [round((float(data[i]["z"][0].mean()) + 1) * 127.5) for i in range(6)]

    paths: list[Path] = []
    assert shades() == [0, 40, 40, 40, 80, 120] and shades() == [0, 40, 40, 40, 80, 120]
    Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "2.png")  # neither the first nor the last
    assert shades() == [0, 40, 40, 40, 200, 120]
    (folder / "1.txt").write_text("seldom")
    (folder / "2.txt").write_text("often")  # the pictures are the same, their places are not
    assert shades() == [0, 40, 200, 200, 200, 120]
    assert paths[0] == paths[1] and len(set(paths)) == 3


def test_captions_may_be_edited_where_weights_go_by_something_else(tmp_path: Path, picture, network: dict) -> None:
    for i in range(2):
        picture(tmp_path / "classes" / f"kind{i}" / "a.png", 90 * i, (8, 8))
    inner = {"target": "ldm.data.folder.FolderDataset", "params": {"root": str(tmp_path / "classes"), "caption_template": "a {}"}}
    dataset = {"target": "ldm.data.weighted.WeightedDataset", "params": {"dataset": inner, "key": "class_label", "weights": {1: 2}}}
    data = cached(dataset, network)
    assert [data.facts(i)["caption"] for i in range(3)] == ["a kind0", "a kind1", "a kind1"]
    lines = [{"file_name": f"kind{i}/a.png", "text": f"new {i}"} for i in range(2)]
    (tmp_path / "classes" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    inner["params"]["captions"] = "metadata"
    by_caption = {**dataset, "params": {"dataset": inner, "key": "caption", "weights": {}}}
    first = cached(by_caption, network)
    (tmp_path / "classes" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)).replace("new 1", "newer"))
    again = cached(by_caption, network)
    assert again.path == first.path and again[1]["caption"] == "newer"


@pytest.mark.parametrize("outer", ["weighted", "wrapped"])
def test_captions_of_every_epoch_reach_a_cache_through_what_lies_between(outer: str, network: dict) -> None:
    between = {
        "weighted": {"target": "ldm.data.weighted.WeightedDataset", "params": {"dataset": SHAPES, "key": "kind", "weights": {}}},
        "wrapped": {"target": "ldm.data.wrappers.WrappedItems", "params": {"dataset": SHAPES, "additions": []}},
    }
    data = cached(between[outer], network)
    for epoch in (0, 4):
        data.set_epoch(epoch)
        assert [data[i]["caption"] for i in range(5)] == [ShapesDataset(**SHAPES["params"]).caption_for(i, epoch) for i in range(5)]
    with pytest.raises(ConfigError, match="other captions in every epoch"):
        cached(between[outer], network, text_encoder=network)


def test_what_a_data_set_does_not_have_is_not_promised_in_its_name(folder: Path) -> None:
    inner = FolderDataset(str(folder))
    for data in (WeightedDataset(inner, "caption", {}), WrappedItems(inner, [])):
        assert not hasattr(data, "caption_for") and hasattr(data, "content")
    assert not hasattr(WeightedDataset(ShapesDataset(**SHAPES["params"]), "kind", {}), "content")
