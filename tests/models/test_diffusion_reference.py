"""DDPM, LatentDiffusion and DiffusionWrapper against stored numbers of the published code; and what has no numbers, as properties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import DDPM, DiffusionWrapper, LatentDiffusion
from ldm.modules.diffusionmodules.schedule import extract_into_tensor
from ldm.modules.ema import LitEma
from tests.analytic import latent_model
from tests.reference_rule import compare, fill, philox

BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
)
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
SMALL_UNET = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1],
    "num_heads": 4,
    "legacy": False,
}
CROSS = {"use_spatial_transformer": True, "context_dim": 4}
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
            "ch": 32,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}


def unet(**changes: Any) -> dict[str, Any]:
    return {"target": UNET, "params": SMALL_UNET | changes}


def next_random() -> Tensor:
    """Four numbers that tell whether as much randomness was drawn as in the published code."""
    return torch.randn(4)


# -- networks and conditioning -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_wrapper(reference):
    ref = reference("a41_diffusion_wrapper_compvis")
    x, t, concat, tokens, more_tokens, classes = (ref.input(name) for name in ("x", "t", "cc", "c1", "c2", "adm_i"))
    cross = {"use_spatial_transformer": True, "context_dim": 32}

    def run(key: str | None, conditions: dict[str, Any], **changes: Any) -> Tensor:
        return fill(DiffusionWrapper(unet(**changes), key))(x, t, **conditions)

    ref.check_all(
        dict(
            none=run(None, {}),
            concat=run("concat", dict(c_concat=[concat]), in_channels=7),
            crossattn=run("crossattn", dict(c_crossattn=[tokens, more_tokens]), **cross),
            hybrid=run("hybrid", dict(c_concat=[concat], c_crossattn=[tokens]), in_channels=7, **cross),
            adm=run("adm", dict(c_crossattn=[classes]), num_classes=10),
        )
    )


@torch.no_grad()
@pytest.mark.parametrize("key", ["adm", "crossattn-adm", "hybrid-adm"])
def test_wrapper_with_a_vector_is_the_network_called_by_hand(key):
    x, t, concat, tokens = philox(0, (2, 4, 8, 8)), torch.tensor([3, 700]), philox(1, (2, 3, 8, 8)), philox(2, (2, 5, 4))
    options = {"num_classes": 10} if key == "adm" else {"num_classes": "sequential", "adm_in_channels": 6, **CROSS}
    y = torch.tensor([1, 7]) if key == "adm" else philox(3, (2, 6))
    wrapper = fill(DiffusionWrapper(unet(model_channels=64, in_channels=7 if key == "hybrid-adm" else 4, **options), key))
    given: dict[str, Any] = dict(c_crossattn=[y]) if key == "adm" else dict(c_crossattn=[tokens], c_adm=y)
    inputs, context = (x, {}) if key == "adm" else (x, dict(context=tokens))
    if key == "hybrid-adm":
        given["c_concat"], inputs = [concat], torch.cat([x, concat], 1)
    out = wrapper(x, t, **given)
    assert torch.equal(out, wrapper.diffusion_model(inputs, t, y=y, **context))
    assert not torch.allclose(out, wrapper.diffusion_model(inputs, t, y=0 * y, **context), rtol=0, atol=1e-3)


# -- schedule ----------------------------------------------------------------------------------------------------------


def test_schedule_buffers(reference):
    ref = reference("c03_schedule_buffers_sd1")
    model, mixed = latent_model(), latent_model(v_posterior=0.3)
    outputs: dict[str, Any] = {name: getattr(model, name) for name in BUFFERS}
    for name in ("posterior_variance", "posterior_log_variance_clipped", "lvlb_weights"):
        outputs[f"{name}_v03"] = getattr(mixed, name)
    outputs["lvlb_weights_x0"] = latent_model(parameterization="x0").lvlb_weights
    outputs["persistent_keys_sorted"] = np.array(sorted(mixed.state_dict()))
    ref.check_all(outputs)


def test_schedule_buffers_of_v(reference):
    reference("c04_schedule_buffers_v").check_all(dict(lvlb_weights=latent_model(parameterization="v").lvlb_weights))


def test_schedule_from_given_betas_and_noised_conditioning():
    model = latent_model(timesteps=50, num_timesteps_cond=5)
    assert model.shorten_cond_schedule and model.cond_ids.tolist() == [0, 12, 24, 37, 49] + [49] * 45  # 24.5 is rounded to even
    betas = np.linspace(0.001, 0.02, 10)
    model = latent_model()
    model.register_schedule(given_betas=betas)
    assert model.num_timesteps == 10 and not model.shorten_cond_schedule
    compare(model.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-6)


# -- the forward process and its inverse -------------------------------------------------------------------------------


def test_forward_process(reference):
    ref = reference("c06_q_sample_and_friends")
    x0, noise, xt, t = (ref.input(name) for name in ("x0", "noise", "xt", "t"))
    model = latent_model().eval()
    mean, variance, log_variance = model.q_mean_variance(x0, t)
    posterior = model.q_posterior(x0, xt, t)
    torch.manual_seed(11)
    outputs = dict(
        q_sample_seed11=model.q_sample(x0, t),
        q_sample=model.q_sample(x0, t, noise=noise),
        psfn=model.predict_start_from_noise(xt, t, noise),
        eps_from_x0=model._predict_eps_from_xstart(xt, t, x0),
        prior_bpd=model._prior_bpd(x0),
        qmv_mean=mean,
        qmv_var=variance.expand(2, 1, 1, 1),
        qmv_logvar=log_variance.expand(2, 1, 1, 1),
        extract=extract_into_tensor(model.sqrt_alphas_cumprod, t, x0.shape),
    )
    ref.check_all(outputs | dict(zip(("qp_mean", "qp_var", "qp_logvar"), posterior, strict=True)))


def test_v_prediction(reference):
    ref = reference("c07_v_prediction")
    x0, noise, xt, v, t = (ref.input(name) for name in ("x0", "noise", "xt", "v", "t"))
    model = latent_model(parameterization="v").eval()
    start, eps = model.predict_start_from_z_and_v(xt, t, v), model.predict_eps_from_z_and_v(xt, t, v)
    ref.check_all(dict(get_v=model.get_v(x0, noise, t), start=start, eps=eps))


# -- the objective -----------------------------------------------------------------------------------------------------

OBJECTIVES = {
    "c08_p_losses": {
        "eps_l2": {},
        "eps_l1": {"loss_type": "l1"},
        "x0_l2": {"parameterization": "x0"},
        "eps_elbo": {"original_elbo_weight": 0.001, "l_simple_weight": 0.7},
        "eps_logvar": {"logvar_init": 0.3},
        "eps_learn_logvar": {"learn_logvar": True},
    },
    "c09_p_losses_v": {"v_l2": {"parameterization": "v"}, "v_l1": {"parameterization": "v", "loss_type": "l1"}},
}


@torch.no_grad()
@pytest.mark.parametrize("case", OBJECTIVES)
def test_objective(reference, case):
    ref = reference(case)
    inputs = ref.input("x0"), ref.input("cond"), ref.input("t")
    outputs: dict[str, Any] = {}
    for name, changes in OBJECTIVES[case].items():
        model = latent_model(**changes).eval()
        if model.learn_logvar:
            model.logvar.copy_(0.1 * torch.sin(torch.arange(1000) / 100.0))
        loss, parts = model.p_losses(*inputs, noise=ref.input("noise"))
        outputs[f"{name}/loss"] = loss
        outputs |= {f"{name}/{key.replace('/', '_')}": value for key, value in parts.items()}
        outputs[f"{name}/train_keys"] = np.array(sorted(model.train().p_losses(*inputs)[1]))
    ref.check_all(outputs)


@torch.no_grad()
def test_pixel_model(reference):
    ref = reference("c11_ddpm_pixel")
    x0, t = ref.input("x0"), ref.input("t")
    config = {"target": "tests.analytic.AnalyticEps", "params": {"channels": 3}}
    model = DDPM(config, image_size=8, channels=3, use_ema=False).eval()
    loss, parts = model.p_losses(x0, t, noise=ref.input("noise"))
    mean, variance, log_variance = model.p_mean_variance(x0, t, clip_denoised=True)
    torch.manual_seed(5)
    outputs = dict(loss=loss, simple=parts["val/loss_simple"], vlb=parts["val/loss_vlb"], p_sample_seed5=model.p_sample(x0, t))
    outputs |= dict(mean=mean, var=variance, logvar=log_variance, mean_noclip=model.p_mean_variance(x0, t, clip_denoised=False)[0])
    ref.check_all(outputs)


def gradients(use_checkpoint: bool) -> tuple[Tensor, dict[str, Tensor]]:
    deeper = unet(attention_resolutions=[2, 1], channel_mult=[1, 2], use_checkpoint=use_checkpoint, **CROSS)
    model = fill(latent_model(unet_config=deeper)).train()
    x0, noise, tokens = philox(0, (2, 4, 8, 8)), philox(1, (2, 4, 8, 8)), philox(2, (2, 3, 4)).requires_grad_()
    loss, _ = model.p_losses(x0, tokens, torch.tensor([10, 800]), noise=noise)
    loss.backward()
    found = {name: p.grad for name, p in model.model.named_parameters()}
    return loss.detach(), found | {"the conditioning": tokens.grad}


def test_checkpointing_changes_no_gradient():
    (loss, plain), (same_loss, saved) = gradients(False), gradients(True)
    assert torch.equal(loss, same_loss) and len(plain) > 100
    for name, gradient in plain.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(saved[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


# -- EMA ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ema_scope_swaps_and_restores():
    model = fill(latent_model(use_ema=True, unet_config=unet(**CROSS)))
    model.model_ema = LitEma(model.model)  # the average starts at these weights
    x, t, tokens = philox(0, (2, 4, 8, 8)), torch.tensor([10, 800]), philox(2, (2, 3, 4))
    start = model.apply_model(x, t, tokens)
    for p in model.model.parameters():
        p.mul_(1.5)
    trained = model.apply_model(x, t, tokens)
    model.on_train_batch_end()  # first update: decay 2 / 11
    assert int(model.model_ema.num_updates) == 1
    with model.ema_scope():
        averaged = model.apply_model(x, t, tokens)
        weight = model.model.diffusion_model.out[2].weight.clone()
    torch.testing.assert_close(weight, model.model.diffusion_model.out[2].weight * ((2 / 11) / 1.5 + 9 / 11))
    assert not torch.allclose(averaged, trained) and not torch.allclose(averaged, start)
    assert torch.equal(model.apply_model(x, t, tokens), trained)
    with pytest.raises(RuntimeError, match="inside"), model.ema_scope():
        raise RuntimeError("inside")
    assert torch.equal(model.apply_model(x, t, tokens), trained)


def test_ema_names_are_the_parameters_without_dots():
    model = latent_model(use_ema=True, unet_config=unet(**CROSS))
    averaged = {name for name in model.state_dict() if name.startswith("model_ema.")}
    weights = {"model_ema." + name.replace(".", "") for name, _ in model.model.named_parameters()}
    assert averaged == weights | {"model_ema.decay", "model_ema.num_updates"}


# -- first stage and batches -------------------------------------------------------------------------------------------


def kl_model(**changes: Any) -> LatentDiffusion:
    return fill(latent_model(first_stage_config=KL, **changes))


@torch.no_grad()
def test_first_stage_scaling(reference):
    ref = reference("c14_first_stage_scaling")
    model = kl_model()
    posterior = model.encode_first_stage(ref.input("img"))
    torch.manual_seed(21)
    encoded = model.get_first_stage_encoding(posterior)
    z = ref.input("z")
    ref.check_all(dict(enc=encoded, dec=model.decode_first_stage(z), lat=model.get_first_stage_encoding(z)))


@torch.no_grad()
def test_order_of_random_draws_in_a_step(reference):
    ref = reference("c16_shared_step_rng_order")
    model, batch = kl_model(), {"image": ref.input("img"), "caption": ref.input("cap")}
    torch.manual_seed(23)
    loss, parts = model.shared_step(batch)
    outputs = dict(loss=loss, simple=parts["val/loss_simple"], vlb=parts["val/loss_vlb"], post_rng=next_random())
    outputs["loss2"] = model.shared_step(batch)[0]
    torch.manual_seed(24)
    outputs["z"], outputs["c"] = model.get_input(batch, "image")[:2]
    torch.manual_seed(25)
    out = model.get_input(batch, "image", return_first_stage_outputs=True, force_c_encode=True, return_original_cond=True, bs=1)
    ref.check_all(outputs | dict(zip(("bs1_z", "bs1_c", "bs1_x", "bs1_xrec", "bs1_xc"), out, strict=True)))


def test_class_conditioning():
    embedder = {"target": "ldm.modules.encoders.modules.ClassEmbedder", "params": {"embed_dim": 4, "n_classes": 10, "key": "class_label"}}
    model = fill(latent_model(cond_stage_key="class_label", cond_stage_config=embedder))
    batch = {"image": philox(0, (2, 8, 8, 4)), "class_label": torch.tensor([3, 8])}
    z, c = model.get_input(batch, "image")[:2]
    compare(z, 0.18215 * batch["image"].movedim(-1, 1))
    assert torch.equal(c, model.cond_stage_model.embedding.weight[[3, 8]][:, None])  # (B, 1, D)
    torch.testing.assert_close(
        model.apply_model(z, torch.tensor([0, 500]), c),
        torch.tanh(0.7 * z + c[:, 0, :, None, None] + torch.tensor([0, 0.5])[:, None, None, None]),
    )
    empty = model.get_unconditional_conditioning(3)
    assert torch.equal(empty, model.cond_stage_model.embedding.weight[[9, 9, 9]][:, None])  # the last class stands for none


@pytest.mark.parametrize("restarted", [False, True])
def test_scale_by_std_is_set_once_and_not_after_a_restart(restarted, tmp_path):
    changes: dict[str, Any] = {"scale_by_std": True, "scale_factor": 1.0}
    if restarted:
        source = kl_model(**changes)
        source.scale_factor.fill_(0.5)
        torch.save({"state_dict": source.state_dict()}, tmp_path / "start.ckpt")
        changes["ckpt_path"] = str(tmp_path / "start.ckpt")
    model = kl_model(**changes)
    assert "scale_factor" in model.state_dict()
    batch = {"image": philox(0, (2, 16, 16, 3), 0.5), "caption": philox(1, (2, 3, 4))}
    torch.manual_seed(26)
    model.on_train_batch_start(batch, 0, 0)
    if restarted:
        assert model.scale_factor == 0.5
        return
    torch.manual_seed(26)
    z = model.encode_first_stage(batch["image"].movedim(-1, 1)).sample()
    torch.testing.assert_close(model.scale_factor, 1 / z.std())
    assert float(model.get_input(batch, "image")[0].std()) == pytest.approx(1, abs=0.1)
    before = model.scale_factor.clone()
    model.on_train_batch_start({key: 2 * value for key, value in batch.items()}, 1)
    assert torch.equal(model.scale_factor, before)


# -- ancestral sampling ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_ancestral_sampling(reference):
    ref = reference("d50_ancestral_p_sample_loop")
    model = latent_model(timesteps=25, log_every_t=5).eval()
    x_T, c, t = ref.input("x_T"), ref.input("c"), torch.tensor([0, 13])
    whole = dict(batch_size=2, x_T=x_T, verbose=False, shape=(2, 4, 8, 8))
    steps = whole | dict(shape=(4, 8, 8))
    outputs: dict[str, Any] = {}
    torch.manual_seed(9000)
    outputs["sample"], kept = model.sample(c, return_intermediates=True, **whole)
    outputs["inter"] = torch.stack(kept)
    torch.manual_seed(9001)
    outputs["sample_mask"] = model.sample(c, mask=ref.input("mask"), x0=ref.input("x0"), **whole)
    torch.manual_seed(9002)
    outputs["prog"], kept = model.progressive_denoising(c, **steps)
    outputs["prog_inter"] = torch.stack(kept)
    torch.manual_seed(9003)
    outputs["startT"] = model.progressive_denoising(c, start_T=10, **steps)[0]
    outputs |= dict(zip(("mean_clip", "var", "logvar"), model.p_mean_variance(x_T, c, t, clip_denoised=True), strict=True))
    for name, repeat in (("p_sample", False), ("p_sample_repeat", True)):
        torch.manual_seed(9004)
        outputs[name] = model.p_sample(x_T, c, t, repeat_noise=repeat)
    ref.check_all(outputs | dict(post_rng=next_random()))
