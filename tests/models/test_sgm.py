"""The generative-models (SDXL) framework: stored numbers, exact solutions, addresses, names of published files."""

from __future__ import annotations

import ast
import gzip
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from ldm.inference.checkpoint import load_weights, save_weights
from ldm.inference.weights.key_names import published
from ldm.models.diffusion.registry import make_sampler
from ldm.models.diffusion.sgm import denoiser_scaling, discretizer, guiders, loss_weighting, sampling, sampling_utils, sigma_sampling
from ldm.models.diffusion.sgm.denoiser import DiscreteDenoiser
from ldm.models.diffusion.sgm.engine import DiffusionEngine
from ldm.models.diffusion.sgm.loss import StandardDiffusionLoss
from ldm.models.diffusion.sgm.wrappers import OpenAIWrapper
from ldm.util import ConfigError, UserError, get_obj_from_str, instantiate_from_config

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference" / "sgm"
SG = "sgm.modules.diffusionmodules."
LEGACY = {"target": SG + "discretizer.LegacyDDPMDiscretization"}
EDM = {"target": SG + "discretizer.EDMDiscretization", "params": {"sigma_min": 0.02, "sigma_max": 20.0}}
DENOISER = {"scaling_config": {"target": SG + "denoiser_scaling.EpsScaling"}, "num_idx": 1000, "discretization_config": LEGACY}
SAMPLERS = [
    "EulerEDMSampler",
    "HeunEDMSampler",
    "DPMPP2MSampler",
    "LinearMultistepSampler",
    "EulerAncestralSampler",
    "DPMPP2SAncestralSampler",
]


def sampler(name: str, steps: int, discretization: dict = LEGACY, **options: Any) -> sampling.BaseDiffusionSampler:
    return getattr(sampling, name)(num_steps=steps, discretization_config=discretization, **options)


def gaussian(x: Tensor, sigma: Tensor, cond: Any, spread: float = 0.5) -> Tensor:
    """The exact denoiser of data N(0, spread^2)."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    return x * spread**2 / (spread**2 + sigma**2)


def gaussian_error(name: str, steps: int, **options: Any) -> float:
    """Distance of a sampler's end from the exact solution of the probability flow, from 20 to 0.02 and then to 0 by the denoiser."""
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = list(sampler(name, steps, EDM, **options).walk(gaussian, x, {}))[-2]
    start = x * math.sqrt(1 + 20.0**2)
    exact = start * math.sqrt((0.5**2 + 0.02**2) / (0.5**2 + 20.0**2))
    return float((got - exact).abs().max())


# ------------------------------------------------------------------------------------------------------------- noise levels
def test_levels_are_the_stored_ones(reference: Callable) -> None:
    legacy, edm = discretizer.LegacyDDPMDiscretization(), discretizer.EDMDiscretization()
    spaced = discretizer.generate_roughly_equally_spaced_steps
    reference("j02_sgm_discretizations").check_all(
        {
            **{f"legacy_{n}": legacy(n) for n in (10, 20, 25, 40, 50, 1000)},
            "legacy_10_noappend": legacy(10, do_append_zero=False),
            "legacy_1000_flip_noappend": legacy(1000, do_append_zero=False, flip=True),
            "edm_10": edm(10),
            "edm_18": edm(18),
            "legacy_sd2_linear_10": discretizer.LegacyDDPMDiscretization(linear_start=1e-4, linear_end=2e-2)(10),
            "steps_10": np.ascontiguousarray(spaced(10, 1000)),
            "steps_30": np.ascontiguousarray(spaced(30, 1000)),
        }
    )


@pytest.mark.parametrize("n", [1, 2, 7, 60, 999, 1000])
def test_any_number_of_steps(n: int) -> None:
    for levels in (discretizer.LegacyDDPMDiscretization()(n), discretizer.EDMDiscretization()(n)):
        assert levels.shape == (n + 1,) and levels[-1] == 0 and (levels.diff() < 0).all()
        assert torch.isfinite(levels).all()


