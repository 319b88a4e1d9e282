"""LatentDiffusion around its network: batches, cached latents, conditioning, what is trained and what is not, pictures, errors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ldm.data.shapes import ShapesDataset
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion.ddpm import DDPM, DiffusionWrapper, LatentDiffusion
from ldm.modules.diffusionmodules.parameterization import loss_weight
from ldm.util import CheckpointError, ConfigError, UserError
from tests.analytic import LATENT_PARAMS, latent_model
from tests.reference_rule import fill, philox

TEXT = {"cond_stage_config": {"target": "tests.analytic.LengthEncoder"}}
TRAINED_TEXT = TEXT | {"cond_stage_trainable": True}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 16,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 8,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
            "num_groups": 4,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {**KL["params"], "n_embed": 16, "ddconfig": {**KL["params"]["ddconfig"], "double_z": False}},
}
UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "context_dim": 4,
        "legacy": False,
    },
}
CAPTIONS = ["a red circle", "", "two"]


def batch(n: int = 3, size: int = 16) -> dict[str, Any]:
    return {"image": philox(0, (n, size, size, 3), 0.5).clamp(-1, 1), "caption": CAPTIONS[:n]}


def model_of(**changes: Any) -> LatentDiffusion:
    return fill(latent_model(first_stage_config=KL, **(TEXT | changes)))


# -- from batch to latent and condition --------------------------------------------------------------------------------


def test_cached_latents_are_the_encoded_image():
    model, given = model_of(), batch()
    mode = model.encode_first_stage(given["image"].movedim(-1, 1)).mode()
    z, c, image, seen, raw = model.get_input(
        {"z": mode, "caption": given["caption"]}, "image", return_first_stage_outputs=True, return_original_cond=True
    )
    assert torch.equal(z, 0.18215 * mode) and image is None and raw == given["caption"]
    torch.testing.assert_close(seen, model.first_stage_model.decode(mode))
    assert torch.equal(c, model.get_input(given, "image")[1])
    drawn = model.get_input(given, "image")[0]  # from an image the posterior is sampled: it scatters about the mode
    std = model.encode_first_stage(given["image"].movedim(-1, 1)).std
    assert ((drawn - z).abs() / 0.18215 <= 6 * std).all()
    torch.manual_seed(3)
    loss, _ = model.shared_step({"z": mode, "caption": given["caption"]})
    torch.manual_seed(3)
    assert torch.equal(loss, model(z, c)[0])


def test_cached_embeddings_stand_for_the_captions_and_are_dropped_with_them():
    model = model_of(**TEXT, ucg_training={"caption": {"p": 0.5, "val": ""}})
    items = {"image": batch(8)["image"], "caption": [f"a ring and {i} stars" for i in range(8)]}
    expected = model.get_learned_conditioning(items["caption"])
    given = {"z": torch.zeros(8, *model.get_input(items, "image")[0].shape[1:]), "caption": list(items["caption"]), "c": expected.clone()}
    assert torch.equal(model.get_input(given, "image")[1], expected)
    given["c"] += 1  # the embeddings count, not the captions
    assert torch.equal(model.get_input(given, "image", bs=3)[1], expected[:3] + 1)
    np.random.seed(0)
    model._drop_conditioning(given)
    dropped = torch.tensor([caption == "" for caption in given["caption"]])
    assert 0 < int(dropped.sum()) < 8
    assert torch.equal(given["c"][~dropped], expected[~dropped] + 1)
    assert all(torch.equal(c, model.get_learned_conditioning([""])[0]) for c in given["c"][dropped])
    with pytest.raises(ConfigError, match="cond_stage_trainable"):
        model_of(**TRAINED_TEXT).get_input(given, "image")


def test_get_input_cuts_the_batch():
    model, given = model_of(), batch()
    z, c, image, raw = model.get_input(given, "image", bs=2, return_x=True, return_original_cond=True)
    assert z.shape == (2, 4, 8, 8) and c.shape == (2, 1, 4) and image.shape == (2, 3, 16, 16) and raw == CAPTIONS
    z, c = model.get_input({"z": torch.zeros(3, 4, 8, 8), "caption": CAPTIONS}, "image", bs=2)
    assert z.shape == (2, 4, 8, 8) and c.shape == (2, 1, 4)


def test_condition_may_be_another_image_or_the_image_itself():
    identity = {"cond_stage_config": {"target": "torch.nn.Identity"}, "conditioning_key": "concat"}
    other = latent_model(cond_stage_key="mask", **identity)
    z, c = other.get_input({"image": torch.zeros(2, 8, 8, 4), "mask": torch.ones(2, 8, 8)}, "image")
    assert c.shape == (2, 1, 8, 8) and other.apply_model(z, torch.tensor([0, 1]), c).shape == z.shape
    same = fill(
        latent_model(cond_stage_key="image", first_stage_config=KL, cond_stage_config="__is_first_stage__", conditioning_key="concat")
    )
    assert same.cond_stage_model is same.first_stage_model
    c = same.get_input(batch(), "image")[1]
    torch.testing.assert_close(c, same.encode_first_stage(batch()["image"].movedim(-1, 1)).mode())


def test_unconditional_model_needs_no_condition():
    model = latent_model(cond_stage_config="__is_unconditional__", conditioning_key=None)
    assert model.cond_stage_model is None and model.model.conditioning_key is None
    z, c = model.get_input({"image": torch.zeros(2, 8, 8, 4)}, "image")
    assert c is None and torch.isfinite(model(z, c)[0])
    assert model.sample_log(None, 2, ddim=True, ddim_steps=2)[0].shape == (2, 4, 8, 8)
    with pytest.raises(ConfigError, match="no cond stage"):
        model.get_learned_conditioning([""])


def test_null_conditioning_leaves_the_condition_out_of_the_batch():
    model = model_of(force_null_conditioning=True)
    assert model.model.conditioning_key == "crossattn" and model.get_input({"image": batch()["image"]}, "image")[1] is None


def test_first_stage_may_be_the_identity():
    model = latent_model(first_stage_config="__is_first_stage__", scale_factor=2.0)
    assert isinstance(model.first_stage_model, IdentityFirstStage)
    x = philox(0, (2, 4, 8, 8))
    assert torch.equal(model.decode_first_stage(model.get_first_stage_encoding(model.encode_first_stage(x))), x)


def test_vq_decode_from_indices():
    model = fill(latent_model(first_stage_config=VQ, scale_factor=1.0))
    logits = philox(0, (1, 16, 8, 8))
    codes = model.first_stage_model.quantize.embedding.weight[logits.argmax(1)].permute(0, 3, 1, 2)
    torch.testing.assert_close(
        model.decode_first_stage(logits, predict_cids=True), model.first_stage_model.decode(codes, force_not_quantize=True)
    )


# -- dropout of the condition ------------------------------------------------------------------------------------------


def test_conditioning_dropout():
    captions = [f"caption {i}" for i in range(4000)]
    model = latent_model(ucg_training={"caption": {"p": 0.1, "val": ""}})
    np.random.seed(0)
    given = {"caption": list(captions)}
    model._drop_conditioning(given)
    dropped = [i for i, text in enumerate(given["caption"]) if text == ""]
    assert abs(len(dropped) / 4000 - 0.1) < 4 * math.sqrt(0.1 * 0.9 / 4000)
    assert all(given["caption"][i] == captions[i] for i in set(range(4000)) - set(dropped))
    for p, rest in ((0.0, captions), (1.0, ["nothing"] * 4000)):
        model = latent_model(ucg_training={"caption": {"p": p, "val": "nothing"}})
        given = {"caption": list(captions)}
        model._drop_conditioning(given)
        assert given["caption"] == rest


def test_dropout_of_labels_and_a_key_that_is_not_there():
    model = latent_model(ucg_training={"class_label": {"p": 1.0, "val": 9}})
    given = {"class_label": torch.arange(4)}
    model._drop_conditioning(given)
    assert given["class_label"].tolist() == [9] * 4
    with pytest.raises(ConfigError, match="ucg_training names 'class_label', and the batch has caption, image"):
        model._drop_conditioning(batch())


@pytest.mark.parametrize("rule", [0.1, {"val": ""}, {"p": 1.5}, {"p": 0.1, "value": ""}])
def test_wrong_dropout_is_told_when_the_model_is_built(rule):
    with pytest.raises(ConfigError, match=r"ucg_training.caption is .*: give \{p: share"):
        latent_model(ucg_training={"caption": rule})


def test_dropout_of_numbers_needs_a_number():
    model = latent_model(ucg_training={"class_label": {"p": 0.5}})
    with pytest.raises(ConfigError, match=r"ucg_training\.class_label has no val"):
        model._drop_conditioning({"class_label": torch.arange(4)})


def test_conditioning_is_dropped_in_training_only():
    model = model_of(ucg_training={"caption": {"p": 1.0, "val": ""}})
    model.log_dict = lambda *args, **kwargs: None  # no trainer
    seen: list[Any] = []
    encode = model.cond_stage_model.encode
    model.cond_stage_model.encode = lambda texts: (seen.append(list(texts)), encode(texts))[1]
    model.validation_step(batch(), 0)
    model.training_step(batch(), 0)
    assert seen == [CAPTIONS, CAPTIONS, ["", "", ""]]  # with and without EMA, then training


# -- what is trained ---------------------------------------------------------------------------------------------------


def optimised(model: LatentDiffusion) -> set[int]:
    optimizer = model.configure_optimizers()
    optimizer = optimizer[0][0] if isinstance(optimizer, tuple) else optimizer
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_a_trainable_cond_stage_is_optimised_and_gets_gradients():
    model = model_of(unet_config=UNET, **TRAINED_TEXT)
    stage = list(model.cond_stage_model.parameters())
    assert optimised(model) == {id(p) for p in [*model.model.parameters(), *stage]}
    loss, _ = model.train().shared_step(batch())
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in stage)
    assert all(p.grad is None for p in model.first_stage_model.parameters())


def test_frozen_stages_stay_frozen_and_in_eval_mode():
    model = model_of(unet_config=UNET).train()
    assert model.training and model.model.training
    for stage in (model.first_stage_model, model.cond_stage_model):
        assert not any(m.training for m in stage.modules()) and not any(p.requires_grad for p in stage.parameters())
    assert optimised(model) == {id(p) for p in model.model.parameters()}
    c = model.get_input(batch(), "image")[1]
    assert torch.equal(c, model.get_input(batch(), "image")[1]) and not c.requires_grad  # no dropout
    assert model_of(**TRAINED_TEXT).train().cond_stage_model.dropout.training


def test_training_a_frozen_cond_stage_is_refused():
    stage = {"target": "tests.analytic.LengthEncoder", "params": {"frozen": True}}
    with pytest.raises(ConfigError, match="freeze: false"):
        model_of(cond_stage_config=stage, cond_stage_trainable=True).configure_optimizers()
    with pytest.raises(ConfigError, match="__is_first_stage__ cannot be trained"):
        model_of(cond_stage_config="__is_first_stage__", cond_stage_trainable=True)


def test_ema_of_the_cond_stage(tmp_path):
    model = model_of(use_ema=True, ema_cond_stage=True, ema_decay=0.5, unet_config=UNET, **TRAINED_TEXT).train()
    names = {n for n in model.state_dict() if n.startswith("cond_stage_ema.")}
    assert names == {"cond_stage_ema." + n for n in ("scale", "bias", "decay", "num_updates")}
    model.cond_stage_ema.reset_num_updates()
    start = model.cond_stage_ema.scale.clone()
    with torch.no_grad():
        model.cond_stage_model.scale += 1
    trained = model.cond_stage_model.scale.detach().clone()
    model.on_train_batch_end()
    with model.ema_scope():
        torch.testing.assert_close(model.cond_stage_model.scale.detach(), start + (trained - start) * 9 / 11)  # decay 2 / 11
    assert torch.equal(model.cond_stage_model.scale, trained)

    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.ckpt")
    options = dict(use_ema=True, ema_cond_stage=True, unet_config=UNET, first_stage_config=KL, ckpt_path=str(tmp_path / "model.ckpt"))
    kept = latent_model(**options, **TRAINED_TEXT)
    assert torch.equal(kept.cond_stage_ema.scale, model.cond_stage_ema.scale) and int(kept.cond_stage_ema.num_updates) == 1
    anew = latent_model(reset_num_ema_updates=True, **options, **TRAINED_TEXT)
    assert int(kept.model_ema.num_updates) == 1 and int(anew.model_ema.num_updates) == int(anew.cond_stage_ema.num_updates) == 0
    reset = latent_model(reset_ema=True, **options, **TRAINED_TEXT)
    assert torch.equal(reset.cond_stage_ema.scale, trained) and int(reset.model_ema.num_updates) == 0
    weight = "diffusion_model.time_embed.0.weight"
    assert torch.equal(reset.model_ema.get_buffer(weight.replace(".", "")), model.model.get_parameter(weight))


def test_validation_with_and_without_the_average():
    model = model_of(use_ema=True, unet_config=UNET).eval()
    for name, shadow in model.model_ema.named_buffers():
        if name == "diffusion_modelout2bias":
            shadow.add_(10.0)  # far off, so that it shows
    logged: dict[str, Tensor] = {}
    model.log_dict = lambda parts, **kwargs: logged.update(parts)
    model.validation_step(batch(), 0)
    assert set(logged) == {f"val/{name}{end}" for name in ("loss", "loss_simple", "loss_vlb") for end in ("", "_ema")}
    assert logged["val/loss_simple_ema"] > 50 > logged["val/loss_simple"]


@pytest.mark.parametrize("changes", [TEXT | {"use_ema": True}, TRAINED_TEXT])
def test_ema_of_the_cond_stage_needs_something_to_average(changes):
    with pytest.raises(ConfigError, match="ema_cond_stage needs"):
        model_of(ema_cond_stage=True, **changes)


def test_optimizer_schedule_and_learn_logvar():
    schedule = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {"warm_up_steps": [10], "cycle_lengths": [1000], "f_start": [0.1], "f_max": [1.0], "f_min": [1.0]},
    }
    model = model_of(unet_config=UNET, learn_logvar=True, scheduler_config=schedule)
    model.learning_rate = 0.5
    (optimizer,), (plan,) = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW) and id(model.logvar) in optimised(model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05) and plan["interval"] == "step"
    for params, lr in (({"weight_decay": 0.3}, 0.5), ({"lr": 0.2}, 0.2)):
        model = model_of(unet_config=UNET, optimizer_config={"target": "torch.optim.SGD", "params": params})
        model.learning_rate = 0.5
        group = model.configure_optimizers().param_groups[0]
        assert group["lr"] == lr and group["weight_decay"] == params.get("weight_decay", 0)


# -- the empty condition -----------------------------------------------------------------------------------------------


class TwoPart(nn.Module):
    def encode(self, texts: list[str]) -> list[Tensor]:
        return [torch.full((len(texts), 2, 4), float(len(texts[0]))), torch.zeros(len(texts), 1, 4)]


def test_unconditional_conditioning_formats():
    model = model_of()
    empty = model.cond_stage_model.bias
    for key in ("caption", "txt"):
        model.cond_stage_key = key
        assert torch.equal(model.get_unconditional_conditioning(3), empty.expand(3, 1, 4))
    blurry = (6 * model.cond_stage_model.scale + empty).expand(2, 1, 4)
    for label in ("blurry", ["blurry"]):
        torch.testing.assert_close(model.get_unconditional_conditioning(2, label), blurry)
    assert torch.equal(model.get_unconditional_conditioning(2, torch.ones(1, 5, 4)), torch.ones(2, 5, 4))
    for key in ("image", "coordinates_bbox"):
        model.cond_stage_key = key
        with pytest.raises(ConfigError, match="null_label"):
            model.get_unconditional_conditioning(1)
    parts = model_of(cond_stage_config={"target": f"{__name__}.TwoPart"}).get_unconditional_conditioning(3)
    assert [p.shape for p in parts] == [(3, 2, 4), (3, 1, 4)]


def test_conditioning_formats_of_apply_model():
    model, x, t, c = latent_model(), philox(0, (2, 4, 8, 8)), torch.tensor([1, 2]), philox(1, (2, 3, 4))
    wanted = model.apply_model(x, t, c)
    assert torch.equal(model.apply_model(x, t, [c]), wanted) and torch.equal(model.apply_model(x, t, {"c_crossattn": [c]}), wanted)
    assert torch.equal(model.apply_model(x, t, {"c_crossattn": [c[:, :1], c[:, 1:]]}), wanted)
    hybrid = latent_model(conditioning_key="hybrid")
    with pytest.raises(ConfigError, match="'hybrid' needs c_concat"):
        hybrid.apply_model(x, t, {"c_crossattn": [c]})


def test_sequential_crossattn_keeps_the_list():
    wrapper = DiffusionWrapper({"target": f"{__name__}.TakesAList", "sequential_crossattn": True}, "crossattn")
    parts = [torch.zeros(1, 2, 4), torch.ones(1, 3, 4)]
    assert wrapper(torch.zeros(1, 4, 8, 8), torch.tensor([0]), c_crossattn=parts) is parts


class TakesAList(nn.Module):
    def forward(self, x: Tensor, t: Tensor, context: Any) -> Any:
        return context


# -- the objective -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_min_snr_weights_every_sample(kind):
    x0, c, t, noise = philox(0, (2, 4, 8, 8)), philox(1, (2, 3, 4)), torch.tensor([5, 700]), philox(2, (2, 4, 8, 8))
    plain = latent_model(parameterization=kind)
    losses = torch.stack([plain.p_losses(x0[i : i + 1], c[i : i + 1], t[i : i + 1], noise=noise[i : i + 1])[0] for i in range(2)])
    abar = plain.alphas_cumprod[t]
    snr = abar / (1 - abar)
    weights = snr.clamp(max=5) / {"x0": 1, "eps": snr, "v": snr + 1}[kind]  # arXiv:2303.09556, Sec. 3.4
    for weighting in ("min_snr", {"name": "min_snr", "gamma": 5.0}):
        weighted = latent_model(parameterization=kind, loss_weighting=weighting)
        torch.testing.assert_close(weighted.p_losses(x0, c, t, noise=noise)[0], (weights * losses).mean())
    torch.testing.assert_close(loss_weight("min_snr", kind, abar), weights)
    unweighted = latent_model(parameterization=kind, loss_weighting="none").p_losses(x0, c, t, noise=noise)[0]
    torch.testing.assert_close(unweighted, losses.mean())


@pytest.mark.parametrize("weighting", ["max_snr", {"name": "min_snr", "gama": 5}, {"name": "min_snr", "gamma": 0}, {"gamma": 5}])
def test_a_wrong_loss_weighting_is_told_when_the_model_is_built(weighting):
    with pytest.raises(ConfigError, match="loss_weighting"):
        latent_model(loss_weighting=weighting)


def test_zero_terminal_snr():
    with pytest.raises(ConfigError, match="needs parameterization v or x0"):
        latent_model(rescale_betas_zero_snr=True)
    model = latent_model(rescale_betas_zero_snr=True, parameterization="v")
    assert model.alphas_cumprod[-1] == 0 and model.alphas_cumprod[0] == latent_model().alphas_cumprod[0]
    x0, noise = philox(0, (1, 4, 8, 8)), philox(1, (1, 4, 8, 8))
    last = torch.tensor([999])
    assert torch.equal(model.q_sample(x0, last, noise), noise) and torch.equal(model.get_v(x0, noise, last), -x0)
    assert torch.isfinite(model.p_losses(x0, philox(2, (1, 1, 4)), last, noise=noise)[0])


def test_learned_logvar_is_the_log_of_the_error():
    """exp(-s) L + s is least at s = log L, so that the learnt value tells how hard each timestep is."""
    model = latent_model(learn_logvar=True)
    x0, c, t = philox(0, (1, 4, 8, 8)), philox(1, (1, 1, 4)), torch.tensor([3])
    noise = philox(2, (1, 4, 8, 8))
    error = model.p_losses(x0, c, t, noise=noise)[1]["train/loss_simple"].item()
    model.logvar.data[3] = math.log(error)
    loss, _ = model.p_losses(x0, c, t, noise=noise)
    loss.backward()
    assert loss.item() == pytest.approx(1 + math.log(error)) and abs(model.logvar.grad[3]) < 1e-5


def test_noised_conditioning():
    model = latent_model(timesteps=50, num_timesteps_cond=5)
    loss, _ = model(philox(0, (2, 4, 8, 8)), philox(1, (2, 1, 4)))
    assert torch.isfinite(loss)
    assert model.sample(philox(1, (2, 1, 4)), batch_size=2).shape == (2, 4, 8, 8)
    with pytest.raises(ConfigError, match="must not exceed timesteps"):
        latent_model(timesteps=50, num_timesteps_cond=51)


# -- pictures ----------------------------------------------------------------------------------------------------------


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


# -- objectives --------------------------------------------------------------------------------------------------------


def test_offset_noise_is_shared_by_the_pixels_of_a_channel():
    x = torch.zeros(512, 3, 4, 4)
    plain, offset = model_of(offset_noise=0.0), model_of(offset_noise=0.5)
    torch.manual_seed(0)
    expected = torch.randn_like(x)
    torch.manual_seed(0)
    assert torch.equal(plain.training_noise(x), expected)  # the original's draws
    torch.manual_seed(0)
    added = (offset.training_noise(x) - expected) / 0.5
    assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-6)
    assert added[..., 0, 0].std().item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ConfigError, match="offset_noise"):
        model_of(offset_noise=-0.1)


# -- what users get wrong ----------------------------------------------------------------------------------------------


def test_a_batch_without_what_is_needed():
    model = model_of()
    with pytest.raises(ConfigError, match="the batch has no 'image'; it has caption, jpg"):
        model.shared_step({"jpg": torch.zeros(1, 16, 16, 3), "caption": ["a"]})
    with pytest.raises(ConfigError, match="the batch has no 'caption'; it has image"):
        model.shared_step({"image": torch.zeros(1, 16, 16, 3)})
    same = latent_model(cond_stage_key="image")
    with pytest.raises(ConfigError, match="cached latents has only z"):
        same.get_input({"z": torch.zeros(1, 4, 8, 8)}, "image")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning_key": "cross"}, "conditioning_key 'cross' is unknown; allowed are None, concat, crossattn, hybrid, adm"),
        ({"parameterization": "epsilon"}, "parameterization 'epsilon' is unknown; allowed are eps, x0, v"),
        ({"loss_type": "huber"}, "loss_type 'huber' is unknown; allowed are l1, l2"),
        ({"beta_schedule": "line"}, "beta schedule 'line' is unknown: use one of linear, cosine"),
        ({"use_ema": True, "ckpt_path": "/no/such/file.ckpt"}, "/no/such/file.ckpt"),
    ],
)
def test_wrong_options_are_one_clear_line(changes, message):
    with pytest.raises(UserError) as caught:
        latent_model(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_mask_needs_x0():
    model, c, mask = latent_model(timesteps=10), torch.zeros(1, 1, 4), torch.ones(1, 1, 8, 8)
    for ddim in (False, True):
        with pytest.raises(UserError, match="a mask needs x0"):
            model.sample_log(c, 1, ddim=ddim, ddim_steps=2, mask=mask)


def test_quantising_without_a_codebook():
    x, c, t = philox(0, (2, 4, 8, 8)), torch.zeros(2, 1, 4), torch.tensor([3, 3])
    with pytest.raises(UserError, match="codebook"):
        model_of().p_sample(x, c, t, quantize_denoised=True)
    pixels = latent_model(first_stage_config="__is_first_stage__")
    torch.manual_seed(0)
    wanted = pixels.p_sample(x, c, t)
    torch.manual_seed(0)
    assert torch.equal(pixels.p_sample(x, c, t, quantize_denoised=True), wanted)  # images are their own nearest ones


def test_scale_by_std_and_a_scale_exclude_each_other():
    model = model_of(scale_by_std=True, scale_factor=0.18215)  # no float32
    with pytest.raises(ConfigError, match="drop scale_factor"):
        model.on_train_batch_start(batch(), 0)


def test_start_weights_bring_their_scale():
    """`--init_from` fills the model after it is built: what it brings is neither measured anew nor an error."""
    model = model_of(scale_by_std=True)
    model.load_state_dict({**model.state_dict(), "scale_factor": torch.tensor(0.3)})
    model.on_train_batch_start(batch(), 0)
    assert float(model.scale_factor) == pytest.approx(0.3)


def test_positional_encodings_are_refused():
    with pytest.raises(ConfigError, match="use_positional_encodings"):
        latent_model(use_positional_encodings=True).get_input({"image": torch.zeros(1, 8, 8, 4), "caption": torch.zeros(1, 2, 4)}, "image")


def test_omegaconf_configs_are_taken():
    from omegaconf import OmegaConf

    params = (
        LATENT_PARAMS
        | TRAINED_TEXT
        | {"loss_weighting": {"name": "min_snr"}, "ucg_training": {"caption": {"p": 0.5}}, "image_size": [8, 12]}
    )
    model = LatentDiffusion(**OmegaConf.create(params))
    assert model.sample_hw() == (8, 12) and isinstance(model.ucg_training["caption"], dict)
    wrapper = DiffusionWrapper(OmegaConf.create({"target": "tests.analytic.AnalyticEps", "sequential_crossattn": False}), "crossattn")
    assert wrapper.sequential_cross_attn is False


# -- a training --------------------------------------------------------------------------------------------------------


def test_weights_only_of_the_network(tmp_path):
    source = latent_model(unet_config=UNET)
    torch.save({"state_dict": source.model.state_dict()}, tmp_path / "unet.ckpt")
    loaded = latent_model(unet_config=UNET, ckpt_path=str(tmp_path / "unet.ckpt"), load_only_unet=True)
    name = "diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(loaded.model.get_parameter(name), source.model.get_parameter(name))
    with pytest.raises(CheckpointError, match="diffusion_model"):
        latent_model(unet_config=UNET, ckpt_path=str(tmp_path / "unet.ckpt"))


@pytest.mark.filterwarnings("ignore:.*no logger configured.*", "ignore:.*in eval mode.*")
def test_three_training_steps_on_shapes(tmp_path):
    first_stage = {
        "target": KL["target"],
        "params": KL["params"] | {"ddconfig": KL["params"]["ddconfig"] | {"ch_mult": [1, 1, 1, 1], "ch": 8}},
    }
    text = {"embed_dim": 8, "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}}
    stage = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": {"arch": text, "max_length": 16, "freeze": False}}
    torch.manual_seed(0)
    model = latent_model(
        parameterization="v",
        use_ema=True,
        ema_cond_stage=True,
        scale_by_std=True,
        scale_factor=1.0,
        loss_weighting="min_snr",
        ucg_training={"caption": {"p": 0.5, "val": ""}},
        first_stage_config=first_stage,
        cond_stage_config=stage,
        cond_stage_trainable=True,
        unet_config={"target": UNET["target"], "params": UNET["params"] | {"context_dim": 8}},
    )
    frozen = {name: value.clone() for name, value in model.first_stage_model.state_dict().items()}
    tokens = model.cond_stage_model.model.token_embedding.weight.detach().clone()
    losses: list[float] = []
    model.register_forward_hook(lambda module, args, output: losses.append(float(output[0].detach())))
    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, *(DataLoader(ShapesDataset(size=6, image_size=64, seed=seed), batch_size=2) for seed in (1, 2)))
    assert trainer.global_step == 3 and len(losses) == 3 + 2 and all(math.isfinite(value) for value in losses)
    metrics = trainer.callback_metrics
    assert {"train/loss", "train/loss_simple", "train/loss_vlb", "val/loss", "val/loss_simple_ema"} <= set(metrics)
    assert float(model.scale_factor) != 1.0 and int(model.model_ema.num_updates) == int(model.cond_stage_ema.num_updates) == 3
    assert all(torch.equal(value, frozen[name]) for name, value in model.first_stage_model.state_dict().items())
    assert not torch.equal(model.cond_stage_model.model.token_embedding.weight, tokens)
