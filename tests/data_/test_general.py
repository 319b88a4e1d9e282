"""Folders with captions, Hugging Face data sets on disk, writing shards, and caches of latents and embeddings."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from ldm.data.folder import FolderDataset
from ldm.data.huggingface import HuggingFaceDataset
from ldm.data.latents import CachedLatents
from ldm.data.loading import ResumableLoader
from ldm.data.pictures import Framing
from ldm.data.shards import write_shards
from ldm.data.streams import StreamLoader
from ldm.data.webdataset import ShardDataset
from ldm.util import ConfigError, UserError, trust
from tests.data_.conftest import shade_of

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def folder(tmp_path: Path, picture) -> Path:
    """Six pictures with captions beside them; the odd ones are upright."""
    for i in range(6):
        picture(tmp_path / "mine" / f"{i}.png", 40 * i, (20, 32) if i % 2 else (32, 20)).with_suffix(".txt").write_text(f"shade\n {i} ")
    return tmp_path / "mine"


# ---------------------------------------------------------------------- captions
def test_captions_beside_the_pictures(folder: Path) -> None:
    data = FolderDataset(str(folder), size=16)
    assert [data[i]["caption"] for i in range(6)] == [f"shade {i}" for i in range(6)]
    item = data[3]
    assert item["image"].shape == (16, 16, 3)
    assert item["image"].dtype == np.float32
    assert shade_of(item["image"]) == 120
    assert item["original_size_as_tuple"].tolist() == [32, 20]
    assert item["crop_coords_top_left"].tolist() == [5, 0]  # 20x32 is scaled to 16x26, and the middle is kept
    assert item["target_size_as_tuple"].tolist() == [16, 16]
    named = FolderDataset(str(folder), size=[16, 24], image_key="jpg", caption_key="txt")[0]
    assert named["jpg"].shape == (16, 24, 3)
    assert named["txt"] == "shade 0"
    assert "caption" not in FolderDataset(str(folder), size=16, captions="none")[0]


def test_captions_in_metadata_win_over_files_beside(folder: Path) -> None:
    lines = [{"file_name": f"{i}.png", "text": f"number {i}", "style": f"s{i}"} for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert FolderDataset(str(folder), size=8)[4]["caption"] == "number 4"
    assert FolderDataset(str(folder), size=8, caption_column="style")[4]["caption"] == "s4"
    (folder / "metadata.jsonl").write_text(json.dumps(lines[0]) + "\nno json\n")
    with pytest.raises(ConfigError, match="line 2"):
        FolderDataset(str(folder), size=8)
    (folder / "metadata.jsonl").write_text('{"file_name": "elsewhere.png", "text": "x"}\n')
    with pytest.raises(ConfigError, match=r"elsewhere\.png"):
        FolderDataset(str(folder), size=8)


def test_class_folders(tmp_path: Path, picture) -> None:
    for name in ("red_apple", "bird"):
        for i in range(2):
            picture(tmp_path / "classes" / name / f"{i}.jpg", 10 * i)
    data = FolderDataset(str(tmp_path / "classes"), size=8, caption_template="a photo of a {}")
    assert [(data[i]["class_label"], data[i]["caption"]) for i in (0, 3)] == [(0, "a photo of a bird"), (1, "a photo of a red apple")]
    assert data[3]["human_label"] == "red_apple"
    with pytest.raises(ConfigError, match="caption_template"):
        FolderDataset(str(tmp_path / "classes"), size=8, caption_template="a photo")


def test_gaps_are_errors_unless_chosen_otherwise(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "2.txt").unlink()
    with pytest.raises(ConfigError, match=r"1 of 6 pictures.*2\.png.*missing_captions"):
        FolderDataset(str(folder), size=8)
    assert len(FolderDataset(str(folder), size=8, missing_captions="skip")) == 5
    assert FolderDataset(str(folder), size=8, missing_captions="empty")[2]["caption"] == ""
    assert "2.png" in caplog.text


def test_what_is_wrong_with_a_folder_is_told(tmp_path: Path, picture) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        FolderDataset("nowhere", size=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no picture"):
        FolderDataset(str(tmp_path / "empty"), size=8)
    picture(tmp_path / "silent" / "a.png")
    with pytest.raises(ConfigError, match="no captions in"):
        FolderDataset(str(tmp_path / "silent"), size=8)
    (tmp_path / "silent" / "b.png").write_bytes(b"PNG?")
    with pytest.raises(UserError, match=r"b\.png"):
        FolderDataset(str(tmp_path / "silent"), size=8, captions="none")[1]
    for wrong in (
        {"captions": "sung"},
        {"crop": "round"},
        {"flip": 2},
        {"size": 0},
        {"size": 8, "buckets": 8},
        {"interpolation": "x"},
        {"moon": 1},
    ):
        with pytest.raises(ConfigError):
            FolderDataset(str(tmp_path / "silent"), **{"captions": "none", **wrong})


def test_framing_mirrors_the_crop_with_the_picture() -> None:
    pixels = np.zeros((4, 12, 3), np.uint8)
    pixels[:, :, 0] = np.arange(12) * 20
    image = Image.fromarray(pixels)
    np.random.seed(0)
    for _ in range(20):
        framed = Framing("random", flip=0.5)(image, (4, 4))
        row = np.rint((framed["image"][0, :, 0] + 1) * 127.5).astype(int) // 20
        mirrored = row[0] > row[-1]
        left = framed["crop_coords_top_left"][1]
        assert list(row) == [11 - left - k if mirrored else left + k for k in range(4)]
    assert Framing("squeeze")(image, (4, 6))["image"].shape == (4, 6, 3)
    assert Framing()(image, None)["image"].shape == (4, 12, 3)


def test_folder_buckets(folder: Path) -> None:
    data = FolderDataset(str(folder), buckets={"side": 16, "step": 4, "shortest": 8, "longest": 32}, crop="random")
    assert data.bucket_of is not None
    assert len(set(data.bucket_of)) == 2
    for batch in ResumableLoader(data, 2, seed=1):
        height, width = batch["image"].shape[1:3]
        assert {int(c[-1]) % 2 for c in batch["caption"]} == {int(height > width)}
        assert height * width <= 16 * 16


# ---------------------------------------------------------------------- Hugging Face
def test_a_hugging_face_data_set_on_disk(tmp_path: Path, folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = [str(folder / f"{i}.png") for i in range(6)]
    table = datasets.Dataset.from_dict({"image": paths, "text": [f"row {i}" for i in range(6)], "label": list(range(6))})
    table.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "hf"))
    data = HuggingFaceDataset(str(tmp_path / "hf"), size=16, label_column="label")
    assert len(data) == 6
    assert (data[2]["caption"], data[2]["class_label"], shade_of(data[2]["image"])) == ("row 2", 2, 80)
    both = datasets.DatasetDict({"train": table.cast_column("image", datasets.Image())})
    both.save_to_disk(str(tmp_path / "split"))
    assert HuggingFaceDataset(str(tmp_path / "hf"), size=8).content() == data.content()
    Image.new("RGB", (32, 20), (250, 0, 0)).save(paths[2])
    datasets.DatasetDict({"train": table.cast_column("image", datasets.Image())}).save_to_disk(str(tmp_path / "changed"))
    assert HuggingFaceDataset(str(tmp_path / "changed"), size=16).content() != data.content()
    bucketed = HuggingFaceDataset(str(tmp_path / "split"), buckets=[[16, 24], [24, 16]])
    assert {bucketed[i]["image"].shape for i in range(6)} == {(16, 24, 3), (24, 16, 3)}
    for wrong, match in (({"split": "holdout"}, "train"), ({"caption_column": "words"}, "words"), ({"image_column": "photo"}, "photo")):
        with pytest.raises(ConfigError, match=match):
            HuggingFaceDataset(str(tmp_path / "split"), size=8, **wrong)
    with pytest.raises(ConfigError, match="save_to_disk"):
        HuggingFaceDataset(str(folder), size=8)


# ---------------------------------------------------------------------- shards
def test_shards_hold_the_folder(folder: Path, tmp_path: Path) -> None:
    data = FolderDataset(str(folder), size=16)
    counts = write_shards(data, tmp_path / "out", per_shard=4)
    assert counts == {"00000.tar": 4, "00001.tar": 2}
    stream = ShardDataset(str(tmp_path / "out"), size=16, shuffle=0, where={"original_width": {"min": 1}})
    seen = {c: shade_of(x) for batch in StreamLoader(stream, 2) for c, x in zip(batch["caption"], batch["image"], strict=True)}
    assert seen == {data[i]["caption"]: shade_of(data[i]["image"]) for i in range(6)}
    assert list(seen) != sorted(seen)  # shuffled
    with pytest.raises(UserError, match="not empty"):
        write_shards(data, tmp_path / "out")
    again = write_shards(data, tmp_path / "again", per_shard=4)
    assert again == counts
    assert (tmp_path / "again" / "00000.tar").read_bytes() == (tmp_path / "out" / "00000.tar").read_bytes()
    write_shards(data, tmp_path / "small", side=10, seed=None)
    item = next(iter(ShardDataset(str(tmp_path / "small"), size=8, image_file="jpg", shuffle=0)))
    assert item["original_size_as_tuple"].tolist() == [10, 16]
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"3\.png"):
        write_shards(data, tmp_path / "bad")
    assert not list((tmp_path / "bad").glob(".*.tmp"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """script(name, *flags) -> (exit code, standard output, standard error), in this process."""

    def run(name: str, *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        code = runpy.run_path(str(SCRIPTS / name))["main"]()
        return code, *capsys.readouterr()

    return run


def test_the_shards_script(folder: Path, tmp_path: Path, script) -> None:
    code, out, _ = script("make_shards.py", folder, tmp_path / "out", "--per_shard", "5")
    assert code == 0
    assert out.strip().endswith("6 samples in 2 shards")
    (tmp_path / "out" / "shards.json").unlink()
    assert script("make_shards.py", tmp_path / "out", "--index")[1].strip().endswith("6 samples in 2 shards")
    code, _, said = script("make_shards.py", tmp_path / "nowhere", tmp_path / "x")
    assert code == 2
    assert said.startswith("error: ") and "nowhere" in said


# ---------------------------------------------------------------------- caches
class Half(nn.Module):
    """A first stage: mean over 2x2 pixels, times its one weight."""

    def __init__(self, ckpt_path: str | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        if ckpt_path:
            self.scale.data.fill_(float(Path(ckpt_path).read_text()))

    def encode(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.avg_pool2d(x, 2)


class Lengths(nn.Module):
    """A text encoder: (1, 2) numbers a text, its length and the weight."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.weight = float(Path(weights).read_text())

    def encode(self, texts: list[str]) -> Tensor:
        with open("encoded.log", "a") as log:
            log.write("".join(f"{text}\n" for text in texts))
        return torch.tensor([[[float(len(text)), self.weight]] for text in texts])