def test_impossible_numbers_of_steps():
    with pytest.raises(UserError, match="1001 sampling steps are more than the 1000"):
        discretizer.LegacyDDPMDiscretization()(1001)
    with pytest.raises(UserError, match="use 1 or more"):
        discretizer.EDMDiscretization()(0)
    with pytest.raises(ConfigError, match="sigma_min"):
        discretizer.EDMDiscretization(sigma_min=2, sigma_max=1)


# ----------------------------------------------------------------------------------------------------------------- denoiser
SIGMA = torch.tensor([0.0292, 0.5, 1.0, 3.3, 14.6], dtype=torch.float64)


@pytest.mark.parametrize("name", denoiser_scaling.__all__)
def test_scalings_recover_x0(name: str) -> None:
    """With the network's ideal answer, D(x0 + sigma eps) is x0; and the network's input has unit variance."""
    if name == "Scaling":
        return  # the type
    scaling = getattr(denoiser_scaling, name)()
    c_skip, c_out, c_in, c_noise = scaling(SIGMA)
    spread = 0.5 if name == "EDMScaling" else 1.0
    torch.testing.assert_close(c_in, 1 / (SIGMA**2 + spread**2).sqrt())
    x0, eps = 0.7, -1.3
    x = x0 + SIGMA * eps
    alpha = 1 / (1 + SIGMA**2).sqrt()  # variance preserving: alpha x
    ideal = {
        "EpsScaling": torch.full_like(SIGMA, eps),
        "VScaling": alpha * eps - alpha * SIGMA * x0,
        "VScalingWithEDMcNoise": alpha * eps - alpha * SIGMA * x0,
        "EDMScaling": (x0 - c_skip * x) / c_out,
    }[name]
    torch.testing.assert_close(c_skip * x + c_out * ideal, torch.full_like(SIGMA, x0))
    torch.testing.assert_close(c_noise, SIGMA if name in ("EpsScaling", "VScaling") else SIGMA.log() / 4)
    if name == "EDMScaling":  # the target has unit variance too: Var[x0 - c_skip x] = c_out^2
        torch.testing.assert_close((1 - c_skip) ** 2 * 0.25 + c_skip**2 * SIGMA**2, c_out**2)


def test_weightings_undo_the_scale_of_the_target():
    for weighting, scaling in (("EDMWeighting", "EDMScaling"), ("VWeighting", "VScaling"), ("EpsWeighting", "EpsScaling")):
        c_out = getattr(denoiser_scaling, scaling)()(SIGMA)[1]
        torch.testing.assert_close(getattr(loss_weighting, weighting)()(SIGMA), c_out**-2.0)
    assert torch.equal(loss_weighting.UnitWeighting()(SIGMA), torch.ones_like(SIGMA))


