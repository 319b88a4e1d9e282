"""FID and CLIP score: the network against torchvision's, the maths against closed forms, pictures and captions from everywhere."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from ldm.inference.safety import load_clip
from ldm.metrics import scoring
from ldm.metrics.fid import Statistics, frechet_distance, read_statistics
from ldm.metrics.inception import FIDInception, load_inception, prepare
from ldm.util import CheckpointError, UserError
from tests.inference.tiny import write_safety

ROOT = Path(__file__).resolve().parents[2]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


# ------------------------------------------------------------------------------------------------------------- the network
@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the form of the published file, such that a picture's differences reach the features."""
    torch.manual_seed(0)
    network = FIDInception()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


class _MaxPooledE(nn.Module):
    """torchvision's last block, pooled as TensorFlow's graph pools it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torchvision.models import inception as theirs

        usual = theirs.F.avg_pool2d
        theirs.F.avg_pool2d = lambda x, **options: nn.functional.max_pool2d(x, 3, 1, 1)
        try:
            return self.block(x)
        finally:
            theirs.F.avg_pool2d = usual


@torch.no_grad()
def test_it_is_torchvisions_network_but_for_the_pooling(inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import inception as theirs

    network = load_inception(inception)
    peer = theirs.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
    peer.load_state_dict(network.state_dict())  # the names are torchvision's, all of them
    x = torch.cat([prepare(noise(80, 60, 3, seed=i)) for i in range(2)])
    peer.fc = nn.Identity()
    usual = network(x)
    assert (peer(x) - usual).norm() > 0.01 * usual.norm()
    average = theirs.F.avg_pool2d
    monkeypatch.setattr(theirs.F, "avg_pool2d", lambda x, **options: average(x, **options, count_include_pad=False))
    peer.Mixed_7c = _MaxPooledE(peer.Mixed_7c)
    torch.testing.assert_close(usual, peer(x), rtol=1e-4, atol=1e-4)
    assert usual.shape == (2, 2048) and (usual[0] - usual[1]).norm() > 0.01 * usual.norm()


def test_weights_that_are_not_fids_are_refused(inception: Path, tmp_path: Path) -> None:
    weights = torch.load(inception, weights_only=True)
    older = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "older.pth")
    load_inception(tmp_path / "older.pth")
    torch.save({**weights, "AuxLogits.fc.weight": torch.zeros(2)}, tmp_path / "more.pth")
    with pytest.raises(CheckpointError, match=r"AuxLogits.fc.weight.*torchvision's network is not"):
        load_inception(tmp_path / "more.pth")
    torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"fc\.weight is missing"):
        load_inception(tmp_path / "other.pth")


def test_the_two_ways_to_resize() -> None:
    image = noise(7, 5, 3)
    ours, other = prepare(image), prepare(image, "pytorch")
    for i, j in ((0, 0), (298, 298), (100, 37), (250, 200)):
        y, x = i * 7 / 299, j * 5 / 299
        y0, x0 = int(y), int(x)
        y1, x1, dy, dx = min(y0 + 1, 6), min(x0 + 1, 4), y - y0, x - x0
        p = image.astype(float)
        value = (1 - dy) * ((1 - dx) * p[y0, x0] + dx * p[y0, x1]) + dy * ((1 - dx) * p[y1, x0] + dx * p[y1, x1])
        np.testing.assert_allclose(ours[0, :, i, j].numpy(), (value - 128) / 128, atol=1e-4)
    pixels = nn.functional.interpolate(torch.tensor(image).permute(2, 0, 1)[None] / 255, (299, 299), mode="bilinear")
    torch.testing.assert_close(other, 2 * pixels - 1)
    assert (ours - other).abs().max() > 0.1
    with pytest.raises(UserError, match="resize 'cubic' is unknown: use tensorflow or pytorch"):
        prepare(image, "cubic")


# --------------------------------------------------------------------------------------------------------------- the maths
def test_statistics_do_not_depend_on_the_batches() -> None:
    x = np.random.default_rng(0).normal(1000.0, 1.0, (101, 5))  # a mean that costs a naive sum of squares its digits
    whole, parts = Statistics(5), Statistics(5)
    whole.add(x)
    for part in (x[:1], x[1:1], x[1:60], x[60:]):
        parts.add(part)
    assert parts.n == whole.n == 101
    np.testing.assert_allclose(parts.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(parts.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="NaN"):
        whole.add(np.full((1, 5), np.nan))
    with pytest.raises(UserError, match="two pictures or more; there are 0"):
        _ = Statistics(5).covariance


def test_the_distance_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = (m @ m.T for m in rng.normal(size=(2, 6, 6)))
    m, n = rng.normal(size=(2, 6))
    cross = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    expected = ((m - n) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    assert frechet_distance(m, a, n, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(n, b, m, a) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(m, a, m, a) == pytest.approx(0.0, abs=1e-9)
    spread, other = np.diag([1.0, 4.0, 0.0]), np.diag([9.0, 1.0, 0.0])  # commuting and singular: (1-3)^2 + (2-1)^2
    assert frechet_distance(np.zeros(3), spread, np.array([0.0, 2.0, 0.0]), other) == pytest.approx(4.0 + 1.0 + 4.0, rel=1e-12)
    with pytest.raises(UserError, match="6 and of 3 dimensions"):
        frechet_distance(m, a, np.zeros(3), spread)


def test_fewer_pictures_than_dimensions_give_a_number() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 10, 64))
    one, two = Statistics(64), Statistics(64)
    one.add(x)
    two.add(y + 1.0)
    product = np.linalg.eigvals(one.covariance @ two.covariance)
    cross = np.sqrt(product.real.clip(0.0)).sum()
    expected = ((x.mean(0) - y.mean(0) - 1) ** 2).sum() + np.trace(one.covariance) + np.trace(two.covariance) - 2 * cross
    found = frechet_distance(one.mean, one.covariance, two.mean, two.covariance)
    assert found == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(one.mean, one.covariance, one.mean, one.covariance) == pytest.approx(0.0, abs=1e-5)


def test_statistics_on_disk(tmp_path: Path) -> None:
    found = Statistics(3)
    found.add(np.random.default_rng(0).normal(size=(9, 3)))
    found.save(tmp_path / "a.npz")
    mean, covariance, n = read_statistics(tmp_path / "a.npz")
    assert n == 9 and (mean == found.mean).all() and (covariance == found.covariance).all()
    np.savez(tmp_path / "published.npz", mu=mean.astype(np.float32), sigma=covariance)
    assert read_statistics(tmp_path / "published.npz")[2] is None
    np.savez(tmp_path / "wrong.npz", mu=mean, sigma=covariance[:2])
    (tmp_path / "text.npz").write_text("no archive")
    for name, told in (("wrong.npz", "sigma"), ("text.npz", "holds no statistics"), ("none.npz", "do not exist")):
        with pytest.raises(UserError, match=told):
            read_statistics(tmp_path / name)
    with pytest.raises(UserError, match="exists already"):
        found.save(tmp_path / "a.npz")


# ------------------------------------------------------------------------------------------------------------ the pictures
def test_pictures_of_a_folder_and_of_an_archive(tmp_path: Path) -> None:
    images = [noise(6, 9, 3, seed=i) for i in range(3)]
    for name, image in zip(("b.png", "a.png", "sub/c.png"), images, strict=True):
        save(tmp_path / "f" / name, image)
    save(tmp_path / "f" / "grid-0000.png", noise(20, 20, 3))
    frames = [Image.fromarray(image) for image in images]
    frames[0].save(tmp_path / "f" / "a.gif", save_all=True, append_images=frames[1:])
    found = list(scoring.pictures(tmp_path / "f"))
    assert [image.tolist() for image in found] == [images[1].tolist(), images[0].tolist(), images[2].tolist()]
    for pack in (np.savez, np.savez_compressed):
        pack(tmp_path / "s.npz", np.stack(images))
        assert np.array_equal(np.stack(list(scoring.pictures(tmp_path / "s.npz"))), np.stack(images))
    np.savez(tmp_path / "float.npz", np.zeros((2, 3, 3, 3)))
    np.savez(tmp_path / "named.npz", x=np.stack(images))
    (tmp_path / "empty").mkdir()
    for name, told in (
        ("float.npz", "pictures are uint8"),
        ("named.npz", "holds no pictures"),
        ("empty", "holds no picture"),
        ("x", "no folder"),
    ):
        with pytest.raises(UserError, match=told):
            list(scoring.pictures(tmp_path / name))


def test_fid_of_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a network of two features, by hand."""
    for i in range(5):
        save(tmp_path / "a" / f"{i}.png", np.full((4 + i, 4, 3), 10 * i, np.uint8))
        save(tmp_path / "b" / f"{i}.png", np.full((4, 4, 3), 10 * i + 128, np.uint8))

    def two(x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (3, 299, 299)
        return torch.stack([x.mean((1, 2, 3)), x.amax((1, 2, 3))], dim=1)

    a, b = (scoring.gather(tmp_path / name, two, prepare, batch=2) for name in "ab")
    assert a.n == 5
    assert scoring.fid(a, b) == pytest.approx(2.0, abs=1e-6)  # both features are 1 higher, and spread alike
    b.save(tmp_path / "b.npz")
    assert scoring.is_statistics(tmp_path / "b.npz") and not scoring.is_statistics(tmp_path / "b")
    assert scoring.fid(a, tmp_path / "b.npz") == pytest.approx(scoring.fid(a, b))
    assert not caplog.records
    few = scoring.gather(tmp_path / "a", lambda x: x.flatten(1)[:, :7], prepare)
    with caplog.at_level(logging.WARNING):
        scoring.fid(few, few)
    assert "5 pictures against 5: with no more than 7 of each" in caplog.text


# ----------------------------------------------------------------------------------------------------------- the CLIP score
@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safety(tmp_path_factory.mktemp("clip"), 2.0)


def test_captions_from_everywhere(tmp_path: Path) -> None:
    for name in ("1.png", "0.png"):
        save(tmp_path / name, noise(4, 4, 3))
    with pytest.raises(UserError, match=r"no captions in .*--prompts"):
        scoring.captioned(tmp_path)
    (tmp_path / "0.txt").write_text("zero")
    (tmp_path / "1.txt").write_text("one")
    assert [(item.file.name, item.caption) for item in scoring.captioned(tmp_path)] == [("0.png", "zero"), ("1.png", "one")]
    (tmp_path / "lines").write_text("a\nb\n")
    assert [item.caption for item in scoring.captioned(tmp_path, str(tmp_path / "lines"))] == ["a", "b"]
    (tmp_path / "lines").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match="3 prompts for 2 pictures"):
        scoring.captioned(tmp_path, str(tmp_path / "lines"))