@pytest.fixture
def cache(tmp_path: Path, folder: Path):
    trust("tests")
    (tmp_path / "vae").write_text("2.0")
    (tmp_path / "text").write_text("7.0")

    def make(text: bool = True, root: Path = folder, **params: object) -> CachedLatents:
        dataset = {"target": "ldm.data.folder.FolderDataset", "params": {"root": str(root), "size": 16, **params}}
        first = {"target": "tests.data_.test_general.Half", "params": {"ckpt_path": str(tmp_path / "vae")}}
        encoder = {"target": "tests.data_.test_general.Lengths", "params": {"weights": str(tmp_path / "text")}} if text else None
        return CachedLatents(dataset, first, str(tmp_path / "cache"), 2, workers=0, device="cpu", text_encoder=encoder)

    return make


def test_latents_embeddings_and_sizes_come_from_the_cache(cache, folder: Path) -> None:
    data = cache()
    item = data[3]
    assert item["z"].shape == (3, 8, 8)
    assert float(item["z"][0].mean()) == pytest.approx(2 * (120 / 127.5 - 1), abs=2e-3)
    assert item["caption"] == "shade 3"
    assert item["c"].tolist() == [[7.0, 7.0]]
    assert item["original_size_as_tuple"].tolist() == [32, 20]
    for path in folder.glob("*.png"):
        path.with_suffix(".bak").write_bytes(b"")
    before = Path("encoded.log").read_text()
    batch = next(iter(ResumableLoader(cache(), 4, shuffle=False)))
    assert Path("encoded.log").read_text() == before
    assert batch["z"].shape == (4, 3, 8, 8)
    assert batch["c"].shape == (4, 1, 2)
    assert batch["crop_coords_top_left"].shape == (4, 2)


