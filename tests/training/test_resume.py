"""A training that stops and goes on gives the same weights, to the bit, as one that does not stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.training import run as run_module
from ldm.training.state import AtomicCheckpointIO, LastCheckpoint, RngStateCallback, Stopped, isolated_rng, rng_state, set_rng_state
from tests.training.conftest import assert_same_weights, last

ROOT = Path(__file__).resolve().parents[2]
VAL = ["data.params.validation.target=tests.training.toy.NoisyData", "data.params.validation.params.size=6"]


def steps(n: int) -> str:
    return f"lightning.trainer.max_steps={n}"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list:
    """The models of the runs of this test, in order."""
    seen: list = []
    fit = run_module.fit

    def spy(trainer, model, data, folder):
        seen.append(model)
        return fit(trainer, model, data, folder)

    monkeypatch.setattr(run_module, "fit", spy)
    return seen


# 30 items in batches of 4 are 8 steps an epoch: 20 is in the middle of the third, 16 is the end of the second.
@pytest.mark.parametrize(
    "stops, words",
    [
        pytest.param([20], [], id="middle"),
        pytest.param([16], [], id="end_of_epoch"),
        pytest.param([3, 8, 13, 24, 33], [], id="many_times"),
        pytest.param([20], ["data.params.num_workers=2"], id="workers"),
        pytest.param([8, 20], [*VAL, "lightning.trainer.val_check_interval=4"], id="validation"),
        pytest.param([6, 12, 15], ["lightning.trainer.limit_train_batches=6"], id="limited_epochs"),
        pytest.param([21], ["lightning.trainer.accumulate_grad_batches=2"], id="accumulation"),
        pytest.param([21], ["model.params.manual=true"], id="two_optimizers"),
    ],
)
def test_exact(train: Callable[..., Path], models: list, stops: list[int], words: list[str]) -> None:
    whole = train(steps(40), *words, name="whole")
    parts = train(steps(stops[0]), *words, name="parts")
    for stop in [*stops[1:], 40]:
        train(steps(stop), resume=parts)
    assert list(chain(*(model.seen for model in models[1:]))) == models[0].seen
    assert list(chain(*(model.captions for model in models[1:]))) == models[0].captions
    assert last(whole)["epoch"] == last(parts)["epoch"]
    assert_same_weights(whole, parts)


def test_epochs(train: Callable[..., Path], models: list) -> None:
    """Counted in epochs, a resume at the end of one goes on with the next."""
    epochs = "lightning.trainer.max_epochs={}".format
    words = ["lightning.trainer.max_steps=-1", *VAL]
    whole = train(*words, epochs(4), name="whole")
    parts = train(*words, epochs(2), name="parts")
    train(epochs(4), resume=parts)
    assert models[1].seen + models[2].seen == models[0].seen
    assert_same_weights(whole, parts)


@pytest.mark.parametrize("size", [2, 7, 8])
@pytest.mark.parametrize("stop", [4, 8])
def test_another_batch_size(train: Callable[..., Path], models: list, stop: int, size: int) -> None:
    """The rest of the epoch is seen once, from the batch with the next item on, and the next epoch is whole."""
    folder = train(steps(stop))
    items = [i for batch in models[0].seen for i in batch]
    done = len(items) // size * size if stop == 4 else 30
    epoch = -(-30 // size)
    rest = epoch - done // size if stop == 4 else 0
    train(steps(stop + rest + epoch), f"data.params.batch_size={size}", resume=folder)
    seen = [i for batch in models[1].seen for i in batch]
    first, second = seen[: 30 - done], seen[30 - done :]
    assert sorted(items[:done] + first) == sorted(second) == list(range(30))
    assert last(folder)["epoch"] == 1


def test_more_processes_draw_noise_of_their_own() -> None:
    draws = []
    for rank, step in ((0, 5), (1, 5), (2, 5), (1, 9)):
        callback = RngStateCallback(seed=3)
        torch.manual_seed(3)  # as every process begins
        callback._loaded = [rng_state()]
        callback.on_train_start(SimpleNamespace(global_rank=rank, global_step=step), None)
        draws.append(float(torch.rand(())))
    assert len(set(draws)) == 4


def test_noise_of_an_accelerator_that_the_checkpoint_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a CPU, or of fewer devices, goes on with noise that no other process draws."""
    kept = {"own": torch.arange(3, dtype=torch.uint8)}
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: kept["own"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state: kept.update(own=state))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    state = rng_state()
    assert set_rng_state({**state, "cuda": state["cuda"] + 1}) and torch.equal(kept["own"], torch.arange(1, 4))
    assert set_rng_state({**state, "cuda": [torch.zeros(3), torch.ones(3)]}) and torch.equal(kept["own"], torch.ones(3)), "an old file"
    assert not set_rng_state({**state, "cuda": [torch.zeros(3)]})
    draws = []
    for rank in range(2):
        callback = RngStateCallback(seed=3)
        callback._loaded = [{key: value for key, value in state.items() if key != "cuda"}] * 2
        callback.on_train_start(SimpleNamespace(global_rank=rank, global_step=5), None)
        draws.append(float(torch.rand(())))
    assert len(set(draws)) == 2