class Recorder(nn.Module):
    """A network that answers with a tenth of its input and keeps what it was given."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        self.x, self.given = x, given
        return 0.1 * x[:, :4]


def test_discrete_denoiser_uses_the_nearest_level_and_tells_its_index():
    denoiser, network = DiscreteDenoiser(**DENOISER), Recorder()
    assert list(denoiser.state_dict()) == ["sigmas"]
    sigma = torch.tensor([0.61, 9.7])
    idx = denoiser.sigma_to_idx(sigma)
    near = denoiser.sigmas[idx]
    assert idx.dtype == torch.int64 and ((denoiser.sigmas[idx - 1] - sigma).abs() > (near - sigma).abs()).all()
    assert ((denoiser.sigmas[idx + 1] - sigma).abs() > (near - sigma).abs()).all()
    x, cond = torch.randn(2, 4, 3, 3), {"crossattn": torch.randn(2, 1, 4), "vector": torch.randn(2, 6), "concat": torch.randn(2, 1, 3, 3)}
    out = denoiser(OpenAIWrapper(network), x, sigma, cond)
    level = near.reshape(2, 1, 1, 1)
    x_in = x / (level**2 + 1).sqrt()
    torch.testing.assert_close(network.x, torch.cat([x_in, cond["concat"]], 1))
    assert torch.equal(network.given["timesteps"], idx)
    assert network.given["context"] is cond["crossattn"] and network.given["y"] is cond["vector"]
    torch.testing.assert_close(out, x - level * 0.1 * x_in)
    assert torch.equal(denoiser.possibly_quantize_c_noise(denoiser.sigmas), torch.arange(1000))


def test_levels_stay_in_float32():
    denoiser = DiscreteDenoiser(**DENOISER)
    levels = denoiser.sigmas.clone()
    assert denoiser.half().sigmas.dtype == torch.float32 and torch.equal(denoiser.sigmas, levels)
    denoiser.load_state_dict({"sigmas": levels.half()})
    assert torch.equal(denoiser.sigmas, levels)
    with torch.device("meta"):
        assert torch.equal(DiscreteDenoiser(**DENOISER).sigmas, levels)


def test_compiling_keeps_the_names():
    assert list(OpenAIWrapper(nn.Linear(1, 1), compile_model=True).state_dict()) == ["diffusion_model.weight", "diffusion_model.bias"]


# ----------------------------------------------------------------------------------------------------------------- guidance
def test_guidance():
    x, s = torch.randn(2, 4, 3, 3), torch.tensor([1.0, 2.0])
    c = {"crossattn": torch.randn(2, 1, 4), "frames": 3}
    uc = {"crossattn": torch.zeros(2, 1, 4), "frames": 3}
    guider = guiders.VanillaCFG(5.0, dyn_thresh_config={"target": SG + "sampling_utils.NoDynamicThresholding"})
    x_in, s_in, joined = guider.prepare_inputs(x, s, c, uc)
    assert torch.equal(x_in, torch.cat([x, x])) and s_in.tolist() == [1, 2, 1, 2] and joined["frames"] == 3
    assert torch.equal(joined["crossattn"], torch.cat([uc["crossattn"], c["crossattn"]]))
    for rule in (guider, guiders.VanillaCFG(5.0)):
        torch.testing.assert_close(rule(torch.cat([x, 2 * x]), s), 6 * x)
    with pytest.raises(UserError, match="'frames' differ"):
        guider.prepare_inputs(x, s, c, {**uc, "frames": 4})
    with pytest.raises(UserError, match="lacks 'crossattn'"):
        guider.prepare_inputs(x, s, c, {})
    identity = guiders.IdentityGuider()
    assert identity.prepare_inputs(x, s, c, uc) == (x, s, c) and identity(x, s) is x


# ------------------------------------------------------------------------------------------------------------ samplers' maths
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_multistep_coefficients_integrate_polynomials_exactly(order: int) -> None:
    t = [10.0, 7.0, 5.0, 3.0, 1.0, 0.4]
    for degree in range(order):
        got = sum(sampling_utils.linear_multistep_coeff(order, t, 4, j) * t[4 - j] ** degree for j in range(order))
        assert got == pytest.approx((t[5] ** (degree + 1) - t[4] ** (degree + 1)) / (degree + 1), rel=1e-9)
    with pytest.raises(ValueError, match="order 4 is too high for step 2"):
        sampling_utils.linear_multistep_coeff(4, t, 2, 0)


def test_ancestral_step_keeps_the_variance():
    a, b = torch.tensor([3.0]), torch.tensor([1.0])
    down, up = sampling_utils.get_ancestral_step(a, b, eta=0.8)
    torch.testing.assert_close(down**2 + up**2, b**2)
    torch.testing.assert_close(up, torch.tensor([0.8 * math.sqrt(8 / 9)]))
    assert sampling_utils.get_ancestral_step(a, b, eta=0.0) == (b, 0)
    assert sampling_utils.get_ancestral_step(a, torch.zeros(1)) == (0, 0)
    torch.testing.assert_close(sampling_utils.to_sigma(sampling_utils.to_neg_log_sigma(a)), a)


# ----------------------------------------------------------------------------------------------------------------- samplers
@pytest.mark.parametrize(
    ("name", "order", "options"),
    [
        ("EulerEDMSampler", 1, {}),
        ("HeunEDMSampler", 2, {}),
        ("DPMPP2MSampler", 2, {}),
        ("LinearMultistepSampler", 2, {"order": 2}),
        ("LinearMultistepSampler", 3, {"order": 3}),
        ("EulerAncestralSampler", 1, {"eta": 0.0}),
        ("DPMPP2SAncestralSampler", 2, {"eta": 0.0}),
    ],
)
def test_order_of_convergence_on_gaussian_data(name: str, order: int, options: dict) -> None:
    coarse, fine = (gaussian_error(name, steps, **options) for steps in (80, 160))
    assert order - 0.35 < math.log2(coarse / fine) < order + 1.2, (coarse, fine)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_gaussian_data_have_its_spread(name: str) -> None:
    """Also with noise: 16384 samples of standard deviation 0.5."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 64, 64)
    before = x.clone()
    out = sampler(name, 300, EDM, **({"s_churn": 10.0} if "EDM" in name else {}))(gaussian, x, {})
    assert torch.equal(x, before), "the sampler changed its input"
    assert out.dtype == torch.float32 and 0.485 < out.std() < 0.51


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_end_at_the_networks_x0(name: str, steps: int) -> None:
    x0 = torch.full((1, 1, 2, 2), 0.3)
    out = sampler(name, steps)(lambda x, sigma, c: x0.expand_as(x), torch.randn(1, 1, 2, 2), {})
    torch.testing.assert_close(out, x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "draws"),
    [
        ("EulerEDMSampler", {}, 0),
        ("EulerEDMSampler", {"s_churn": 5.0, "s_tmin": 0.5, "s_tmax": 9.0}, 8),
        ("HeunEDMSampler", {"s_churn": 5.0}, 10),
        ("EulerAncestralSampler", {}, 10),
        ("DPMPP2SAncestralSampler", {"eta": 0.8}, 10),
        ("DPMPP2MSampler", {}, 0),
    ],
)
def test_number_of_random_draws(name: str, options: dict, draws: int) -> None:
    """As in the published code: one tensor a step with churn, one in every ancestral step, the last included."""
    x = torch.randn(2, 1, 2, 2)
    torch.manual_seed(7)
    sampler(name, 10, **options)(gaussian, x, {})
    got = torch.randn(1)
    torch.manual_seed(7)
    levels = discretizer.LegacyDDPMDiscretization()(10)[:-1]
    if "s_tmin" in options:
        draws = int(((levels >= options["s_tmin"]) & (levels <= options["s_tmax"])).sum())
    for _ in range(draws):
        torch.randn(2, 1, 2, 2)
    assert torch.equal(got, torch.randn(1))


