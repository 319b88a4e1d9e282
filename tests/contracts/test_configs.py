"""Every config that ships builds, without network; its data sets give proper items; and every command answers --help from anywhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.inference.zoo import build_on_meta
from ldm.util import instantiate_from_config
from tests.contracts.shipped import CONFIGS, ROOT, SHAPES, built, load

COMMANDS = ["main.py", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").glob("*.py"))]


def test_there_are_configs_and_commands():
    assert {"configs/shapes/latent-diffusion.yaml", "configs/stable-diffusion/v1-inference.yaml"} <= set(CONFIGS)
    assert {"main.py", "scripts/txt2img.py", "scripts/img2img.py"} <= set(COMMANDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_without_memory_and_network(name):
    assert built(name).millions() > 0
    assert built(name).devices == {"meta"}, "a parameter was made on another device than the one in force"


@pytest.mark.parametrize("name", SHAPES)
def test_training_config_gives_an_optimizer_and_a_schedule(name):
    config = load(name)
    model = build_on_meta(config["model"])
    model.learning_rate = config["model"]["base_learning_rate"]
    made = model.configure_optimizers()
    optimizers, plans = made if isinstance(made, tuple) else ([made], [])
    assert len(optimizers) == 1 and optimizers[0].param_groups[0]["lr"] > 0
    assert len(plans) == ("scheduler_config" in config["model"]["params"])
    for plan in plans:
        factor, end = plan["scheduler"].lr_lambdas[0], config["lightning"]["trainer"]["max_steps"]
        values = [factor(step) for step in np.linspace(0, end, 50).astype(int)]
        assert all(0 < value <= 1 for value in values) and values[0] < max(values)


def reduced(config: dict[str, Any], cache_dir: Path) -> dict[str, Any]:
    """A data set's config, and those of the data sets inside, with few items instead of many; a cache of latents goes into `cache_dir`."""
    params = dict(config["params"])
    if "size" in params:
        params["size"] = 16
    if "dataset" in params:
        params["dataset"] = reduced(params["dataset"], cache_dir)
    if config["target"].endswith("CachedLatents"):
        params |= {"cache_dir": str(cache_dir), "batch_size": 2, "workers": 0}
    return {**config, "params": params}


def first_stage_weights(config: dict[str, Any]) -> str | None:
    """The file of the first stage that a data set, or one inside it, encodes with."""
    params = config["params"]
    if "dataset" in params and (inside := first_stage_weights(params["dataset"])):
        return inside
    return ((params.get("first_stage") or {}).get("params") or {}).get("ckpt_path")


@pytest.mark.parametrize("name", SHAPES)
def test_data_of_the_shapes_configs(name, tmp_path):
    data = load(name)["data"]
    splits = [key for key in ("train", "validation", "test") if key in data["params"]]
    assert "train" in splits
    params = {**data["params"], "batch_size": 2, "num_workers": 0}
    for split in splits:
        weights = first_stage_weights(params[split])
        if weights is not None and not Path(weights).exists():
            del params[split]  # latents of a first stage that is not trained yet
        else:
            params[split] = reduced(params[split], tmp_path)
    module = instantiate_from_config({**data, "params": params})
    module.setup()
    for split in module.datasets:
        check_item(module.datasets[split][0])
        batch = next(iter(module.loader(split)))
        assert len(batch["caption"]) == 2 and all(len(value) == 2 for value in batch.values())


def check_item(item: dict[str, Any]) -> None:
    """{image: float32 (H, W, 3) in [-1, 1]} or a cached latent {z: float32 (C, h, w)}, and a caption."""
    assert isinstance(item["caption"], str) and item["caption"]
    if "z" in item:
        assert item["z"].dtype == torch.float32 and item["z"].ndim == 3 and torch.isfinite(item["z"]).all()
        return
    image = item["image"]
    assert image.dtype == np.float32 and image.ndim == 3 and image.shape[2] == 3
    assert -1 <= image.min() < image.max() <= 1


@pytest.mark.parametrize("name", SHAPES)
def test_paths_in_the_shapes_configs_lie_in_the_repository(name):
    """Weights that a training needs are either there or made by another of these trainings."""
    text = (ROOT / name).read_text()
    paths = set(re.findall(r"\bmodels/\S+\.safetensors", text))
    assert all(path.startswith("models/shapes/") for path in paths)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_from_another_folder_and_without_torch(name, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-X", "importtime", str(ROOT / name), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage:") and "--help" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported and not imported & {"torch", "pytorch_lightning", "transformers", "open_clip", "torchvision"}
    assert list(tmp_path.iterdir()) == [], "asking for help left files behind"
