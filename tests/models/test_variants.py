"""The variants of latent diffusion: what a batch becomes, which random numbers are drawn, how a smaller model grows into one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.inference.checkpoint import load_weights
from ldm.models.diffusion import ddpm
from ldm.models.diffusion.variants import to_unit_range
from ldm.modules.freezing import is_frozen
from ldm.util import CheckpointError, ConfigError, instantiate_from_config
from tests.analytic import LATENT_PARAMS, latent_model
from tests.reference_rule import W, fill, philox

KL_CONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "ddconfig": KL_CONFIG, "lossconfig": {"target": "torch.nn.Identity"}},
}
IDENTITY = {"target": "torch.nn.Identity"}
NOISE = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2}, "max_noise_level": 350},
}
EMBEDDING_NOISE = {
    "target": "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation",
    "params": {"timestep_dim": 12, "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}},
}
KEYS = {"first_stage_key": "jpg", "cond_stage_key": "txt"}
CONV = "model.diffusion_model.input_blocks.0.0.weight"
EMA_CONV = "model_ema.diffusion_modelinput_blocks00weight"
JPG, TXT = philox(0, (2, 16, 16, 3), 0.5), philox(4, (2, 3, 4))
MASK = (philox(2, (2, 16, 16, 1)) > 0).float()
SMALL = philox(1, (2, 8, 8, 3), 0.5)


def variant(name: str, **changes: Any) -> Any:
    """One of the variants around the analytic network, its conditioning handed through as it is."""
    return fill(getattr(ddpm, name)(**(LATENT_PARAMS | KEYS | {"first_stage_config": KL} | changes)))


def inpainting(**changes: Any) -> ddpm.LatentInpaintDiffusion:
    return variant("LatentInpaintDiffusion", **({"conditioning_key": "hybrid", "finetune_keys": None} | changes))


def depth(**changes: Any) -> ddpm.LatentDepth2ImageDiffusion:
    return variant(
        "LatentDepth2ImageDiffusion",
        **({"conditioning_key": "hybrid", "finetune_keys": None, "depth_stage_config": IDENTITY} | changes),
    )


def upscaler(**changes: Any) -> ddpm.LatentUpscaleDiffusion:
    return variant(
        "LatentUpscaleDiffusion", **({"conditioning_key": "hybrid-adm", "low_scale_config": NOISE, "low_scale_key": "lr"} | changes)
    )


def unclip(**changes: Any) -> ddpm.ImageEmbeddingConditionedLatentDiffusion:
    options = {
        "conditioning_key": "crossattn-adm",
        "embedder_config": {"target": "torch.nn.Flatten"},
        "noise_aug_config": EMBEDDING_NOISE,
        "embedding_dropout": 0.25,
        "embedding_key": "small",
    }
    return variant("ImageEmbeddingConditionedLatentDiffusion", **(options | changes))


MODELS = {"inpainting": inpainting, "depth": depth, "upscaler": upscaler, "unclip": unclip}
BATCH = {
    "jpg": JPG,
    "txt": TXT,
    "masked_image": JPG * (1 - MASK),
    "mask": MASK,
    "midas_in": philox(3, (2, 1, 12, 12)),
    "lr": SMALL,
    "small": philox(5, (2, 2, 2, 3), 0.5),
}


def chw(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


# -- from batch to conditioning ----------------------------------------------------------------------------------------
@torch.no_grad()
def test_inpainting_reference_numbers(reference):
    ref = reference("c20_inpaint_get_input")
    model = inpainting()
    batch = {"jpg": ref.input("jpg"), "mask": ref.input("mask"), "masked_image": ref.input("masked"), "txt": ref.input("txt")}
    torch.manual_seed(27)
    z, c = model.get_input(batch, "jpg", bs=2)
    ref.check_all(dict(z=z, concat=c["c_concat"][0], cross=c["c_crossattn"][0], keys=sorted(c)))


@torch.no_grad()
def test_upscaler_draws_latent_then_level_then_noise():
    model = upscaler()
    torch.manual_seed(28)
    z, c = model.get_input(BATCH, "jpg", bs=2)
    torch.manual_seed(28)
    expected_z = 0.18215 * model.encode_first_stage(chw(JPG)).sample()
    level = torch.randint(0, 350, (2,))
    noise = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(z, expected_z)
    assert torch.equal(c["c_adm"], level) and torch.equal(c["c_crossattn"][0], TXT)
    assert torch.equal(c["c_concat"][0], model.low_scale_model.q_sample(chw(SMALL), level, noise))


def test_upscaler_takes_levels_from_the_batch():
    model = upscaler(noise_level_key="level")
    c = model.get_input(BATCH | {"level": torch.tensor([3, 20])}, "jpg", bs=1)[1]
    assert c["c_adm"].tolist() == [3]


def test_upscaler_in_log_mode_shows_what_the_network_sees():
    torch.manual_seed(0)
    out = upscaler().get_input(BATCH, "jpg", bs=1, log_mode=True)
    z, c, image, reconstruction, raw, small, seen, level = out
    assert z.shape == (1, 4, 8, 8) and image.shape == reconstruction.shape == (1, 3, 16, 16) and torch.equal(raw, TXT)
    assert torch.equal(small, chw(SMALL)[:1]) and seen is c["c_concat"][0] and level is c["c_adm"]


@torch.no_grad()
def test_depth_is_resized_then_brought_to_the_unit_range():
    c = depth().get_input(BATCH, "jpg")[1]
    x = F.interpolate(BATCH["midas_in"], size=(8, 8), mode="bicubic", align_corners=False)
    low, high = x.flatten(1).min(1).values.view(-1, 1, 1, 1), x.flatten(1).max(1).values.view(-1, 1, 1, 1)
    torch.testing.assert_close(c["c_concat"][0], 2 * (x - low) / (high - low + 0.001) - 1)
    assert torch.equal(to_unit_range(torch.full((1, 1, 2, 2), 7.0)), torch.full((1, 1, 2, 2), -1.0))


def test_unclip_noises_the_embedding_and_drops_some_while_training():
    model = unclip()
    torch.manual_seed(29)
    c = model.get_input(BATCH, "jpg", bs=2)[1]
    torch.manual_seed(29)
    model.encode_first_stage(chw(JPG)).sample()
    embedding = chw(BATCH["small"]).flatten(1)
    level = torch.randint(0, 1000, (2,))
    expected = torch.cat(model.noise_augmentor(embedding, noise_level=level), dim=1)  # draws the noise
    assert torch.equal(c["c_adm"], expected) and c["c_adm"].shape == (2, 24) and set(c) == {"c_crossattn", "c_adm"}
    model.train()
    torch.manual_seed(29)
    dropped = model.get_input(BATCH, "jpg", bs=2)[1]["c_adm"]
    torch.manual_seed(29)
    model.get_input(BATCH, "jpg", bs=2)
    torch.manual_seed(29)
    model.encode_first_stage(chw(JPG)).sample()
    torch.randint(0, 1000, (2,)), torch.randn(2, 12)
    keep = torch.bernoulli(0.75 * torch.ones(2)[:, None])
    assert torch.equal(dropped, keep * expected)


def test_unclip_drops_its_share():
    model = unclip(first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"}, noise_aug_config=None).train()
    n = 2000
    batch = {"jpg": torch.zeros(n, 1, 1, 4), "txt": torch.zeros(n, 1, 4), "small": torch.ones(n, 1, 1, 3)}
    torch.manual_seed(0)
    kept = model.get_input(batch, "jpg")[1]["c_adm"]
    assert set(kept.unique().tolist()) == {0.0, 1.0} and abs(kept[:, 0].mean() - 0.75) < 0.04


def test_patches_of_a_large_image_become_channels():
    model = variant(
        "LatentUpscaleFinetuneDiffusion", conditioning_key="hybrid-adm", finetune_keys=None, reshuffle_patch_size=2, concat_keys=["lr"]
    )
    c = model.get_input(BATCH | {"lr": JPG}, "jpg")[1]
    assert set(c) == {"c_concat", "c_crossattn"} and c["c_concat"][0].shape == (2, 12, 8, 8)
    top_left, top_right = c["c_concat"][0][:, :3], c["c_concat"][0][:, 3:6]
    assert torch.equal(top_left, chw(JPG)[:, :, :8, :8]) and torch.equal(top_right, chw(JPG)[:, :, :8, 8:])


def test_growing_upscaler_may_noise_its_image():
    options = {"low_scale_config": NOISE, "low_scale_key": "lr", "finetune_keys": None, "conditioning_key": "hybrid-adm"}
    c = variant("LatentUpscaleFinetuneDiffusion", **options).get_input(BATCH, "jpg", bs=1)[1]
    assert c["c_adm"].shape == (1,) and c["c_concat"][0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize("name", MODELS)
def test_batches_are_cut_and_cached_latents_used(name):
    model = MODELS[name]()
    z = torch.zeros(2, 4, 8, 8)
    given = BATCH | {"z": z}
    got, c = model.get_input({k: v for k, v in given.items() if k != "jpg"}, "jpg", bs=1)
    assert got.shape == (1, 4, 8, 8)
    assert all(len(v[0] if isinstance(v, list) else v) == 1 for v in c.values())


@pytest.mark.parametrize("name", MODELS)
def test_training_step_and_pictures(name):
    model = MODELS[name]().train()
    loss, parts = model.shared_step(BATCH)
    assert torch.isfinite(loss) and "train/loss_simple" in parts
    assert all(is_frozen(getattr(model, s)) for s in model._stage_configs)
    model.eval()
    empty = {"unconditional_guidance_scale": 3.0, "unconditional_guidance_label": torch.zeros(1, 3, 4)}
    pictures = model.log_images(BATCH, N=2, n_row=1, ddim_steps=2, plot_diffusion_rows=False, **empty)
    own = {"inpainting": {"masked_image"}, "depth": {"depth"}, "upscaler": {"x_lr"}, "unclip": set()}[name]
    assert {"inputs", "reconstruction", "samples", "samples_cfg_scale_3.00"} | own <= set(pictures)
    assert all(torch.isfinite(picture).all() for picture in pictures.values())


def test_further_latent_channels_are_decoded_for_the_log():
    model = inpainting(c_concat_log_start=1, c_concat_log_end=5)
    pictures = model.log_images(BATCH, N=1, n_row=1, sample=False, plot_diffusion_rows=False)
    assert pictures["c_concat_decoded"].shape == (1, 3, 16, 16)


def test_guidance_leaves_the_other_conditions_alone():
    """The unconditional half lacks the text and keeps mask and image: so guidance with the same text changes nothing."""
    model = inpainting()
    c = model.get_input(BATCH, "jpg")[1]
    samples = []
    for options in ({}, {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": TXT}):
        torch.manual_seed(1)
        samples.append(model.sample_log(c, 2, ddim=True, ddim_steps=3, **options)[0])
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-5)


# -- growing out of a smaller model ------------------------------------------------------------------------------------
def unet(channels: int) -> dict[str, Any]:
    params = {"image_size": 8, "in_channels": channels, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1}
    params |= {"attention_resolutions": [1], "channel_mult": [1], "num_heads": 4, "legacy": False}
    params |= {"use_spatial_transformer": True, "context_dim": 4}
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def base_file(path: Path, average: float | None = None) -> Path:
    """Weights of a text-to-image model with 4 input channels; averages are the weights plus `average`."""
    state = fill(latent_model(unet_config=unet(4), first_stage_config=KL, **KEYS)).state_dict()
    if average is not None:
        weights = {k: v for k, v in state.items() if k.startswith("model.diffusion_model.")}
        state |= {"model_ema." + k.removeprefix("model.").replace(".", ""): v + average for k, v in weights.items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(10)}
    torch.save({"state_dict": state}, path)
    return path


def grown(path: Path, **changes: Any) -> Any:
    """An inpainting model that starts from `path`."""
    options = {"conditioning_key": "hybrid", "unet_config": unet(9), "first_stage_config": KL, "ckpt_path": str(path)}
    return ddpm.LatentInpaintDiffusion(**(LATENT_PARAMS | KEYS | options | changes))


def expected_conv(average: float = 0.0) -> Tensor:
    conv = torch.zeros(32, 9, 3, 3)
    conv[:, :4] = torch.from_numpy(W(CONV, (32, 4, 3, 3))) + average
    return conv


def test_new_input_channels_start_at_zero(tmp_path: Path):
    path = base_file(tmp_path / "base.ckpt")
    model = grown(path)
    assert torch.equal(model.state_dict()[CONV], expected_conv())
    out = "model.diffusion_model.out.2.weight"
    assert torch.equal(model.state_dict()[out], torch.from_numpy(W(out, (4, 32, 3, 3))))
    base = latent_model(unet_config=unet(4), first_stage_config=KL, **KEYS)
    load_weights(base, path)
    x, t = philox(0, (2, 4, 8, 8)), torch.tensor([10, 700])
    with torch.no_grad():  # so at first the new model does what the old one did
        new = model.eval().apply_model(x, t, {"c_concat": [philox(1, (2, 5, 8, 8))], "c_crossattn": [TXT]})
        torch.testing.assert_close(new, base.eval().apply_model(x, t, TXT))


@pytest.mark.parametrize(
    ("average", "use_ema", "weight", "shadow"),
    [(None, True, 0.0, 0.0), (1.0, False, 1.0, None), (1.0, True, 0.0, 1.0)],
    ids=["average starts from the weight", "average becomes the weight", "both"],
)
def test_averages_grow_along(tmp_path: Path, average, use_ema, weight, shadow):
    state = grown(base_file(tmp_path / "base.ckpt", average), use_ema=use_ema).state_dict()
    assert torch.equal(state[CONV], expected_conv(weight))
    assert (EMA_CONV in state) == (shadow is not None)
    if shadow is not None:
        assert torch.equal(state[EMA_CONV], expected_conv(shadow))


def test_weights_that_have_grown_already_are_taken_whole(tmp_path: Path):
    model = fill(grown(base_file(tmp_path / "base.ckpt")))
    torch.save(model.state_dict(), tmp_path / "grown.ckpt")
    assert torch.equal(grown(tmp_path / "grown.ckpt").state_dict()[CONV], model.state_dict()[CONV])


def test_only_the_network_may_be_loaded(tmp_path: Path):
    state = fill(latent_model(unet_config=unet(4))).model.state_dict()
    torch.save(state, tmp_path / "unet.ckpt")
    model = grown(tmp_path / "unet.ckpt", load_only_unet=True)
    trained = torch.from_numpy(W(CONV, (32, 4, 3, 3)))
    assert torch.equal(model.state_dict()[CONV][:, :4], trained) and not model.state_dict()[CONV][:, 4:].any()


def test_what_cannot_grow_is_refused(tmp_path: Path):
    path = base_file(tmp_path / "base.ckpt")
    with pytest.raises(CheckpointError, match="keep_finetune_dims"):
        grown(path, keep_finetune_dims=3)
    with pytest.raises(CheckpointError, match="other shapes"):
        grown(path, finetune_keys=None)
    state = torch.load(path)["state_dict"]
    del state[CONV]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="lacks"):
        grown(path)


class DepthNet(nn.Conv2d):
    """Stands for a depth model with weights."""

    def __init__(self) -> None:
        super().__init__(3, 1, 1)


def test_a_stage_that_the_file_does_not_have_stays_and_is_named(tmp_path: Path, caplog):
    path = base_file(tmp_path / "base.ckpt")
    options = LATENT_PARAMS | KEYS | {"conditioning_key": "hybrid", "unet_config": unet(5), "first_stage_config": KL}
    options |= {"depth_stage_config": {"target": f"{__name__}.DepthNet"}, "ckpt_path": str(path)}
    with caplog.at_level(logging.WARNING):
        model = ddpm.LatentDepth2ImageDiffusion(**options)
    assert "has no depth_model" in caplog.text
    fill(model)
    torch.save(model.state_dict(), path)
    again = ddpm.LatentDepth2ImageDiffusion(**options)
    assert torch.equal(again.depth_model.weight, model.depth_model.weight)
    state = model.state_dict()
    del state["depth_model.bias"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"only a part of depth_model.*depth_model\.bias"):
        ddpm.LatentDepth2ImageDiffusion(**options)


# -- training, names, refusals -----------------------------------------------------------------------------------------
def test_stages_are_not_trained_unless_asked():
    embedder = {"embedder_config": {"target": f"{__name__}.Embedder"}, "noise_aug_config": None}
    frozen, trained = unclip(**embedder), unclip(freeze_embedder=False, **embedder)
    assert frozen.trainable_parameters() == []  # the analytic network has no weights
    assert len(trained.trainable_parameters()) == 2
    trained.shared_step(BATCH)[0].backward()
    assert trained.embedder.weight.grad is not None


class Embedder(nn.Linear):
    """Image (B, 3, 2, 2) -> (B, 12)."""

    def __init__(self) -> None:
        super().__init__(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def test_stage_names_in_the_state_dict():
    names = upscaler().state_dict().keys()
    assert {"low_scale_model.betas", "low_scale_model.sqrt_recipm1_alphas_cumprod"} <= names
    assert "noise_augmentor.alphas_cumprod_prev" in unclip().state_dict()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: inpainting(masked_image_key="other"), "masked_image_key"),
        (lambda: depth(concat_keys=["a", "b"]), "one input"),
        (lambda: variant("LatentUpscaleFinetuneDiffusion", concat_keys=["a", "b"]), "one small image"),
        (lambda: variant("LatentUpscaleFinetuneDiffusion", low_scale_config=NOISE), "low_scale_key"),
        (lambda: unclip(embedding_dropout=1.5), "between 0 and 1"),
        (lambda: upscaler(cond_stage_trainable=True), "cond_stage_trainable: false"),
        (lambda: inpainting().get_input({"jpg": JPG, "txt": TXT}, "jpg"), "no 'mask'"),
        (lambda: depth().get_input({"jpg": JPG, "txt": TXT}, "jpg"), "no 'midas_in'"),
        (lambda: upscaler(noise_level_key="level").get_input(BATCH, "jpg"), "no 'level'"),
    ],
)
def test_wrong_options_are_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_built_from_a_config_by_its_public_name():
    config = {"target": "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion"}
    params = LATENT_PARAMS | KEYS | {"conditioning_key": "hybrid-adm", "low_scale_config": NOISE, "low_scale_key": "lr"}
    with torch.device("meta"):
        model = instantiate_from_config(config | {"params": params})
    assert not model.low_scale_model.betas.is_meta and model.low_scale_key == "lr"
