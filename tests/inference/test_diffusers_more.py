"""Folders of models that diffusers has under other names: Stable Diffusion 2 of generative-models, Stable unCLIP with OpenAI's CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from ldm.inference.checkpoint import read_state_dict
from ldm.inference.facts import read_config
from ldm.inference.models import load_model
from ldm.inference.weights.convert import _same_schedule, convert
from ldm.inference.weights.diffusers_export import write_folder
from ldm.inference.weights.families import config_prediction, identify, resolve_model
from ldm.util import ConfigError
from tests.inference.diffusers_models import parts, save
from tests.inference.zoo import CLIP, write_zoo_model

SD = "configs/stable-diffusion/"
ADDED = {"v_pred", "noise_augmentor.data_mean", "noise_augmentor.data_std"}  # a mark for other tools; what a file leaves to its config
WORDS = ["a red circle left of a blue square", ""]


def load(path: Path) -> Any:
    return load_model(*resolve_model(None, str(path)))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def there_and_back(path: Path, folder: Path) -> None:
    """Every tensor of the file is there again, bit for bit."""
    config = str(path.with_name("config.yaml"))
    convert(path, folder, config=config)
    convert(folder, folder.with_suffix(".safetensors"))
    want, got = load_file(path), load_file(folder.with_suffix(".safetensors"))
    assert got.keys() - want.keys() <= ADDED and all(torch.equal(value, got[name]) for name, value in want.items())
    assert read_config(resolve_model(None, str(folder))[0])["model"] == read_config(config)["model"]


@torch.no_grad()
@pytest.mark.parametrize(("yaml", "prediction"), [("sd_2_1", "epsilon"), ("sd_2_1_768", "v_prediction")])
def test_stable_diffusion_2_of_generative_models(tmp_path: Path, yaml: str, prediction: str) -> None:
    path, folder = write_zoo_model(tmp_path, f"{SD}{yaml}.yaml"), tmp_path / "folder"
    there_and_back(path, folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline" and pipeline.scheduler.config.prediction_type == prediction
    assert (
        len(
            pipeline.text_encoder.text_model.encoder.layers
            if hasattr(pipeline.text_encoder, "text_model")
            else pipeline.text_encoder.encoder.layers
        )
        == 1
    )
    ours = load(folder)
    assert type(ours).__name__ == "DiffusionEngine" and config_prediction(resolve_model(None, str(folder))[0]) == prediction[0].replace(
        "e", "eps"
    )
    assert identify(folder).anatomy == identify(path).anatomy
    ids = pipeline.tokenizer(WORDS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    context = ours.conditioner({"txt": WORDS})["crossattn"]
    assert relative(context, pipeline.text_encoder(ids).last_hidden_state) < 1e-5
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([3, 700])
    assert relative(ours.model.diffusion_model(x, t, context), pipeline.unet(x, t, context).sample) < 1e-5


@torch.no_grad()
def test_stable_unclip_with_the_clip_of_openai(tmp_path: Path) -> None:
    """Both towers of that CLIP are in the file; diffusers has the image's alone."""
    torch.save((torch.randn(32), torch.rand(32) + 0.5), tmp_path / "stats.th")
    config = read_config(f"{SD}v2-1-stable-unclip-l-inference.yaml")["model"]["params"]
    embedder = {**config["embedder_config"], "params": {"model": {**CLIP, "quick_gelu": True}}}
    noise = {**config["noise_aug_config"], "params": {**config["noise_aug_config"]["params"], "timestep_dim": 32}}
    noise["params"]["clip_stats_path"] = str(tmp_path / "stats.th")
    overrides = {"embedder_config": embedder, "noise_aug_config": noise}
    path, folder = write_zoo_model(tmp_path, f"{SD}v2-1-stable-unclip-l-inference.yaml", overrides=overrides), tmp_path / "folder"
    there_and_back(path, folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(pipeline).__name__ == "StableUnCLIPImg2ImgPipeline"
    ours = load(folder)
    pixels = torch.randn(2, 3, 32, 32)
    assert relative(ours.embedder.model.encode_image(pixels), pipeline.image_encoder(pixels).image_embeds) < 1e-5
    mean, std = torch.load(tmp_path / "stats.th")
    assert torch.equal(pipeline.image_normalizer.mean[0], mean) and torch.equal(pipeline.image_normalizer.std[0], std)
    (tmp_path / "stats.th").unlink()
    (folder / "ldm_rest.safetensors").unlink()  # as a folder that diffusers itself wrote
    alone = load(folder)
    embedding, level, noise_ = torch.randn(2, 32), torch.tensor([5, 800]), torch.randn(2, 32)
    assert (
        relative(alone.noise_augmentor(embedding, level, noise=noise_)[0], ours.noise_augmentor(embedding, level, noise=noise_)[0]) < 1e-5
    )
    assert relative(alone.embedder.model.encode_image(pixels), ours.embedder.model.encode_image(pixels)) < 1e-5


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("text_encoder", "{}", r"settings in .* are damaged \(it lacks 'hidden_size'\)"),
        ("text_encoder", None, "the UNet reads 80 channels of text, and text_encoder_2 give 48"),
        ("unet", '{"block_out_channels": "four"}', "settings in .* are damaged"),
        ("vae", '{"block_out_channels": 3}', "settings in .* are damaged"),
    ],
)
def test_folders_whose_settings_are_damaged_or_parts_left_out(tmp_path: Path, part: str, settings: str | None, message: str) -> None:
    """Of SDXL without its first text encoder there would be left a refiner, and an error only when it draws."""
    source = save(tmp_path / "source", parts("sdxl"))
    if settings is None:
        (source / part).rename(tmp_path / "away")
    else:
        (source / part / "config.json").write_text(settings)
    with pytest.raises(ConfigError, match=message) as error:
        resolve_model(None, str(source))
    assert "\n" not in str(error.value)


def test_another_noise_schedule_of_sdxl_goes_into_the_file(tmp_path: Path) -> None:
    shipped = read_config(f"{SD}sd_xl_base.yaml")
    assert _same_schedule(shipped, shipped)
    levels = {"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps": 1000}
    for name, other in {"": 0, "linear_end": 0.02, "rescale_betas_zero_snr": True}.items():
        params = shipped["model"]["params"]
        denoiser = {**params["denoiser_config"]["params"]}
        denoiser["discretization_config"] = {**denoiser["discretization_config"], "params": {**levels, **({name: other} if name else {})}}
        theirs = {"model": {"params": {**params, "denoiser_config": {**params["denoiser_config"], "params": denoiser}}}}
        assert _same_schedule(shipped, theirs) == (not name)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_features_that_no_pipeline_takes_are_refused(tmp_path: Path, family: str) -> None:
    """A folder would silently draw with other features than the config says."""
    source = save(tmp_path / "source", parts(family))
    config = read_config(resolve_model(None, str(source))[0])
    params = config["model"]["params"]
    if family == "sd1":
        params["cond_stage_config"]["params"] |= {"layer": "hidden", "layer_idx": 1}
    else:
        params["conditioner_config"]["params"]["emb_models"][1]["params"]["layer"] = "last"
    with pytest.raises(ConfigError, match=r"no pipeline with features of the layer (hidden|last): this model stays a single file"):
        write_folder(read_state_dict(source), config, tmp_path / "folder")
    assert not (tmp_path / "folder").exists() and [path.name for path in tmp_path.iterdir()] == ["source"]
