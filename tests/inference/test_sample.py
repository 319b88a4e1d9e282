"""sample_diffusion around its model: the .npz of a run that several processes or calls draw, label maps, sizes of batches."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.inference import record
from ldm.inference.facts import REPO
from ldm.inference.npz import write_npz
from ldm.inference.options import Options
from ldm.inference.output import metadata_texts, read_metadata
from ldm.inference.prompts import Batch, plan
from ldm.inference.session import Picture
from ldm.inference.tasks import sample
from ldm.util import UserError
from tests.training.spread import torchrun_variables


class Painter:
    """Stands for a session: each picture has the colour of its seed; an interruption comes before the batch that `stop_at` names."""

    stop_at = -1

    def __init__(self, options: Options, progress: bool = False) -> None:
        self.options, self.weights = options, record.weights_hashes(options)

    def batches(self) -> Iterator[Batch]:
        return plan(self.options.prompts, "", self.options.seed, self.options.n_iter, self.options.batch)

    def pictures(self, batch: Batch) -> list[Picture]:
        if batch.start == Painter.stop_at:
            raise KeyboardInterrupt
        return [self.picture(batch, i) for i in range(len(batch))]

    def picture(self, batch: Batch, index: int) -> Picture:
        facts = {"weights": self.weights, "inputs": {}, "device": "cpu", "threads": 1, "rng_state": None}
        texts = metadata_texts(record.describe(self.options, batch, index, **facts))
        return Picture(np.full((64, 64, 3), batch.seeds[index], np.uint8), index, texts=texts)


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """draw(*flags, rank, world): six pictures, of seeds 5 to 10, in batches of two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldm.inference.session.Session", Painter)
    Path("model").mkdir()
    shutil.copy(REPO / "models/ldm/celeba256/config.yaml", "model/config.yaml")
    Path("model/model.safetensors").write_bytes(b"weights")
    run = ["--ckpt", "model/model.safetensors", "--safety", "off", "--watermark", "none", "--H", "64", "--W", "64", "--outdir", "out"]

    def call(*flags: str, rank: int = 0, world: int = 1, stop_at: int = -1) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(Painter, "stop_at", stop_at)
            for name, value in torchrun_variables(rank, world, 1).items() if world > 1 else ():
                patch.setenv(name, value)
            return sample.main([*run, "-n", "6", "--batch_size", "2", "--seed", "5", *flags])

    return call


def packed() -> dict[str, list[int]]:
    """Of every .npz the colours of its pictures."""
    return {path.name: np.load(path)["arr_0"][:, 0, 0, 0].tolist() for path in Path("out").glob("*.npz")}


WHOLE = {"6x64x64x3-samples.npz": [5, 6, 7, 8, 9, 10]}


def test_several_processes_pack_one_file_of_all(draw, capsys: pytest.CaptureFixture[str]):
    assert draw(rank=1, world=2) == 0
    assert "npz: not yet, 4 of 6 pictures are still to be drawn; the process that draws the last" in capsys.readouterr().out
    assert packed() == {}
    assert draw(rank=0, world=2) == 0
    assert packed() == WHOLE
    assert "npz: out/6x64x64x3-samples.npz\n" in capsys.readouterr().out


def test_a_run_that_goes_on_packs_all_of_it_and_not_twice(draw):
    assert draw(stop_at=4) == 130
    assert packed() == {}
    assert draw("--continue") == 0
    assert packed() == WHOLE
    times = [path.stat().st_mtime_ns for path in Path("out").glob("*.npz")]
    assert draw("--continue") == 0
    assert packed() == WHOLE and times == [path.stat().st_mtime_ns for path in Path("out").glob("*.npz")]


def test_a_finished_run_is_packed_by_continue_and_by_one_process(draw, capsys: pytest.CaptureFixture[str]):
    assert draw("--skip_npz") == 0
    capsys.readouterr()
    assert draw("--continue", rank=1, world=2) == 0
    assert packed() == {} and "npz: left to the other processes" in capsys.readouterr().out
    assert draw("--continue", rank=0, world=2) == 0
    assert packed() == WHOLE


def test_the_file_of_another_run_is_neither_taken_for_this_one_nor_replaced(draw):
    assert draw("--seed", "20") == 0
    shutil.rmtree("out/samples")
    for rank in range(2):
        assert draw(rank=rank, world=2) == 0
    assert packed() == {"6x64x64x3-samples.npz": [20, 21, 22, 23, 24, 25], "6x64x64x3-samples-1.npz": [5, 6, 7, 8, 9, 10]}


def test_pictures_of_two_models_are_not_packed(draw, capsys: pytest.CaptureFixture[str]):
    assert draw(rank=1, world=2) == 0
    Path("model/model.safetensors").write_bytes(b"trained on")
    assert draw(rank=0, world=2) == 2
    assert (
        packed() == {} and "00002.png' is a picture of another run (model 'model/model.safetensors' had sha256" in capsys.readouterr().err
    )


def test_two_that_finish_at_once_leave_one_file(tmp_path: Path):
    for i in range(2):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    pictures = [tmp_path / "0.png", tmp_path / "1.png"]
    assert write_npz(tmp_path, pictures, once=True) == write_npz(tmp_path, pictures, once=True) == tmp_path / "2x4x4x3-samples.npz"
    assert write_npz(tmp_path, pictures) == tmp_path / "2x4x4x3-samples-1.npz"
    assert write_npz(tmp_path, pictures[::-1], once=True) == tmp_path / "2x4x4x3-samples-2.npz"
    assert len(list(tmp_path.iterdir())) == 5


# ---------------------------------------------------------------------- checks
def test_a_batch_is_no_larger_than_its_record_may_be(draw, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(record, "MOST_PICTURES", 20)
    assert draw("-n", "21", "--batch_size", "21") == 2
    assert capsys.readouterr().err == "error: --batch_size 21: a picture records its whole batch, of at most 20 pictures; give no more\n"
    assert not Path("out").exists()
    assert draw("-n", "20", "--batch_size", "21") == 0
    assert record.recorded_batch(read_metadata("out/samples/00019.png"), "")[1] == 19


def test_label_maps_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = str(tmp_path / "labels.tif")
    Image.fromarray(np.array([[0, 1], [2, -3]], np.int32)).save(path)
    with pytest.raises(UserError, match="has the value -3: its values are classes, numbered from 0 on"):
        sample.read_labels(path, 2, 2)
    Image.fromarray(np.array([[0, 1], [2, 3]], np.int32)).save(path)
    assert sample.read_labels(path, 2, 2).tolist() == [[0, 1], [2, 3]]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(UserError, match="is too large: at most 2 pixels"):
        sample.read_labels(path, 2, 2)