def test_the_cache_belongs_to_content_sizes_and_weights(cache, folder: Path, tmp_path: Path) -> None:
    first = cache()
    assert cache().path == first.path
    moved = folder.rename(tmp_path / "moved")
    assert cache(root=moved).path == first.path  # the same pictures elsewhere
    assert cache(root=moved, size=8).path != first.path
    assert cache(root=moved, size=8)[0]["z"].shape == (3, 4, 4)
    Image.new("RGB", (32, 20), (250, 0, 0)).save(moved / "2.png")  # neither the first nor the last
    changed = cache(root=moved)
    assert changed.path != first.path
    assert float(changed[2]["z"][0].mean()) == pytest.approx(2 * (250 / 127.5 - 1), abs=2e-3)
    (tmp_path / "vae").write_text("3.0")
    assert cache(root=moved).path not in (first.path, changed.path)
    (tmp_path / "text").write_text("8.0")
    assert cache(root=moved)[0]["c"].tolist() == [[7.0, 8.0]]


def test_captions_of_a_cache_are_those_of_now(cache, folder: Path) -> None:
    """Latents stay where captions are written anew; embeddings follow."""
    first = cache()
    (folder / "3.txt").write_text("a longer caption")
    again = cache()
    assert again.path == first.path
    assert again[3]["caption"] == "a longer caption" and again[3]["c"].tolist() == [[16.0, 7.0]]


