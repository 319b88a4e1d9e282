"""A handful of pictures of one thing, with captions that name it, and beside what a model draws itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.latents import CachedLatents
from ldm.data.personalized import TEMPLATES, DrawnPictures, PersonalizedPictures, ShapesOfOne, WithPrior
from ldm.data.shapes import ShapesDataset, parse
from ldm.metrics.shapes import judge
from ldm.util import ConfigError
from tests.inference.tiny import write_model

SHAPES = {"target": "ldm.data.personalized.ShapesOfOne", "params": {"color": "purple", "shape": "heart", "image_size": 64, "pictures": 3}}


# ------------------------------------------------------------------------------------------------------------------ folder
@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        Image.new("RGB", (40, 30), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_pictures_of_a_folder_again_and_again_with_templates(folder):
    data = PersonalizedPictures(str(folder), "<mine>", repeats=20, size=16)
    assert len(data) == 60
    captions = [data[i]["caption"] for i in range(60)]
    assert all("<mine>" in text for text in captions) and {t.format("<mine>") for t in TEMPLATES["object"]} == set(captions)
    assert data[4]["image"].shape == (16, 16, 3) and np.array_equal(data[4]["image"], data[1]["image"])
    data.set_epoch(1)
    later = [data[i]["caption"] for i in range(60)]
    assert later != captions and later == [data.caption_for(i, 1) for i in range(60)]
    own = PersonalizedPictures(str(folder), "a sks dog", templates=["{} on grass"], repeats=1, size=16)
    assert [own[i]["caption"] for i in range(3)] == ["a sks dog on grass"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": "thing"}, "templates 'thing' is unknown: use object or style"),
        ({"templates": ["no place"]}, "template 'no place' must have the word's place once"),
        ({"repeats": 0}, "repeats is 0"),
        ({"word": " "}, "word ' '"),
        ({"side": 3}, "does not take side"),
    ],
)
def test_wrong_options_of_a_folder(folder, options, message):
    with pytest.raises(ConfigError, match=message):
        PersonalizedPictures(**{"root": str(folder), "word": "x", **options})


# ------------------------------------------------------------------------------------------------------------------ shapes
def test_shapes_show_and_say_the_combination():
    data = ShapesOfOne("purple", "heart", pictures=6, repeats=2, kinds=["single", "relation", "count"])
    assert len(data) == 12
    for i in range(12):
        item = data[i]
        spec = parse(item["caption"])
        assert ("heart", "purple") in {(part.shape, part.color) for part in spec.parts}
        assert judge(item["image"], spec).correct, item["caption"]
        assert np.array_equal(item["image"], data[i % 6]["image"])
    assert len({data[i]["image"].tobytes() for i in range(6)}) == 6
    worded = ShapesOfOne("purple", "heart", word="<mine>", pictures=6, kinds=["single", "relation", "count"])
    texts = [worded[i]["caption"] for i in range(6)]
    assert all("<mine>" in text and "purple heart" not in text for text in texts)
    assert [text.replace("<mine>", "purple heart") for text in texts] == [data.caption_for(i, 0) for i in range(6)]
    worded.set_epoch(3)
    assert [worded[i]["caption"] for i in range(6)] == [worded.caption_for(i, 3) for i in range(6)] != texts
    with pytest.raises(IndexError):
        data[12]


def test_wrong_options_of_shapes_are_told_at_once():
    with pytest.raises(ConfigError, match=r"color 'gold' .*; shape 'moon' .*pictures 0 .*; image_size 8 .*; kinds 'single'"):
        ShapesOfOne("gold", "moon", pictures=0, image_size=8, kinds="single")


def test_latents_of_shapes_are_cached_with_captions_of_their_epoch(tmp_path):
    first_stage = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {"ckpt_path": str(tmp_path / "ae.safetensors"), "embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"}},
    }
    ddconfig = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1]}
    first_stage["params"]["ddconfig"] = {**ddconfig, "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    from ldm.inference.checkpoint import save_weights
    from ldm.models.autoencoder import AutoencoderKL

    save_weights(AutoencoderKL(**{k: v for k, v in first_stage["params"].items() if k != "ckpt_path"}), tmp_path / "ae.safetensors")
    data = CachedLatents({**SHAPES, "params": {**SHAPES["params"], "repeats": 1}}, first_stage, str(tmp_path / "cache"), workers=0)
    data.set_epoch(2)
    assert data[1]["z"].shape == (4, 32, 32) and data[1]["caption"] == ShapesOfOne(**SHAPES["params"]).caption_for(1, 2)


# ------------------------------------------------------------------------------------------------------------------- prior
def test_drawn_pictures_are_kept_gone_on_with_and_drawn_anew_for_another_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = str(write_model(tmp_path / "model"))
    options = {"ckpt": ckpt, "steps": 2, "scale": 1.0, "cache_dir": "drawn", "batch_size": 2}
    state = torch.get_rng_state()
    data = DrawnPictures(["a red heart", "two rings"], pictures=3, **options)
    assert torch.equal(state, torch.get_rng_state()), "the training after it must not depend on whether they were there"
    assert [data.caption(i) for i in range(3)] == ["a red heart", "two rings", "a red heart"]
    item = data[1]
    assert item["image"].shape == (64, 64, 3) and item["image"].dtype == np.float32 and item["caption"] == "two rings"
    lines = [json.loads(line) for line in (data.folder / "metadata.jsonl").read_text().splitlines()]
    assert lines[1] == {"file_name": "00001.png", "text": "two rings"}

    first = [data[i]["image"] for i in range(3)]
    data.path(1).unlink()
    kept = data.path(0).stat().st_mtime_ns
    again = DrawnPictures(["a red heart", "two rings"], pictures=3, **options)
    assert again.folder == data.folder and again.path(0).stat().st_mtime_ns == kept
    assert all(np.array_equal(again[i]["image"], first[i]) for i in range(3)), "picture k does not depend on its batch"

    other = str(write_model(tmp_path / "other", seed=1))
    assert DrawnPictures("a red heart", pictures=1, **{**options, "ckpt": other}).folder != data.folder
    with pytest.raises(ConfigError, match="0 prompts and 3 pictures"):
        DrawnPictures([], pictures=3, **options)


def test_a_cache_of_drawn_pictures_sees_each_of_them_and_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"pictures": 3, "ckpt": str(write_model(tmp_path / "model")), "steps": 1, "scale": 1.0, "cache_dir": "drawn"}
    data = DrawnPictures(["a red heart", "two rings"], **options)
    assert data.facts(1) == {"caption": "two rings"}
    content = data.content(tmp_path / "memo.json")
    assert DrawnPictures(["a red heart", "two rings"], **options).content(tmp_path / "memo.json") == content
    assert DrawnPictures(["a red heart", "two moons"], **options).content() != content
    Image.new("RGB", (64, 64)).save(data.path(1))  # neither the first nor the last
    assert data.content(tmp_path / "memo.json") != content


def test_what_is_drawn_can_be_the_captions_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"pictures": 2, "ckpt": str(write_model(tmp_path / "model")), "steps": 1, "scale": 1.0, "cache_dir": "drawn"}
    world = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 3, "image_size": 64, "seed": 4}}
    data = DrawnPictures(world, **options)
    asked = ShapesDataset(**world["params"])
    assert [data.caption(i) for i in range(2)] == [asked.caption_for(i, 0) for i in range(2)] == [data[i]["caption"] for i in range(2)]
    named = {"target": "ldm.data.personalized.PersonalizedPictures", "params": {"root": str(data.folder), "word": "it", "size": 64}}
    assert all("it" in text.split() for text in DrawnPictures(named, **options).prompts), "no caption_for is needed: facts tell it, too"
    with pytest.raises(ConfigError, match="Silent tells no captions without its pictures"):
        DrawnPictures({"target": f"{__name__}.Silent"}, **options)


class Silent(torch.utils.data.Dataset):
    """Pictures without captions."""

    def __len__(self) -> int:
        return 2


def test_every_item_comes_with_one_of_the_prior():
    data = WithPrior(SHAPES, {**SHAPES, "params": {**SHAPES["params"], "pictures": 2, "repeats": 1, "color": "red"}})
    assert len(data) == 150
    data.set_epoch(1)
    item, other = data[5], ShapesOfOne("red", "heart", pictures=2, repeats=1, image_size=64)
    assert item["caption"] == ShapesOfOne(**SHAPES["params"]).caption_for(5, 1)
    assert item["prior"]["caption"] == other.caption_for(1, 1) and np.array_equal(item["prior"]["image"], other[1]["image"])
    batch = torch.utils.data.default_collate([data[0], data[1]])
    assert batch["prior"]["image"].shape == (2, 64, 64, 3) and len(batch["prior"]["caption"]) == 2