def test_pictures_and_validation_change_nothing(train: Callable[..., Path]) -> None:
    plain = train(steps(10), name="plain")
    busy = train(steps(10), *VAL, "lightning.callbacks.image_logger.params.batch_frequency=2", name="busy")
    assert_same_weights(plain, busy)
    names = {path.name for path in (busy / "images").rglob("*.png")}
    assert "samples_gs-000008_e-000000_b-000007.png" in names
    assert (busy / "images" / "val").is_dir()


def test_workers_change_nothing(train: Callable[..., Path]) -> None:
    assert_same_weights(train(steps(10), name="none"), train(steps(10), "data.params.num_workers=2", name="two"))


@pytest.mark.parametrize("manual", [False, True])
def test_finished_run_resumes_to_nothing(train: Callable[..., Path], models: list, manual: bool) -> None:
    folder = train(steps(3), f"model.params.manual={manual}")
    train(resume=folder)
    assert len(models[0].seen) == 3 and models[1].seen == []
    assert last(folder)["global_step"] == 3 * (1 + manual)


def test_max_steps_counts_batches_with_two_optimizers(train: Callable[..., Path], models: list) -> None:
    train(steps(5), "model.params.manual=true")
    assert len(models[0].seen) == 5


def test_best_checkpoint_and_seed_of_the_run(train: Callable[..., Path]) -> None:
    folder = train(steps(16), *VAL, "model.params.monitor=val/loss", "--seed", "7")
    assert len(list((folder / "checkpoints").glob("epoch=*.ckpt"))) == 1
    again = train(steps(16), *VAL, "model.params.monitor=val/loss", "--seed", "7", name="again")
    assert_same_weights(folder, again)
    train(steps(18), resume=folder)
    records = sorted((folder / "configs").glob("*-run.yaml"))
    assert all("seed: 7" in record.read_text() for record in records)


def test_resume_from_the_best(train: Callable[..., Path], tmp_path: Path) -> None:
    """The best checkpoint is taken after a validation; going on from it is as exact as going on from the last."""
    words = [*VAL, "model.params.monitor=val/loss", "lightning.trainer.val_check_interval=4"]
    keep = "lightning.modelcheckpoint.params.save_top_k=10"
    whole = train(steps(20), *words, name="whole")
    parts = train(steps(16), *words, keep, name="parts")
    for step in (4, 8):  # in the middle of an epoch, and at its end
        best = next((parts / "checkpoints").glob(f"epoch=*-step={step:09}.ckpt"))
        copy = tmp_path / f"from_{step}"
        shutil.copytree(parts / "configs", copy / "configs")
        (copy / "checkpoints").mkdir()
        shutil.copy(best, copy / "checkpoints" / "last.ckpt")
        train(steps(20), resume=copy)
        assert_same_weights(whole, copy)


