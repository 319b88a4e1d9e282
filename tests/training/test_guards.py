"""What goes wrong in a training: numbers, disks, workers, kills. Nothing good may be lost by it."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldm.training import state
from ldm.training.cli import main
from ldm.training.guards import SkipNonFinite, explain
from ldm.training.run import compile_parts
from ldm.util import ConfigError, UserError
from tests.training.conftest import assert_same_weights, last
from tests.training.toy import ToyModel

ROOT = Path(__file__).resolve().parents[2]


def steps(n: int) -> str:
    return f"lightning.trainer.max_steps={n}"


# ---------------------------------------------------------------------- numbers
def bad_batches(*numbers: int) -> str:
    return f"model.params.bad={list(numbers)}"


@pytest.mark.parametrize("manual", [False, True])
def test_a_bad_update_is_left_out(train: Callable[..., Path], caplog: pytest.LogCaptureFixture, manual: bool) -> None:
    folder = train(steps(6), bad_batches(3), f"model.params.manual={manual}")
    assert "left out (1 so far, 1 in a row)" in caplog.text
    checkpoint = last(folder)
    assert checkpoint["global_step"] == 6 * (1 + manual)  # Lightning counts the steps of both optimizers
    for value in checkpoint["state_dict"].values():
        assert torch.isfinite(value).all()
    for value in checkpoint["optimizer_states"][0]["state"].values():
        assert torch.isfinite(value["exp_avg"]).all()
    metrics = (folder / "csv" / "version_0" / "metrics.csv").read_text()
    assert "skipped_updates" in metrics


def test_only_the_bad_update_is_left_out(train: Callable[..., Path]) -> None:
    """The weights after it are those before it."""
    before, after = train(steps(2), name="before"), train(steps(3), bad_batches(3), name="after")
    for name, value in last(before)["state_dict"].items():
        assert name == "ema" or torch.equal(value, last(after)["state_dict"][name]), name


def test_too_many_in_a_row(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["lightning.callbacks.skip_non_finite.params.limit=3", "lightning.modelcheckpoint.params.every_n_train_steps=1"]
    command = ["-b", str(config), "-t", "-n", "run", "--trust", "tests", "--logdir", str(tmp_path / "logs")]
    assert main([*command, steps(20), bad_batches(3, 5, 6, 7), *words]) == 2
    error = capsys.readouterr().err
    assert "3 updates in a row" in error and "base_learning_rate" in error and "Traceback" not in error
    kept = last(next((tmp_path / "logs").glob("*_run")))
    assert kept["global_step"] == 6
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())


def test_one_of_two_optimizers_is_bad_for_ever() -> None:
    """The good steps of a discriminator do not hide that the generator stands still."""
    guard, weights = SkipNonFinite(limit=3), [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    trainer = SimpleNamespace(callbacks=[], global_step=0, precision_plugin=None)
    module = SimpleNamespace(log=lambda *args, **options: None)
    with pytest.raises(UserError, match="3 updates in a row"):
        for _ in range(3):
            for optimizer, weight, value in zip(optimizers, weights, (float("nan"), 1.0), strict=True):
                weight.grad = torch.full((2,), value)
                guard.on_before_optimizer_step(trainer, module, optimizer)


# ---------------------------------------------------------------------- the machine
def test_full_disk(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint finds the disk full: one clear line, and the first one is whole."""
    save, calls = torch.save, []

    def full(checkpoint: dict, file: object) -> None:
        calls.append(checkpoint["global_step"])
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(checkpoint, file)

    monkeypatch.setattr(state.torch, "save", full)
    command = ["-b", str(config), "-t", "-n", "run", "--trust", "tests", "--logdir", str(tmp_path / "logs")]
    assert main([*command, steps(9), "lightning.modelcheckpoint.params.every_n_train_steps=3"]) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "last.ckpt" in error and "--resume" in error and "Traceback" not in error
    folder = next((tmp_path / "logs").glob("*_run"))
    assert last(folder)["global_step"] == 3
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the platform has no /dev/full")
def test_torch_tells_a_full_disk() -> None:
    """The error that torch.save really raises there is one that we explain."""
    with pytest.raises((OSError, RuntimeError)) as caught, open("/dev/full", "wb") as file:
        torch.save({"x": torch.zeros(100_000)}, file)
    assert isinstance(caught.value, RuntimeError) or explain(caught.value) is not None