def test_pictures_that_say_their_prompt(tmp_path: Path) -> None:
    from ldm.inference.output import METADATA_KEY

    texts = PngInfo()
    texts.add_text(METADATA_KEY, json.dumps({"format": 1, "prompt": "a red ring", "options": {}, "batch": {}}))
    save(tmp_path / "00000.png", noise(4, 4, 3), pnginfo=texts)
    assert [item.caption for item in scoring.captioned(tmp_path)] == ["a red ring"]
    save(tmp_path / "00001.png", noise(4, 4, 3))
    with pytest.raises(UserError, match="no captions"):
        scoring.captioned(tmp_path)


def test_the_score_is_a_hundred_cosines(clip_folder: Path, tmp_path: Path) -> None:
    clip = load_clip(clip_folder)
    words = ["a red circle", "two blue squares", "a red circle"]
    images = [noise(clip.image_size, clip.image_size, 3, seed=i) for i in range(3)]
    items = [scoring.Captioned(save(tmp_path / f"{i}.png", image), text) for i, (image, text) in enumerate(zip(images, words, strict=True))]
    found = scoring.clip_scores(clip, items, batch=2)
    pixels = torch.stack([torch.tensor(image).permute(2, 0, 1) / 127.5 - 1 for image in images])
    with torch.no_grad():
        cosines = clip(pixels, words).diagonal()
    assert found == pytest.approx((100 * cosines.clamp_min(0)).tolist(), abs=1e-3)
    assert min(found) == 0.0 or min(cosines) >= 0
    assert max(found) > 0


