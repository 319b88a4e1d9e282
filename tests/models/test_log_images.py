"""The pictures that a diffusion model shows of itself while it is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.util import ConfigError
from tests.analytic import latent_model
from tests.models.latent_stubs import CAPTIONS, TEXT, TRAINED_TEXT, UNET, VQ, batch, model_of
from tests.reference_rule import fill


def picture_model(**changes: Any) -> LatentDiffusion:
    return model_of(timesteps=10, log_every_t=5, **changes)


def test_log_images():
    pictures = picture_model().log_images(
        batch(),
        N=2,
        n_row=1,
        ddim_steps=2,
        inpaint=True,
        plot_denoise_rows=True,
        plot_progressive_rows=True,
        unconditional_guidance_scale=2.0,
    )
    whole = {"inputs", "reconstruction", "conditioning", "samples", "samples_cfg_scale_2.00", "samples_inpainting"}
    rows = {"diffusion_row", "denoise_row", "progressive_row"}
    assert set(pictures) == whole | rows | {"mask"}
    for name in whole:
        assert pictures[name].shape == (2, 3, 16, 16) and torch.isfinite(pictures[name]).all(), name
    for name in ("inputs", "conditioning"):
        assert pictures[name].min() >= -1 and pictures[name].max() <= 1, name
    for name in rows:
        assert pictures[name].ndim == 3 and pictures[name].shape[0] == 3, name
    assert pictures["mask"].unique().tolist() == [0, 1] and pictures["mask"].shape == (2, 1, 8, 8)


@torch.no_grad()
def test_log_images_draws_with_the_averages(monkeypatch):
    model = picture_model(use_ema=True, ema_cond_stage=True, unet_config=UNET, **TRAINED_TEXT).eval()
    out = model.model.diffusion_model.out[2]
    model.model_ema.get_buffer("diffusion_modelout2bias").fill_(5)
    model.cond_stage_ema.bias.fill_(7)
    seen: list[tuple[Tensor, Tensor]] = []
    draw = model.sample_log
    monkeypatch.setattr(model, "sample_log", lambda c, *args, **options: (seen.append((c, out.bias.clone())), draw(c, *args, **options))[1])
    for averaged in (True, False):
        model.log_images(batch(), N=2, ddim_steps=1, plot_diffusion_rows=False, use_ema_scope=averaged)
    (c, bias), (own_c, own_bias) = seen
    assert torch.equal(own_c, model.cond_stage_model.encode(CAPTIONS[:2])) and torch.equal(own_bias, out.bias)
    assert (bias == 5).all() and (c[1] == 7).all() and c.shape == own_c.shape  # the second caption is empty


def test_log_images_options():
    model = picture_model(use_ema=True, ema_cond_stage=True, unet_config=UNET, **TRAINED_TEXT)
    few = model.log_images(batch(), ddim_steps=None, plot_diffusion_rows=False, split="train")
    assert set(few) == {"inputs", "reconstruction", "conditioning", "samples"} and few["samples"].shape == (3, 3, 16, 16)
    assert set(model.log_images(batch(), sample=False)) == {"inputs", "reconstruction", "conditioning", "diffusion_row"}
    assert set(model.log_images(batch(), ddim_steps=1, return_keys=["samples", "inputs"])) == {"inputs", "samples"}
    cached = {"z": torch.zeros(2, 4, 8, 8), "caption": ["a", "b"]}
    assert set(model.log_images(cached, ddim_steps=1, plot_diffusion_rows=False)) == {"reconstruction", "conditioning", "samples"}
    with pytest.raises(ConfigError, match=r"does not know ddim_stpes; it takes .*ddim_steps"):
        model.log_images(batch(), ddim_stpes=3)
    with pytest.raises(ConfigError, match="guided samples need DDIM"):
        model.log_images(batch(), ddim_steps=None, unconditional_guidance_scale=3.0)


@pytest.mark.parametrize("ddim_steps", [2, None])
def test_quantised_samples_are_shown_where_there_is_a_codebook(ddim_steps):
    options = {"N": 2, "ddim_steps": ddim_steps, "plot_diffusion_rows": False}
    shown = fill(latent_model(first_stage_config=VQ, timesteps=3, **TEXT)).log_images(batch(), **options)
    assert shown["samples_x0_quantized"].shape == shown["samples"].shape == (2, 3, 16, 16)
    pixels = latent_model(first_stage_config="__is_first_stage__", timesteps=3, **TEXT)
    assert "samples_x0_quantized" not in pixels.log_images({"image": torch.zeros(2, 8, 8, 4), "caption": ["a", "b"]}, **options)


def test_pixel_model_log_images():
    model = DDPM({"target": "tests.analytic.AnalyticEps", "params": {"channels": 3}}, timesteps=3, image_size=(8, 12), use_ema=False)
    images = {"image": torch.zeros(2, 8, 12, 3)}
    pictures = model.log_images(images, N=2)
    assert pictures["inputs"].shape == pictures["samples"].shape == (2, 3, 8, 12)
    assert pictures["diffusion_row"].ndim == pictures["denoise_row"].ndim == 3
    assert set(model.log_images(images, return_keys=["samples"])) == {"samples"}
    assert set(model.log_images(images, sample=False)) == {"inputs", "diffusion_row"}
    with pytest.raises(ConfigError, match="ddim_steps"):
        model.log_images(images, ddim_steps=3)


def test_log_images_of_another_size_than_the_models():
    pictures = picture_model().log_images(
        {"image": torch.rand(2, 16, 24, 3), "caption": ["a", "b"]}, ddim_steps=2, plot_diffusion_rows=False
    )
    assert pictures["samples"].shape == pictures["inputs"].shape