def test_guided_sampling_equals_a_guided_denoiser():
    """VanillaCFG over two conditions is the same as their combination under no guidance."""
    cond, uncond = {"vector": torch.tensor([[0.4], [0.1]])}, {"vector": torch.tensor([[0.0], [0.2]])}

    def denoiser(x: Tensor, sigma: Tensor, c: dict) -> Tensor:
        return gaussian(x, sigma, c) + c["vector"].reshape(-1, 1, 1, 1)

    guider = {"target": SG + "guiders.VanillaCFG", "params": {"scale": 3.0}}
    x = torch.randn(2, 1, 2, 2)
    guided = sampler("DPMPP2MSampler", 8, guider_config=guider)(denoiser, x, cond, uncond)
    mixed = {"vector": uncond["vector"] + 3.0 * (cond["vector"] - uncond["vector"])}
    torch.testing.assert_close(guided, sampler("DPMPP2MSampler", 8)(denoiser, x, mixed))


def test_start_of_the_loop():
    x = torch.randn(2, 4, 3, 3)
    scaled, ones, levels, count, cond, uc = sampler("EulerEDMSampler", 10).prepare_sampling_loop(x, {"a": 1})
    torch.testing.assert_close(scaled, x * math.sqrt(1 + float(levels[0]) ** 2))
    assert ones.tolist() == [1, 1] and count == len(levels) == 11 and uc is cond
    assert len(list(sampler("EulerEDMSampler", 10).walk(gaussian, x, {}, num_steps=4))) == 4
    half = sampler("EulerEDMSampler", 3)(gaussian, x.half(), {})
    assert half.dtype == torch.float32