def test_a_checkpoint_of_open_clip(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load_clip(clip_folder)
    torch.save(clip.model.state_dict(), tmp_path / "clip.pt")
    from ldm.inference.facts import read_config

    arch = read_config(clip_folder / "clip.yaml")["model"]["params"]["arch"]
    again = scoring.load_judge(tmp_path / "clip.pt", arch)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(again(images, ["a red circle"]), clip(images, ["a red circle"]))


def test_the_middle_of_a_picture() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert scoring.square(wide, 20).min() == 255
    assert scoring.square(np.moveaxis(wide, 0, 1), 20).min() == 255
    assert scoring.square(wide, 7).shape == (7, 7, 3)
    assert np.array_equal(scoring.square(wide[:, :20], 20), wide[:, :20])


# ------------------------------------------------------------------------------------------------------------- the program
@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("score", ROOT / "scripts" / "score.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *words: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["score.py", *map(str, words)])
    return script.main()


def test_the_program(script, monkeypatch, capsys, inception: Path, clip_folder: Path, tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png", noise(32, 32, 3, seed=i))
        (tmp_path / "a" / f"{i}.txt").write_text("a red circle")
    known = ("--device", "cpu", "--json", tmp_path / "clip.json")
    assert run(script, monkeypatch, "clip", tmp_path / "a", "--ckpt", clip_folder, *known) == 0
    told = json.loads((tmp_path / "clip.json").read_text())
    assert f"CLIP score {told['clip_score']:.2f} (3 pictures" in capsys.readouterr().out
    assert [row["caption"] for row in told["scores"]] == ["a red circle"] * 3
    statistics = ("--save_statistics", tmp_path / "a.npz")
    assert run(script, monkeypatch, "fid", tmp_path / "a", "--inception", inception, "--device", "cpu", *statistics) == 0
    known = ("--inception", inception, "--device", "cpu", "--json", tmp_path / "fid.json")
    assert run(script, monkeypatch, "fid", tmp_path / "a", tmp_path / "a.npz", *known) == 0
    told = json.loads((tmp_path / "fid.json").read_text())
    assert told["fid"] == pytest.approx(0.0, abs=1e-2) and told["pictures"] == 3
    capsys.readouterr()
    for words, complaint in (
        (("fid", tmp_path / "a", "--inception", inception), "fid needs a REFERENCE"),
        (("fid", tmp_path / "a", tmp_path / "nowhere", "--inception", inception), "nowhere does not exist"),
        (("fid", tmp_path / "a", tmp_path / "a", "--inception", tmp_path / "none.pth"), "none.pth"),
        (("clip", tmp_path / "a", "--json", tmp_path / "clip.json"), "exists already"),
        (("clip", tmp_path / "a", "--batch", "0"), "--batch 0"),
    ):
        assert run(script, monkeypatch, *words) == 2
        assert complaint in capsys.readouterr().err
