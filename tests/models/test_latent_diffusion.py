"""LatentDiffusion around its network: batches, cached latents, conditioning, what is trained and what is not, errors."""

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
from ldm.models.diffusion.ddpm import DiffusionWrapper, LatentDiffusion
from ldm.util import CheckpointError, ConfigError, UserError
from tests.analytic import LATENT_PARAMS, latent_model
from tests.models.latent_stubs import CAPTIONS, KL, TEXT, TRAINED_TEXT, UNET, VQ, batch, model_of
from tests.reference_rule import fill, philox

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
