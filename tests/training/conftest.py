"""A config of the toy model in a temporary folder, and a way to run it as the command line does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from ldm import util

CONFIG = {
    "model": {"base_learning_rate": 0.01, "target": "tests.training.toy.ToyModel"},
    "data": {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 4, "num_workers": 0, "train": {"target": "tests.training.toy.NoisyData"}},
    },
    "lightning": {
        "trainer": {"max_steps": 4, "accelerator": "cpu", "log_every_n_steps": 1},
        "callbacks": {"image_logger": None, "training_plot": None},
        "logger": False,
    },
}


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Trust, seeds and the timestamp of a run end with the test."""
    trusted = set(util._TRUSTED)
    environment = dict(os.environ)
    yield
    util._TRUSTED.clear()
    util._TRUSTED.update(trusted)
    for name in set(os.environ) - set(environment):
        del os.environ[name]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


@pytest.fixture
def train(tmp_path: Path, config: Path) -> Callable[..., Path]:
    """train(*words, name=..., resume=...) -> folder of the run."""
    from ldm.training.cli import main

    def call(*words: str, name: str = "run", resume: Path | None = None, code: int = 0) -> Path:
        source = ["--resume", str(resume)] if resume else ["--base", str(config), "--name", name]
        assert main([*source, "--train", "--trust", "tests", "--logdir", str(tmp_path / "logs"), *words]) == code
        if resume:
            return resume
        return max((tmp_path / "logs").glob(f"*_{name}"))  # one run a name

    return call


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_weights(a: Path, b: Path) -> None:
    one, two = last(a), last(b)
    assert one["global_step"] == two["global_step"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    for name, value in one["optimizer_states"][0]["state"].items():
        assert torch.equal(value["exp_avg"], two["optimizer_states"][0]["state"][name]["exp_avg"]), name