def test_errors_of_samplers():
    with pytest.raises(ConfigError, match="does not take s_chrun"):
        sampler("EulerEDMSampler", 3, s_chrun=1.0)
    with pytest.raises(ConfigError, match="order 0"):
        sampler("LinearMultistepSampler", 3, order=0)
    with pytest.raises(UserError, match="needs num_steps"):
        sampling.EulerEDMSampler(discretization_config=LEGACY)(gaussian, torch.zeros(1, 1, 2, 2), {})


# ----------------------------------------------------------------------------------------------------------------- training
def test_loss_is_zero_for_a_perfect_denoiser_and_weighted_otherwise():
    x0, spread = torch.randn(3, 2, 4, 4), 2.0
    levels = {"target": SG + "sigma_sampling.EDMSampling", "params": {"p_mean": math.log(spread), "p_std": 0.0}}
    loss = StandardDiffusionLoss(levels, {"target": SG + "loss_weighting.EpsWeighting"}, batch2model_keys="frames")
    seen = {}

    def off_by_one(network: Any, x: Tensor, sigma: Tensor, cond: dict, **extra: Any) -> Tensor:
        seen.update(sigma=sigma, cond=cond, extra=extra, noise=(x - x0) / spread)
        return x0 + 1.0

    got = loss(None, off_by_one, lambda batch: {"vector": batch["y"]}, x0, {"y": 5, "frames": 7})
    torch.testing.assert_close(got, torch.full((3,), spread**-2))
    assert seen["cond"] == {"vector": 5} and seen["extra"] == {"frames": 7}
    torch.testing.assert_close(seen["sigma"], torch.full((3,), spread))
    assert 0.7 < seen["noise"].std() < 1.3
    with pytest.raises(ConfigError, match="allowed are l2, l1"):
        StandardDiffusionLoss(levels, levels, loss_type="l3")


def test_levels_of_training():
    discrete = sigma_sampling.DiscreteSampling(LEGACY, 1000)
    assert torch.equal(discrete(2, torch.tensor([0, 999])), discrete.sigmas[[0, 999]]) and discrete.sigmas[0] < discrete.sigmas[1]
    torch.manual_seed(0)
    log = sigma_sampling.EDMSampling()(4000).log()
    assert abs(log.mean() + 1.2) < 0.1 and abs(log.std() - 1.2) < 0.1


UNET = {
    "target": SG + "openaimodel.UNetModel",
    "params": {
        "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [2], "channel_mult": [1, 2],
        "num_res_blocks": 1, "num_head_channels": 32, "use_linear_in_transformer": True, "transformer_depth": [0, 1], "context_dim": 8,
        "num_classes": "sequential", "adm_in_channels": 16, "spatial_transformer_attn_type": "softmax-xformers",
    },
}  # fmt: skip
FIRST_STAGE = {
    "target": "sgm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4, "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {
            "double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1],
            "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0, "attn_type": "vanilla-xformers",
        },
    },
}  # fmt: skip
CONDITIONER = {
    "target": "sgm.modules.GeneralConditioner",
    "params": {
        "emb_models": [
            {
                "input_key": "cls", "target": "sgm.modules.encoders.modules.ClassEmbedder", "is_trainable": True, "ucg_rate": 0.1,
                "params": {"embed_dim": 8, "n_classes": 5, "add_sequence_dim": True},
            },
            {"input_key": "size", "target": "sgm.modules.encoders.modules.ConcatTimestepEmbedderND", "params": {"outdim": 8}},
        ]
    },
}  # fmt: skip
SAMPLER = {
    "target": SG + "sampling.EulerEDMSampler",
    "params": {
        "num_steps": 3,
        "discretization_config": LEGACY,
        "guider_config": {"target": SG + "guiders.VanillaCFG", "params": {"scale": 2.0}},
    },
}
LEVELS = {"target": SG + "sigma_sampling.DiscreteSampling", "params": {"num_idx": 1000, "discretization_config": LEGACY}}
LOSS = {
    "target": SG + "loss.StandardDiffusionLoss",
    "params": {"sigma_sampler_config": LEVELS, "loss_weighting_config": {"target": SG + "loss_weighting.EpsWeighting"}},
}


