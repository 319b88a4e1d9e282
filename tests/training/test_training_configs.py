"""The ready training configs: the full ones build and find their data, the tiny ones train."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.folder import FolderDataset
from ldm.data.shapes import ShapesDataset
from ldm.data.shards import write_shards
from ldm.inference.checkpoint import read_state_dict
from ldm.inference.weights.key_names import SCHEDULE_BUFFERS
from ldm.inference.zoo import build_on_meta
from ldm.models.diffusion.panels import latent_panels
from ldm.training.budget import devices_of, header, launch_of, phases_of, placeholders
from ldm.training.cli import main, merge_configs
from ldm.util import instantiate_from_config
from tests.contracts.shipped import Built, built, summarise

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "training"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FULL = [name for name in NAMES if not name.endswith("-tiny")]
TINY = [name for name in NAMES if name.endswith("-tiny")]
AUTOENCODERS = ["autoencoder-kl", "autoencoder-vq"]
SD, STAGE = "configs/stable-diffusion/{}.yaml", "models/first_stage_models/{}/config.yaml"
PUBLISHED = {  # whose weights fit
    **{name: SD.format("v1-inference") for name in ("sd1", "sd1-finetune")},
    **{name: SD.format("v2-inference") for name in ("sd2", "sd2-finetune", "sd2-v", "sd2-v-finetune")},
    "sd1-inpaint": SD.format("v1-inpainting-inference"),
    "upscale-x4": SD.format("x4-upscaling"),
    "ldm-class": "configs/latent-diffusion/cin256-v2.yaml",
    "ldm-uncond": "models/ldm/ffhq256/config.yaml",
    "superres": "models/ldm/bsr_sr/config.yaml",
    "autoencoder-kl": STAGE.format("kl-f8"),
    "autoencoder-vq": STAGE.format("vq-f4"),
}


def config_of(name: str, *words: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.yaml"
    return merge_configs([path], [*placeholders(path), *words])


@cache
def model_of(name: str) -> tuple[torch.nn.Module, Built]:
    model = build_on_meta(config_of(name)["model"])
    return model, summarise(model)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    """train/ and val/: pictures with captions in class folders, and the same as shards in shards/."""
    root = tmp_path_factory.mktemp("data")
    shapes = ShapesDataset(size=8, image_size=64, seed=5)
    for i in range(8):
        place = root / ("train" if i < 6 else "val") / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        item = shapes[i]
        Image.fromarray(((item["image"] + 1) * 127.5).astype(np.uint8)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(item["caption"])
    for split in ("train", "val"):
        write_shards(FolderDataset(str(root / split)), root / "shards" / split)
    return root


# ---------------------------------------------------------------------- the full ones
def test_every_full_config_has_a_tiny_one():
    assert {f"{name}-tiny" for name in FULL} == set(TINY)
    assert set(FULL) == set(PUBLISHED)


@pytest.mark.parametrize("name", FULL)
def test_what_is_left_open_is_named_in_one_line(name, capsys, tmp_path):
    text = (FOLDER / f"{name}.yaml").read_text()
    keys = re.findall(r"^(\w+): \?\?\?  # \w", text, re.M)
    assert "data_root" in keys and len(keys) == text.count("???"), "one a line, with a comment that says what it is"
    assert main(["--base", f"configs/training/{name}.yaml", "-t", "--logdir", str(tmp_path)]) == 2
    given = " ".join(f"{key}=VALUE" for key in sorted(keys))
    assert capsys.readouterr().err == f"error: the config leaves open what you must give: add {given}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FULL)
def test_full_config_builds_and_published_weights_fit(name):
    parts = model_of(name)[1]
    assert parts.devices == {"meta"}
    kept = ("model.", "first_stage_model.", "cond_stage_model.", "encoder.", "decoder.", "quantize.", "quant_conv.", "loss.discriminator.")
    theirs = {key: shape for key, shape in built(PUBLISHED[name]).shapes.items() if key.startswith(kept)}
    assert {key: shape for key, shape in parts.shapes.items() if key.startswith(kept)} == theirs
    assert any("model_ema." in key for key in parts.shapes), "an average is kept"


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_and_warm_up(name):
    config, model = config_of(name), model_of(name)[0]
    model.learning_rate = float(config["model"]["base_learning_rate"])
    optimizers, plans = model.configure_optimizers()
    assert len(optimizers) == len(plans) == (2 if name.removesuffix("-tiny") in AUTOENCODERS else 1)
    factor, steps = plans[0]["scheduler"].lr_lambdas[0], config["lightning"]["trainer"]["max_steps"]
    assert factor(0) < 1e-5 < factor(steps // 5) <= factor(steps) == 1


@pytest.mark.parametrize("name", NAMES)
def test_objective(name):
    params, trainer = (config_of(name)[part] for part in ("model", "lightning"))
    params, trainer = params["params"], trainer["trainer"]
    assert trainer["precision"] == ("32-true" if name in TINY else "bf16-mixed")
    if name.removesuffix("-tiny") in AUTOENCODERS:
        assert params["gradient_clip_val"] == 1.0 and 0 < params["lossconfig"]["params"]["disc_start"] < trainer["max_steps"]
        return
    assert trainer["gradient_clip_val"] == 1.0 and params["use_ema"] is True and params["offset_noise"] == 0
    assert params["unet_config"]["params"]["use_checkpoint"] is True
    dropped = params.get("ucg_training") or {}
    assert all(rule["p"] == 0.1 for rule in dropped.values())
    assert set(dropped) == {params["cond_stage_key"]} & {"caption", "class_label"} if "cond_stage_key" in params else not dropped
    if params.get("rescale_betas_zero_snr"):
        schedule = model_of(name)[0].schedule
        assert params["parameterization"] == "v" and params["loss_weighting"] == "none" and schedule.abar[-1] == 0
    known = inspect.signature(latent_panels).parameters
    assert set(config_of(name)["lightning"]["callbacks"]["image_logger"]["params"]["log_images_kwargs"]) <= set(known)


@pytest.mark.parametrize("name", FULL)
def test_the_command_in_the_header(name):
    """It names its own file; and with what the header says of a second phase, the config is still one."""
    options = launch_of(FOLDER / f"{name}.yaml")
    assert options.base == [f"configs/training/{name}.yaml"] and options.train and options.name == name
    assert (options.strategy == "ddp") == (devices_of(options) > 1)
    assert launch_of(FOLDER / f"{name}-tiny.yaml").base == [f"configs/training/{name}-tiny.yaml"]
    size = {256: 32, 512: 64, 768: 96}
    for pairs in phases_of(FOLDER / f"{name}.yaml"):
        config = config_of(name, *pairs)
        if "resolution" in config:
            assert config["model"]["params"]["image_size"] == size[config["resolution"]]
            assert all(config["data"]["params"][split]["params"]["size"] == config["resolution"] for split in ("train", "validation"))
    assert len(phases_of(FOLDER / f"{name}.yaml")) == (2 if name in ("sd1", "sd2", "sd2-v") else 1)


def test_batches_are_those_of_the_published_trainings():
    def items(name, *words):
        config = config_of(name, *words)
        count = config["data"]["params"]["batch_size"] * devices_of(launch_of(FOLDER / f"{name}.yaml"))
        own = config["model"]["params"].get("accumulate_grad_batches", 1)
        return count * config["lightning"]["trainer"].get("accumulate_grad_batches", own)

    for name in ("sd1", "sd2", "sd2-v"):
        assert [items(name, *pairs) for pairs in phases_of(FOLDER / f"{name}.yaml")] == [2048, 2048]
    found = {name: items(name) for name in ("sd1-inpaint", "ldm-class", "ldm-uncond", "superres", "autoencoder-kl")}
    assert found == {"sd1-inpaint": 2048, "ldm-class": 1200, "ldm-uncond": 42, "superres": 64, "autoencoder-kl": 24}


@pytest.mark.parametrize("name", FULL)
def test_full_config_finds_its_data(name, data_root):
    """Items have what the model reads, in the size that it is trained at."""
    shards = "ShardDataset" in (FOLDER / f"{name}.yaml").read_text()
    config = config_of(name, f"data_root={data_root / 'shards' if shards else data_root}")
    params, module = config["model"]["params"], instantiate_from_config(config["data"])
    module.setup()
    assert set(module.datasets) == {"train", "validation"}
    for dataset in module.datasets.values():
        item = next(iter(dataset)) if shards else dataset[0]
        image = item["image"]
        assert image.dtype == np.float32 and image.shape[2] == 3 and -1 <= image.min() < image.max() <= 1
        side = (
            params["image_size"] * model_of(name)[0].first_stage_model.factor
            if "image_size" in params
            else params["ddconfig"]["resolution"]
        )
        assert image.shape[0] * image.shape[1] == side * side
        wanted = [
            *(params.get("ucg_training") or {}),
            *params.get("concat_keys", []),
            params.get("cond_stage_key"),
            params.get("low_scale_key"),
        ]
        assert {key for key in wanted if key} <= set(item)
        if params.get("concat_keys"):
            assert item["mask"].shape == (side, side, 1) and item["masked_image"].shape == image.shape
        for key in {"lr", "LR_image"} & set(item):
            assert item[key].shape == (params["image_size"], params["image_size"], 3)


# ---------------------------------------------------------------------- the tiny ones
@pytest.mark.parametrize("name", FULL)
def test_tiny_config_is_of_the_same_structure(name):
    full, tiny = (config_of(n)["model"] for n in (name, f"{name}-tiny"))
    assert full["target"] == tiny["target"]
    assert set(full["params"]) - {"scale_factor"} == set(tiny["params"]) - {"scale_by_std"}
    assert set(full["params"].get("lossconfig", {}).get("params", {})) <= set(tiny["params"].get("lossconfig", {}).get("params", {}))
    assert f"{name}.yaml" in header(FOLDER / f"{name}-tiny.yaml")


def run_tiny(name: str, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Two updates with pictures; the last checkpoint and the names of the pictures."""
    log = "lightning.callbacks.image_logger.params"
    words = ["lightning.trainer.max_steps=2", "lightning.trainer.accelerator=cpu", "lightning.logger=false", "data.params.batch_size=2"]
    words += ["lightning.callbacks.training_plot=null", f"{log}.batch_frequency=2", f"{log}.max_images=2"]
    later = (
        "model.params.lossconfig.params.disc_start=1"
        if name.removesuffix("-tiny") in AUTOENCODERS
        else f"{log}.log_images_kwargs.ddim_steps=2"
    )
    assert main(["--base", f"configs/training/{name}.yaml", "-t", "-n", "run", "--logdir", str(folder), later, *words]) == 0
    (run,) = folder.glob("*_run")
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True), sorted(path.name for path in run.glob("images/train/*.png"))