def test_a_cache_of_wrapped_items_sees_every_picture_and_caption(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "vae").write_text("2.0")
    trust("tests")
    inner = {"target": "ldm.data.folder.FolderDataset", "params": {"root": str(folder), "size": 16}}
    shades = {"target": "ldm.data.wrappers.AddLabelFromCaption", "params": {"names": [f"shade {i}" for i in range(10)]}}
    wrapped = {"target": "ldm.data.wrappers.WrappedItems", "params": {"dataset": inner, "additions": [shades]}}
    first = {"target": "tests.data_.test_general.Half", "params": {"ckpt_path": str(tmp_path / "vae")}}

    def make() -> CachedLatents:
        return CachedLatents(wrapped, first, str(tmp_path / "cache"), workers=0, device="cpu")

    paths = [make().path]
    (folder / "3.txt").write_text("shade 7")
    assert make()[3]["class_label"] == 7
    paths.append(make().path)
    Image.new("RGB", (32, 20), (250, 0, 0)).save(folder / "2.png")
    paths.append(make().path)
    assert len(set(paths)) == 3


def test_a_cache_of_buckets(cache) -> None:
    data = cache(size=None, buckets=[[16, 24], [24, 16]])
    assert {tuple(data[i]["z"].shape) for i in range(6)} == {(3, 8, 12), (3, 12, 8)}
    assert [shade_of(data[i]["z"].movedim(0, -1) / 2) for i in range(6)] == [40 * i for i in range(6)]
    shapes = [tuple(batch["z"].shape[2:]) for batch in ResumableLoader(data, 3, seed=2)]
    assert sorted(shapes) == [(8, 12), (12, 8)]


def test_random_crops_of_a_cache_do_not_depend_on_when_it_was_filled(cache, tmp_path: Path) -> None:
    one = [cache(crop="random", flip=0.5)[i]["crop_coords_top_left"].tolist() for i in range(6)]
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    np.random.seed(99)
    assert [cache(crop="random", flip=0.5)[i]["crop_coords_top_left"].tolist() for i in range(6)] == one