def engine(**options: Any) -> DiffusionEngine:
    config = {
        "network_config": UNET, "denoiser_config": {"target": SG + "denoiser.DiscreteDenoiser", "params": DENOISER},
        "first_stage_config": FIRST_STAGE, "conditioner_config": CONDITIONER, "scale_factor": 0.13, "disable_first_stage_autocast": True,
    }  # fmt: skip
    return instantiate_from_config({"target": "sgm.models.diffusion.DiffusionEngine", "params": {**config, **options}})


def batch(n: int = 2) -> dict[str, Tensor]:
    return {"jpg": torch.rand(n, 16, 16, 3) * 2 - 1, "cls": torch.arange(n) % 4, "size": torch.full((n, 2), 16.0)}


def test_engine_without_a_loss_or_a_sampler_says_so():
    model = engine()
    with pytest.raises(UserError, match="set loss_fn_config"):
        model.shared_step(batch())
    with pytest.raises(ConfigError, match="no sampler"):
        model.sample({}, shape=(4, 8, 8))
    with pytest.raises(UserError, match="no 'jpg'"):
        model.get_input({"image": None})


def test_engine_learns_and_averages():
    torch.manual_seed(0)
    constant = {"warm_up_steps": [1], "cycle_lengths": [100], "f_start": [1.0], "f_max": [1.0], "f_min": [1.0]}
    schedule = {"target": "sgm.lr_scheduler.LambdaLinearScheduler", "params": constant}
    model = engine(loss_fn_config=LOSS, use_ema=True, scheduler_config=schedule)
    model.learning_rate = 3e-3
    (optimizer,), (plan,) = model.configure_optimizers()
    assert plan["interval"] == "step" and isinstance(optimizer, torch.optim.AdamW)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.model.parameters()} <= trained and id(model.conditioner.embedders[0].embedding.weight) in trained
    assert not any(id(p) in trained for p in model.first_stage_model.parameters()) and not model.train().first_stage_model.training
    data = batch(8)
    losses = []
    for _ in range(25):
        loss, logs = model.shared_step(data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.on_train_batch_end(None, data, 0)
        losses.append(float(logs["loss"].detach()))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    own = model.model.diffusion_model.out[2].weight.detach().clone()
    with model.ema_scope():
        assert not torch.equal(model.model.diffusion_model.out[2].weight, own)
    assert torch.equal(model.model.diffusion_model.out[2].weight, own)


def test_engine_draws_pictures():
    model = engine(sampler_config=SAMPLER, en_and_decode_n_samples_a_time=1).eval()
    data = {**batch(), "caption": ["a", "b"]}
    pictures = model.log_images(data, N=2)
    assert {k: tuple(v.shape) for k, v in pictures.items()} == dict.fromkeys(("inputs", "reconstructions", "samples"), (2, 3, 16, 16))
    assert all(torch.isfinite(v).all() for v in pictures.values())
    half = model.half()
    assert half.decode_first_stage(torch.randn(1, 4, 8, 8)).dtype == torch.float16


def test_engine_with_zero_terminal_snr():
    """Pure noise is the last timestep for the samplers of LDM, and a finite level for those over noise levels; both draw."""
    levels = {**LEGACY, "params": {"rescale_betas_zero_snr": True}}
    denoiser = {**DENOISER, "scaling_config": {"target": SG + "denoiser_scaling.VScaling"}, "discretization_config": levels}
    settings = {"denoiser_config": {"target": SG + "denoiser.DiscreteDenoiser", "params": denoiser}, "sampler_config": SAMPLER}
    model = engine(**settings).eval()
    assert model.schedule is not None and model.schedule.abar[-1] == 0.0
    assert model.denoiser.sigmas[-1] == 4096.0 and (model.denoiser.sigmas.diff() > 0).all()
    assert all(torch.isfinite(v).all() for v in model.log_images(batch(), N=2).values())
    cond = model.conditioner(batch())
    for name in ("ddim", "plms", "euler_a", "fast"):
        made = make_sampler(name, model, spacing="trailing")
        drawn, _ = made.sample(4, 2, (4, 8, 8), cond, verbose=False)
        assert made.grid.abar[0] == 0.0 and torch.isfinite(drawn).all()


def test_checkpoints_of_the_engine_come_back(tmp_path: Path) -> None:
    model = engine()
    save_weights(model, tmp_path / "m.safetensors", dtype=torch.float16)
    again = engine()
    load_weights(again, tmp_path / "m.safetensors")
    assert torch.equal(again.denoiser.sigmas, model.denoiser.sigmas)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a if name == "denoiser.sigmas" else a.half().float(), rtol=0, atol=0)
    started = engine(ckpt_path=str(tmp_path / "m.safetensors"))
    assert torch.equal(started.model.diffusion_model.input_blocks[0][0].weight, again.model.diffusion_model.input_blocks[0][0].weight)