def test_dead_worker(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["-b", str(config), "-t", "-n", "run", "--trust", "tests", "--logdir", str(tmp_path / "logs")]
    words = ["data.params.train.params.dies_at=9", "data.params.num_workers=1"]
    assert main([*command, steps(20), *words]) == 2
    error = capsys.readouterr().err
    assert "a data worker died" in error and "num_workers" in error and "Traceback" not in error


def test_error_in_a_worker_is_one_line() -> None:
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ...\n"
    explained = explain(UserError(text + "ldm.util.UserError: no file x"))
    assert str(explained) == "no file x"
    assert explain(ValueError("other")) is None
    assert "batch_size" in str(explain(torch.OutOfMemoryError("out of memory")))
    assert "hang" in str(explain(RuntimeError("DataLoader timed out after 5 seconds")))


# ---------------------------------------------------------------------- kills
def run_and_kill(command: list[str], after: Callable[[], bool], seconds: float) -> None:
    """Start the real command; SIGKILL it `seconds` after `after()` holds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        while not after():
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.05)
        time.sleep(seconds)
    finally:
        process.kill()
        process.communicate()


def killed_three_times(tmp_path: Path, base: Path, words: list[str], longest: float) -> tuple[Path, Path]:
    """(undisturbed run, run that was killed with SIGKILL three times at random moments and resumed)."""
    logs, draw = tmp_path / "logs", random.Random(4)
    start = [sys.executable, "main.py", "--base", str(base), "-t", "--trust", "tests", "--logdir", str(logs), *words]
    subprocess.run([*start, "-n", "whole"], cwd=ROOT, check=True, capture_output=True)

    def find() -> Path | None:
        return next((path.parents[1] for path in logs.glob("*_parts/configs/*-project.yaml")), None)

    run_and_kill([*start, "-n", "parts"], lambda: find() is not None, draw.uniform(0, longest))
    parts = find()
    resume = [sys.executable, "main.py", "-t", "-r", str(parts), "--trust", "tests"]
    for _ in range(2):
        records = len(list(parts.glob("configs/*")))
        run_and_kill(resume, lambda n=records: len(list(parts.glob("configs/*-project.yaml"))) * 3 > n, draw.uniform(0, longest))
    subprocess.run(resume, cwd=ROOT, check=True, capture_output=True)
    return next(logs.glob("*_whole")), parts


def test_killed_three_times(tmp_path: Path, config: Path) -> None:
    words = [steps(300), "lightning.modelcheckpoint.params.every_n_train_steps=5"]
    assert_same_weights(*killed_three_times(tmp_path, config, words, longest=1.0))


@pytest.mark.slow
def test_tiny_killed_three_times(tmp_path: Path) -> None:
    """The same with a real latent diffusion model: the README's first training."""
    words = [steps(60), "lightning.modelcheckpoint.params.every_n_train_steps=5"]
    assert_same_weights(*killed_three_times(tmp_path, ROOT / "configs/shapes/tiny.yaml", words, longest=20.0))


def test_resume_before_the_first_checkpoint(train: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that was killed before it wrote a checkpoint starts again, with its own configs and seed."""
    whole, parts = train(steps(4), "-s", "5", name="whole"), train(steps(4), "-s", "5", name="parts")
    (parts / "checkpoints" / "last.ckpt").unlink()
    train(resume=parts)
    assert "starts again from the beginning" in caplog.text
    assert_same_weights(whole, parts)


def test_resume_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "2026-01-01T00-00-00-lightning.yaml").write_text("lightning: {}")  # killed while it wrote them
    assert main(["-r", str(tmp_path), "-t"]) == 2
    assert "neither" in capsys.readouterr().err


# ---------------------------------------------------------------------- compile
def test_compile_keeps_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[torch.nn.Module, dict]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((self, options)))
    model = ToyModel()
    keys = list(model.state_dict())
    compile_parts(model, None)
    compile_parts(model, {"parts": "net", "mode": "max-autotune"})
    assert compiled == [(model.net, {"mode": "max-autotune"})]
    assert list(model.state_dict()) == keys
    for section, message in (({"parts": ["nett"]}, "nett"), ({"modus": 1}, "modus"), (True, "no known network")):
        with pytest.raises(ConfigError, match=message):
            compile_parts(model, section)


def test_compile_by_config(train: Callable[..., Path]) -> None:
    """The compiled model trains to the same weights; `eager` needs no compiler on the machine."""
    plain = train(steps(3), name="plain")
    compiled = train(steps(3), "lightning.compile={parts: net, backend: eager}", name="compiled")
    assert_same_weights(plain, compiled)