def test_an_unreadable_picture_ends_the_cache_in_one_line(cache, folder: Path, tmp_path: Path) -> None:
    (folder / "3.png").write_bytes(b"PNG?")
    dataset = {"target": "ldm.data.folder.FolderDataset", "params": {"root": str(folder), "size": 16}}
    first = {"target": "tests.data_.test_general.Half", "params": {"ckpt_path": str(tmp_path / "vae")}}
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^image '[^\n]*3\.png' is not a picture[^\n]*$"):
            CachedLatents(dataset, first, str(tmp_path / "cache"), workers=workers, device="cpu")


def test_what_cannot_be_cached_is_told(cache, tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="no caption"):
        cache(captions="none")
    shapes = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 2, "image_size": 32}}
    first = {"target": "tests.data_.test_general.Half", "params": {"ckpt_path": str(tmp_path / "vae")}}
    encoder = {"target": "tests.data_.test_general.Lengths", "params": {"weights": str(tmp_path / "text")}}
    with pytest.raises(ConfigError, match="every epoch"):
        CachedLatents(shapes, first, str(tmp_path / "cache"), workers=0, device="cpu", text_encoder=encoder)
    with pytest.raises(ConfigError, match="ckpt_path is missing"):
        CachedLatents(shapes, {**first, "params": {}}, str(tmp_path / "cache"), workers=0, device="cpu")


def test_both_networks_out_of_a_whole_models_weights(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trust("tests")
    save_file({"first_stage_model.scale": torch.tensor([4.0]), "model.x": torch.zeros(1)}, tmp_path / "whole.safetensors")
    dataset = {"target": "ldm.data.folder.FolderDataset", "params": {"root": str(folder), "size": 16}}
    first = {"target": "tests.data_.test_general.Half", "params": {}}
    data = CachedLatents(dataset, first, str(tmp_path / "cache"), workers=0, device="cpu", ckpt=str(tmp_path / "whole.safetensors"))
    assert float(data[3]["z"][0].mean()) == pytest.approx(4 * (120 / 127.5 - 1), abs=4e-3)


def test_the_cache_script_writes_the_config_to_train_with(folder: Path, tmp_path: Path, script) -> None:
    (tmp_path / "vae").write_text("2.0")
    config = {
        "model": {"target": "x.Y", "params": {
            "first_stage_key": "image", "cond_stage_key": "caption", "cond_stage_trainable": False,
            "first_stage_config": {"target": "tests.data_.test_general.Half", "params": {"ckpt_path": str(tmp_path / "vae")}},
        }},
        "data": {"target": "main.DataModuleFromConfig", "params": {
            "batch_size": 2, "train": {"target": "ldm.data.folder.FolderDataset", "params": {"root": str(folder), "size": 16}},
        }},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    flags = ["--base", tmp_path / "c.yaml", "--out", tmp_path / "cache", "--trust", "tests", "--workers", "0"]
    code, out, _ = script("cache_latents.py", *flags, "--write", tmp_path / "new.yaml", "--device", "cpu")
    assert code == 0
    assert "train: 6 latents" in out
    train = yaml.safe_load((tmp_path / "new.yaml").read_text())["data"]["params"]["train"]
    trust("tests")
    data = CachedLatents(**train["params"])
    assert data[0]["z"].shape == (3, 8, 8)
    assert script("cache_latents.py", *flags, "--splits", "test")[0] == 2
    for words, message in ((["--text"], "no text encoder"), (["model.params.first_stage_config=null"], "no first stage")):
        code, _, error = script("cache_latents.py", *flags, *words)
        assert code == 2 and message in error


def test_missing_extras_are_told(monkeypatch: pytest.MonkeyPatch, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with caplog.at_level(logging.INFO):
        for make in (lambda: ShardDataset(str(folder), size=8), lambda: HuggingFaceDataset(str(folder), size=8, caption_column="")):
            with pytest.raises(ConfigError, match=r"\[data\]"):
                make()