# ---------------------------------------------------------------------------------------------------------------- addresses
def addresses() -> list[str]:
    found = []
    for path in sorted((ROOT / "sgm").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                found += [f"{module}.{element.value}" for element in node.value.elts]
    return found


def test_importing_an_address_and_naming_it_in_a_config_give_the_same():
    names = addresses()
    assert {"sgm.modules.GeneralConditioner", "sgm.models.diffusion.DiffusionEngine", SG + "denoiser_weighting.EpsWeighting"} <= set(names)
    for name in names:
        module, _, attribute = name.rpartition(".")
        imported = getattr(importlib.import_module(module), attribute)
        if module != "sgm.util" and isinstance(imported, type) and imported.__module__.startswith("ldm"):
            assert get_obj_from_str(name) is imported


def test_the_package_of_addresses_holds_no_code():
    for path in (ROOT / "sgm").rglob("*.py"):
        kinds = {type(node) for node in ast.parse(path.read_text()).body}
        assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}, path


# --------------------------------------------------------------------------------------------------------------------- SDXL
def test_sdxl_config_has_the_published_values_and_names():
    config = yaml.safe_load((ROOT / "configs/stable-diffusion/sd_xl_base.yaml").read_text())
    assert config == json.loads((REFERENCE / "sd_xl_base.config.json").read_text())
    with gzip.open(REFERENCE / "sd_xl_base.keys.json.gz", "rt") as file:
        expected = {name: tuple(shape) for name, shape in json.load(file).items()}
    with torch.device("meta"):
        model = instantiate_from_config(config["model"])
    got = {published(name): tuple(value.shape) for name, value in model.state_dict().items()}
    wanted = {name: shape for name, shape in expected.items() if not name.endswith(".position_ids")}
    got = {name: shape for name, shape in got.items() if not name.endswith(".position_ids")}
    assert sorted(wanted.keys() - got.keys()) == [] and sorted(got.keys() - wanted.keys()) == []
    assert {name for name in wanted if wanted[name] != got[name]} == set()
    assert model.denoiser.sigmas[-1] == pytest.approx(14.614641, rel=1e-6)
