"""Pictures, curves and lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.training.callbacks import ImageLogger, ProgressLog, plot_metrics, read_metrics
from ldm.training.progress import batch_items
from ldm.training.state import LastCheckpoint, StepCheckpoint


def test_when_pictures_are_due() -> None:
    logger = ImageLogger(batch_frequency=10)
    assert [i for i in range(25) if logger.check_frequency(i)] == [1, 2, 4, 8, 10, 20]
    assert [i for i in range(25) if ImageLogger(10, increase_log_steps=False).check_frequency(i)] == [10, 20]
    assert [i for i in range(25) if ImageLogger(10, log_first_step=True).check_frequency(i)] == [0, 1, 2, 4, 8, 10, 20]
    assert ImageLogger(0).disabled


def test_grid() -> None:
    logger = ImageLogger(max_images=5)
    images = torch.tensor([-1.0, 1.0, 3.0, 0.0, -1.0, 1.0]).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    grid = logger._grid(images)
    assert grid.shape == (3, 2 * 8 + 3 * 2, 4 * 8 + 5 * 2)
    assert grid[0, 5, [5, 15, 25]].tolist() == [0.0, 1.0, 1.0]
    assert grid[0, 5, 35].item() == 0.5
    assert logger._grid(torch.zeros(2, 1, 4, 4)).shape[0] == 3
    assert logger._grid(torch.zeros(2, 16, 4, 4)).shape[0] == 3  # a latent: its first three channels
    assert logger._grid("text") is None


def test_pictures_curves_and_tensorboard(train: Callable[..., Path]) -> None:
    params = "lightning.callbacks.image_logger.params."
    options = [params + "batch_frequency=3", params + "increase_log_steps=false"]
    folder = train(*options, "lightning.callbacks.training_plot.target=ldm.training.callbacks.TrainingPlot", "lightning.logger=null")
    pictures = sorted(path.name for path in (folder / "images" / "train").iterdir())
    assert pictures == ["inputs_gs-000003_e-000000_b-000002.png", "samples_gs-000003_e-000000_b-000002.png"]
    with Image.open(folder / "training.png") as image:
        assert image.width > 300
    assert [step for step, _ in read_metrics(folder)["train/loss"]] == [0, 1, 2, 3]
    assert list((folder / "tensorboard").glob("events*"))


def test_curves_go_on_after_a_resume(train: Callable[..., Path]) -> None:
    folder = train("lightning.trainer.max_steps=3")
    train("lightning.trainer.max_steps=6", resume=folder)
    assert [step for step, _ in read_metrics(folder)["train/loss"]] == [0, 1, 2, 3, 4, 5]


def test_a_line_of_the_log_that_a_kill_has_cut(tmp_path: Path) -> None:
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    path.parent.mkdir(parents=True)
    path.write_text("epoch,step,train/loss\n0,1,0.5\n0,2,0.25\n0,3,1.2e-")
    assert read_metrics(tmp_path) == {"train/loss": [(1, 0.5), (2, 0.25)]}


def test_what_log_images_does_not_know(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    params = "lightning.callbacks.image_logger.params={batch_frequency: 1, log_images_kwargs: {ddim_stps: 20}}"
    train("lightning.callbacks.image_logger.target=main.ImageLogger", params, code=2)
    assert "does not know ddim_stps; it takes N, split" in capsys.readouterr().err


def test_test_data_of_a_model_without_a_test(train: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    train("data.params.test.target=tests.training.toy.NoisyData")
    assert "data.params.test is not used: ToyModel has no test" in caplog.text


def test_no_matplotlib_no_plot(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = train("lightning.callbacks.training_plot.target=ldm.training.callbacks.TrainingPlot")
    assert "pip install matplotlib" in caplog.text
    assert not (folder / "training.png").exists()


def test_nothing_logged_nothing_drawn(tmp_path: Path) -> None:
    assert plot_metrics(tmp_path) is None


def test_progress_line(train: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    train()
    line = next(message for message in caplog.messages if message.startswith("step 4"))
    assert all(word in line for word in ("epoch 0", "train/loss", "lr ", "img/s"))
    assert batch_items({"caption": ["a", "b"], "image": torch.zeros(2, 3)}) == 2
    assert ProgressLog().every_n_seconds > 0


def test_checkpoint_options(train: Callable[..., Path]) -> None:
    option = "lightning.modelcheckpoint.params."
    folder = train(option + "every_n_train_steps=2", option + "save_top_k=-1")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "epoch=000000-step=000000002.ckpt",
        "epoch=000000-step=000000004.ckpt",
        "last.ckpt",
    ]
    two = torch.load(folder / "checkpoints" / "epoch=000000-step=000000004.ckpt", weights_only=True)
    one = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(one["state_dict"]["ema"], two["state_dict"]["ema"])
    assert {LastCheckpoint.__name__, StepCheckpoint.__name__} <= {name.partition("{")[0] for name in one["callbacks"]} | {"LastCheckpoint"}
    none = train(option + "save_last=false", name="none")
    assert not (none / "checkpoints" / "last.ckpt").exists()