# ---------------------------------------------------------------------- interruption
def test_kill_leaves_a_whole_checkpoint(tmp_path: Path, config: Path, train: Callable[..., Path]) -> None:
    """The real command, killed while it writes a checkpoint every step."""
    command = [sys.executable, "main.py", "--base", str(config), "-t", "-n", "killed", "--trust", "tests"]
    words = ["--logdir", str(tmp_path / "logs"), steps(100_000), "lightning.modelcheckpoint.params.every_n_train_steps=1"]
    process = subprocess.Popen([*command, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    try:
        while not (found := list((tmp_path / "logs").glob("*/checkpoints/last.ckpt"))):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        process.kill()
        process.communicate()
    folder = found[0].parents[1]
    goal = last(folder)["global_step"] + 3
    train(steps(goal), resume=folder)
    assert last(folder)["global_step"] == goal


@pytest.mark.parametrize("name, code", [("SIGTERM", 128 + signal.SIGTERM), ("SIGINT", 128 + signal.SIGINT), ("SIGUSR1", 0)])
def test_signals_save(train: Callable[..., Path], caplog: pytest.LogCaptureFixture, name: str, code: int) -> None:
    """SIGTERM and ctrl-C finish the step, save and stop; SIGUSR1 saves and goes on. Nothing is lost by either."""
    if not hasattr(signal, name):
        pytest.skip(f"the platform has no {name}")
    before = signal.getsignal(getattr(signal, name))
    whole = train(steps(9), name="whole")
    parts = train(steps(9), f"model.params.signals={{5: {name}}}", name="parts", code=code)
    assert f"{name}: saved" in caplog.text
    assert signal.getsignal(getattr(signal, name)) == before
    if code:
        assert f"--resume {parts}" in caplog.text
        assert last(parts)["global_step"] == 5
        train(steps(9), "model.params.signals=null", resume=parts)
    assert_same_weights(whole, parts)


def test_a_signal_waits_for_accumulated_gradients(train: Callable[..., Path]) -> None:
    """SIGTERM at the fifth batch of updates of four: a checkpoint there would lose the gradients of one batch."""
    words = [steps(6), "lightning.trainer.accumulate_grad_batches=4"]
    whole = train(*words, name="whole")
    parts = train(*words, "model.params.signals={5: SIGTERM}", name="parts", code=128 + signal.SIGTERM)
    assert last(parts)["global_step"] == 2
    train(*words, "model.params.signals=null", resume=parts)
    assert_same_weights(whole, parts)


def test_a_signal_during_validation(train: Callable[..., Path], models: list) -> None:
    """It does not wait for the validation's end, and what it saves is the state before it."""
    words = [steps(12), *VAL, "data.params.validation.params.size=40", "lightning.trainer.val_check_interval=4"]
    whole = train(*words, name="whole")
    parts = train(*words, "model.params.val_signal=3", name="parts", code=128 + signal.SIGTERM)
    assert models[1].validated == 3 < models[0].validated / 3
    assert last(parts)["global_step"] == 4
    train(*words, "model.params.val_signal=null", resume=parts)
    assert models[1].seen + models[2].seen == models[0].seen
    assert_same_weights(whole, parts)


def test_a_signal_during_validation_waits_for_accumulated_gradients(train: Callable[..., Path]) -> None:
    """A validation after six batches of updates of four."""
    words = [steps(4), *VAL, "lightning.trainer.accumulate_grad_batches=4", "lightning.trainer.val_check_interval=6"]
    whole = train(*words, name="whole")
    parts = train(*words, "model.params.val_signal=1", name="parts", code=128 + signal.SIGTERM)
    assert last(parts)["global_step"] == 2
    train(*words, "model.params.val_signal=null", resume=parts)
    assert_same_weights(whole, parts)


def test_a_signal_that_comes_while_another_is_answered_is_not_lost(tmp_path: Path) -> None:
    saved = []

    def save(path: Path) -> None:
        saved.append(path)
        if len(saved) == 1:
            callback._on_signal(signal.SIGTERM, None)

    callback = LastCheckpoint(tmp_path)
    module = SimpleNamespace(on_train_batch_end=lambda *_: None)
    trainer: Any = SimpleNamespace(world_size=1, global_step=3, callbacks=[], save_checkpoint=save)
    callback._on_signal(signal.SIGUSR1, None)
    callback.after_step(trainer, module)
    with pytest.raises(Stopped, match="SIGTERM"):
        callback.after_step(trainer, module)
    assert len(saved) == 2

    for number in (signal.SIGINT, signal.SIGUSR1):  # a stop is not replaced by a save
        callback._on_signal(number, None)
    with pytest.raises(Stopped, match="SIGINT"):
        callback.after_step(trainer, module)
    callback._answering = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        callback._on_signal(signal.SIGINT, None)


def test_another_learning_rate_takes_effect_on_resume(train: Callable[..., Path], models: list, caplog) -> None:
    folder = train(steps(3), "model.base_learning_rate=1.0e-2")
    train(steps(6), "model.base_learning_rate=1.0e-3", resume=folder)
    assert "the learning rate, 1.000e-02 in the checkpoint, is 1.000e-03 from here on" in caplog.text
    state = last(folder)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-3 / 7)
    assert state["lr_schedulers"][0]["base_lrs"] == [pytest.approx(1e-3)]


def test_checkpoints_every_n_updates_of_two_optimizers(train: Callable[..., Path]) -> None:
    """Lightning counts the steps of both."""
    words = ["lightning.modelcheckpoint.params.save_top_k=-1", "lightning.modelcheckpoint.params.every_n_train_steps=4"]
    folder = train(steps(7), *words, "model.params.manual=true")
    assert len(list((folder / "checkpoints").glob("epoch*.ckpt"))) == 1


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"x": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        io.save_checkpoint({"x": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"x": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_configs_in_hyper_parameters_become_plain(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    checkpoint = {"hyper_parameters": {"net": OmegaConf.create({"width": 3, "sizes": [1, 2]})}}
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["net"] == {"width": 3, "sizes": [1, 2]}


def test_rng_state_round_trip(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))

    draw()  # leaves a cached second Gaussian in python and numpy
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draw()
    with isolated_rng(3):
        inside = draw()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected != inside