@pytest.mark.parametrize("name", TINY)
def test_tiny_config_trains(name, tmp_path):
    checkpoint, pictures = run_tiny(name, tmp_path)
    weights = checkpoint["state_dict"]
    trained = {key: value for key, value in weights.items() if key not in SCHEDULE_BUFFERS}  # of which zero terminal SNR makes one infinite
    assert all(torch.isfinite(value).all() for value in trained.values() if value.is_floating_point())
    assert any("model_ema." in key for key in weights)
    if name.removesuffix("-tiny") in AUTOENCODERS:
        assert checkpoint["generator_steps"] == 2 and len(checkpoint["optimizer_states"]) == 2
        assert checkpoint["optimizer_states"][1]["state"], "the discriminator has learnt"
        assert any(name.startswith("reconstructions_") for name in pictures)
        return
    assert checkpoint["global_step"] == 2 and checkpoint["optimizer_states"][0]["state"]
    assert float(weights["scale_factor"]) != 1.0
    shipped = read_state_dict("models/shapes/autoencoder.safetensors")
    for key in ("encoder.conv_in.weight", "decoder.conv_out.weight"):
        assert torch.allclose(weights[f"first_stage_model.{key}"], shipped[key].float(), atol=2e-3), "the shipped first stage"
    assert any(name.startswith("samples_") for name in pictures)


def test_inpainting_starts_from_the_model_that_ships(tmp_path):
    checkpoint, pictures = run_tiny("sd1-inpaint-tiny", tmp_path)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    grown, old = checkpoint["state_dict"][key], read_state_dict("models/shapes/model.safetensors")[key].float()
    assert grown.shape[1] == 2 * old.shape[1] + 1
    assert (grown[:, : old.shape[1]] - old).abs().max() < 1e-3 and 0 < grown[:, old.shape[1] :].abs().max() < 1e-3
    assert any(name.startswith("masked_image_") for name in pictures)
