from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import UserError
from tests.models.sampler_stubs import Analytic, Gaussian

SHAPE = (4, 8, 8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run(ref, sampler, seed, guidance=None, **kwargs):
    """The stored cases' recipe: every step kept, one draw afterwards to see how many came before."""
    if guidance is not None:
        kwargs |= dict(unconditional_guidance_scale=guidance, unconditional_conditioning=ref.input("uc"))
    torch.manual_seed(seed)
    inputs = dict(conditioning=ref.input("c"), x_T=ref.input("x_T"))
    samples, kept = sampler.sample(batch_size=2, shape=SHAPE, verbose=False, log_every_t=1, **inputs, **kwargs)
    kept = {name: torch.stack(tensors) for name, tensors in kept.items()}
    return dict(samples=samples, **kept, post_rng=torch.randn(4), timesteps=sampler.ddim_timesteps)


@pytest.mark.parametrize(
    "case, kind, seed, guidance, options",
    [
        ("d01_ddim_eta0_20", "eps", 1020, 7.5, dict()),
        ("d02_ddim_eta1_20", "eps", 2020, 7.5, dict(eta=1.0)),
        ("d03_ddim_nocfg_20", "eps", 3001, None, dict()),
        ("d07_ddim_inpaint_mask", "eps", 4242, 7.5, dict(masked=True)),
        ("d11_ddim_v", "v", 5001, 7.5, dict()),
    ],
)
def test_published_numbers(reference, case, kind, seed, guidance, options):
    ref = reference(case)
    if options.pop("masked", False):
        options = dict(mask=ref.input("mask"), x0=ref.input("x0"))
    ref.check_all(run(ref, DDIMSampler(Analytic(kind)), seed, guidance, S=20, **options))


def test_published_schedule_attributes(reference):
    ref, outputs = reference("d32_ddim_schedule_params"), {}
    names = ("ddim_sigmas", "ddim_alphas", "ddim_alphas_prev", "ddim_sqrt_one_minus_alphas", "ddim_sigmas_for_original_num_steps")
    for steps, eta, spacing in ((20, 0.0, "uniform"), (50, 0.0, "uniform"), (20, 1.0, "uniform"), (50, 0.5, "uniform"), (10, 1.0, "quad")):
        sampler = DDIMSampler(Analytic())
        sampler.make_schedule(steps, spacing, eta, verbose=False)
        prefix = f"{spacing}_{steps}_eta{eta:g}/"
        outputs |= {prefix + name: getattr(sampler, name) for name in names} | {prefix + "timesteps": sampler.ddim_timesteps}
    ref.check_all(outputs)
    assert sampler.ddpm_num_timesteps == 1000 and sampler.schedule == "linear"
    abar = torch.from_numpy(sampler.noise_schedule.abar).float()
    assert torch.equal(sampler.alphas_cumprod, abar)
    torch.testing.assert_close(sampler.sqrt_one_minus_alphas_cumprod, (1 - abar.double()).sqrt().float(), rtol=1e-4, atol=0)


def test_published_img2img(reference):
    ref, outputs = reference("d33_img2img"), {}
    x0, noise, c = (ref.input(name) for name in ("x0", "noise", "c"))
    guidance = dict(unconditional_guidance_scale=7.5, unconditional_conditioning=ref.input("uc"))
    sampler = DDIMSampler(Analytic())
    sampler.make_schedule(50, ddim_eta=0.0, verbose=False)
    for strength in (0.1, 0.3, 0.5, 0.75, 0.98):
        t_enc = int(strength * 50)
        outputs[f"z_{strength:g}"] = z = sampler.stochastic_encode(x0, torch.tensor([t_enc] * 2), noise=noise)
        outputs[f"dec_{strength:g}"] = sampler.decode(z, c, t_enc, **guidance)
    torch.manual_seed(8001)
    outputs["z_0.5_seed8001"] = sampler.stochastic_encode(x0, torch.tensor([25] * 2))
    outputs["z_orig_steps_500"] = sampler.stochastic_encode(x0, torch.tensor([500, 999]), use_original_steps=True, noise=noise)
    sampler.make_schedule(20, ddim_eta=1.0, verbose=False)
    torch.manual_seed(8002)
    z = sampler.stochastic_encode(x0, torch.tensor([15] * 2), noise=noise)
    outputs["dec_eta1_S20_t15_seed8002"] = sampler.decode(z, c, 15, **guidance)
    ref.check_all(outputs)


def test_published_dict_conditioning(reference):
    ref = reference("d35_ddim_hybrid_dict")
    cat = [ref.input("cat")]
    cond, uncond = ({"c_concat": cat, "c_crossattn": [ref.input(name)]} for name in ("c", "uc"))
    torch.manual_seed(8100)
    samples, _ = DDIMSampler(Analytic()).sample(
        10, 2, SHAPE, cond, x_T=ref.input("x_T"), eta=1.0, verbose=False,
        unconditional_guidance_scale=9.0, unconditional_conditioning=uncond,
    )  # fmt: skip
    ref.check(ddim=samples, post_rng=torch.randn(4))


def test_step_by_step_parity_with_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(25)
    model = Analytic()
    sampler = DDIMSampler(model)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    steps = list(sampler.walk(sampler.make_schedule(25, verbose=False), x))
    assert [step.t for step in steps] == scheduler.timesteps.tolist()
    for step in steps:
        x = scheduler.step(model.apply_model(x, torch.full((2,), step.t), None), step.t, x).prev_sample
        torch.testing.assert_close(step.x, x, atol=1e-4, rtol=1e-4)
        x = step.x


# ------------------------------------------------------------------------------------------------------------ randomness


def draws_between(call) -> int:
    """How many standard normal (2, 4, 8, 8) tensors the call takes from the global generator."""
    torch.manual_seed(0)
    call()
    after = torch.randn(4)
    torch.manual_seed(0)
    for count in range(100):
        state = torch.get_rng_state()
        if torch.equal(torch.randn(4), after):
            return count
        torch.set_rng_state(state)
        torch.randn(2, *SHAPE)
    raise AssertionError("more than 100 draws, or draws of another shape")


def sample(sampler, steps=6, **kwargs):
    return sampler.sample(steps, 2, SHAPE, verbose=False, **{"x_T": torch.zeros(2, *SHAPE), **kwargs})[0]


def test_number_of_random_draws():
    ddim, keep = DDIMSampler(Analytic()), dict(mask=torch.ones(2, 1, 8, 8), x0=torch.zeros(2, *SHAPE))
    assert draws_between(lambda: sample(ddim, 10)) == 10
    assert draws_between(lambda: sample(ddim, 10, eta=1.0)) == 10
    assert draws_between(lambda: sample(ddim, 10, x_T=None)) == 11
    assert draws_between(lambda: sample(ddim, 10, **keep)) == 20
    assert draws_between(lambda: sample(PLMSSampler(Analytic()), 10)) == 11
    ddim.make_schedule(10, verbose=False)
    assert draws_between(lambda: ddim.stochastic_encode(torch.zeros(2, *SHAPE), 5)) == 1
    assert draws_between(lambda: ddim.decode(torch.zeros(2, *SHAPE), None, 5)) == 5
    assert draws_between(lambda: ddim.encode(torch.zeros(2, *SHAPE), None, 5)) == 0


class PerImage:
    """Image k draws from its own generator."""

    def __init__(self, seeds):
        self.generators, self.calls = [torch.Generator().manual_seed(seed) for seed in seeds], 0

    def __call__(self, shape, device, dtype):
        self.calls += 1
        return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators]).to(device, dtype)


@pytest.mark.parametrize("options", [dict(), dict(eta=1.0), dict(eta=1.0, noise_dropout=0.3), dict(mask=1)])
def test_a_noise_source_makes_images_independent_of_their_batch(options):
    def draw(seeds):
        n = len(seeds)
        extra = dict(options)
        if "mask" in options:
            extra = dict(mask=torch.ones(n, 1, 8, 8), x0=torch.zeros(n, *SHAPE))
        before = torch.get_rng_state()
        samples = DDIMSampler(Analytic(), noise=PerImage(seeds)).sample(6, n, SHAPE, verbose=False, **extra)[0]
        assert torch.equal(before, torch.get_rng_state())
        return samples

    together = draw([1, 2, 3])
    for k, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(draw([seed])[0], together[k])


def test_a_noise_source_is_not_asked_in_vain():
    source = PerImage([0, 1])
    sample(DDIMSampler(Analytic(), noise=source), 10, x_T=None)
    assert source.calls == 1
    sample(DDIMSampler(Analytic(), noise=source), 10, eta=1.0)
    assert source.calls == 11


def test_noise_dropout_repeat_noise_and_temperature():
    ddim = DDIMSampler(Gaussian())
    torch.manual_seed(0)
    samples = sample(ddim, 6, eta=1.0, repeat_noise=True)
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(sample(ddim, 6, eta=1.0, temperature=0.0)[0], sample(ddim, 6, eta=1.0, temperature=0.0)[0])
    torch.manual_seed(0)
    assert not torch.equal(sample(ddim, 6, eta=1.0, noise_dropout=0.5), samples)


# -------------------------------------------------------------------------------------------------------------- guidance


def test_guidance_is_one_call_unconditional_first():
    model, seen = Analytic(), []
    model.output = lambda x, t, cond: seen.append((x.shape[0], t.tolist(), cond[:, 0, 0].tolist())) or torch.zeros_like(x)
    c, uc = torch.full((2, 1, 4), 1.0), torch.full((2, 1, 4), -1.0)
    Denoiser(model, c, uc, 2.0)(torch.zeros(2, *SHAPE), 7)
    assert seen == [(4, [7, 7, 7, 7], [-1.0, -1.0, 1.0, 1.0])]


def test_guidance_scale_1_or_no_unconditional_is_one_plain_call():
    model, c = Analytic(), torch.ones(2, 1, 4)
    Denoiser(model, c, -c, 1.0)(torch.zeros(2, *SHAPE), 7)
    Denoiser(model, c, None, 5.0)(torch.zeros(2, *SHAPE), 7)
    assert model.batches == [2, 2]


@pytest.mark.parametrize("form", [lambda c: c, lambda c: [c], lambda c: {"c_crossattn": [c]}])
def test_all_forms_of_conditioning_agree(form):
    g = torch.Generator().manual_seed(0)
    c, uc, x = torch.randn(2, 1, 4, generator=g), torch.randn(2, 1, 4, generator=g), torch.randn(2, *SHAPE, generator=g)
    plain = Denoiser(Analytic(), c, uc, 3.0)(x, 500)
    torch.testing.assert_close(Denoiser(Analytic(), form(c), form(uc), 3.0)(x, 500), plain)
    shared = Denoiser(Analytic(), form(c), form(uc[:1]), 3.0)(x, 500)  # one empty prompt for the whole batch
    torch.testing.assert_close(shared[0], plain[0])


def test_token_lengths_may_be_multiples_and_nothing_else():
    class Attention(Analytic):
        def output(self, x, t, cond):
            weights = torch.softmax(cond.sum(-1), dim=1)  # (B, L), as attention sees tokens
            return x * (weights * cond[:, :, 0]).sum(1).reshape(-1, 1, 1, 1)

    c, uc, x = torch.randn(2, 6, 4), torch.randn(2, 3, 4), torch.randn(2, *SHAPE)
    joined = Denoiser(Attention(), c, uc, 3.0)(x, 5)
    apart = [Denoiser(Attention(), cond)(x, 5) for cond in (uc, c)]
    torch.testing.assert_close(joined, apart[0] + 3.0 * (apart[1] - apart[0]))
    with pytest.raises(UserError, match=r"\(2, 6, 4\).*\(2, 4, 4\)"):
        Denoiser(Attention(), c, torch.randn(2, 4, 4), 3.0)(x, 5)


@pytest.mark.parametrize(
    "cond, uncond, message",
    [
        (torch.zeros(3, 1, 4), torch.zeros(3, 1, 4), "does not fit a batch of 2"),
        ({"c_crossattn": [torch.zeros(2, 1, 4)]}, torch.zeros(2, 1, 4), "same form"),
        ({"c_crossattn": [torch.zeros(2, 1, 4)]}, {"c_concat": [torch.zeros(2, 1, 4)]}, "c_concat.*differ"),
        ([torch.zeros(2, 1, 4)], [torch.zeros(2, 1, 4)] * 2, "1 conditional and 2 unconditional"),
    ],
)
def test_conditioning_that_does_not_fit_is_refused(cond, uncond, message):
    with pytest.raises(UserError, match=message):
        Denoiser(Analytic(), cond, uncond, 2.0)(torch.zeros(2, *SHAPE), 5)


def test_guidance_rescale_keeps_the_conditional_spread():
    g = torch.Generator().manual_seed(0)
    c, uc, x = torch.randn(2, 1, 4, generator=g), torch.randn(2, 1, 4, generator=g), torch.randn(2, *SHAPE, generator=g)
    rescaled = Denoiser(Analytic(), c, uc, 7.5, rescale=1.0)(x, 500)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), Denoiser(Analytic(), c)(x, 500).std((1, 2, 3)))
    torch.testing.assert_close(Denoiser(Analytic(), c, uc, 7.5, rescale=0.0)(x, 500), Denoiser(Analytic(), c, uc, 7.5)(x, 500))
    with pytest.raises(UserError, match=r"0 \(off\) to 1"):
        Denoiser(Analytic(), rescale=1.5)


def test_guidance_schedule():
    c, uc = torch.ones(2, 1, 4), -torch.ones(2, 1, 4)
    model = Analytic()
    options = dict(conditioning=c, unconditional_conditioning=uc, x_T=torch.ones(2, *SHAPE))
    constant = sample(DDIMSampler(model), 5, unconditional_guidance_scale=3.0, **options)
    torch.testing.assert_close(sample(DDIMSampler(model), 5, ucg_schedule=[3.0] * 5, **options), constant)
    model.batches.clear()
    sample(DDIMSampler(model), 5, ucg_schedule=[3.0, 2.0, 1.0, 1.0, 1.0], **options)
    assert model.batches == [4, 4, 2, 2, 2]
    with pytest.raises(UserError, match="4 guidance scales for 5 steps"):
        sample(DDIMSampler(model), 5, ucg_schedule=[1.0] * 4, **options)


def test_one_timestep_per_sample_equals_one_for_all():
    for kind in ("eps", "x0", "v"):
        denoiser, x = Denoiser(Analytic(kind)), torch.randn(2, *SHAPE)
        torch.testing.assert_close(denoiser(x, torch.tensor([300, 300])), denoiser(x, 300))


def test_the_network_runs_in_its_own_dtype_and_the_solver_in_float32():
    class Half(torch.nn.Module):
        parameterization, first_stage_model = "eps", None

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 4, 1).to(torch.bfloat16)
            self.register_buffer("alphas_cumprod", Analytic().alphas_cumprod)
            self.dtypes = set()

        def apply_model(self, x, t, cond):
            self.dtypes |= {x.dtype, cond.dtype}
            return self.conv(x)

    model = Half()
    options = dict(conditioning=torch.zeros(2, 1, 4), unconditional_conditioning=torch.zeros(2, 1, 4), unconditional_guidance_scale=2.0)
    samples = sample(DDIMSampler(model), 4, x_T=torch.randn(2, *SHAPE).half(), **options)
    assert samples.dtype == torch.float32 and not samples.requires_grad and model.dtypes == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------- the one loop


def test_score_corrector_callbacks_and_intermediates():
    class Shrink:
        def modify_score(self, model, eps, x, t, cond, factor):
            assert t.shape == (2,)
            return factor * eps

    numbers, previews = [], []
    ddim = DDIMSampler(Analytic())
    torch.manual_seed(0)
    samples, kept = ddim.sample(
        5, 2, SHAPE, verbose=False, x_T=torch.ones(2, *SHAPE), callback=numbers.append, img_callback=lambda x0, i: previews.append((i, x0)),
        score_corrector=Shrink(), corrector_kwargs=dict(factor=0.9), log_every_t=2,
    )  # fmt: skip
    assert numbers == [0, 1, 2, 3, 4] == [i for i, _ in previews]
    assert len(kept["x_inter"]) == len(kept["pred_x0"]) == 4  # the start, and the steps with 4, 2, 0 to go
    assert torch.equal(kept["x_inter"][-1], samples) and torch.equal(kept["pred_x0"][-1], previews[-1][1])
    assert not torch.allclose(samples, sample(ddim, 5, x_T=torch.ones(2, *SHAPE)))


def test_quantised_and_thresholded_x0():
    class Codebook:
        def quantize(self, x0):
            return x0.round(), None, None

    model, kept = Analytic(), []
    with pytest.raises(UserError, match="codebook"):
        sample(DDIMSampler(model), 5, quantize_x0=True)
    model.first_stage_model = Codebook()
    sample(DDIMSampler(model), 5, quantize_x0=True, img_callback=lambda x0, i: kept.append(x0))
    assert all(torch.equal(x0, x0.round()) for x0 in kept)
    kept.clear()
    sample(DDIMSampler(model), 5, x_T=torch.ones(2, *SHAPE), dynamic_threshold=0.5, img_callback=lambda x0, i: kept.append(x0))
    assert all(x0.square().mean().sqrt() <= 0.5 + 1e-6 for x0 in kept)


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
def test_img2img_at_both_ends_of_strength(sampler_class):
    sampler, x0 = sampler_class(Analytic()), torch.randn(2, *SHAPE)
    sampler.make_schedule(10, verbose=False)
    noise = torch.randn(2, *SHAPE)
    assert torch.equal(sampler.stochastic_encode(x0, 10, noise=noise), noise)  # strength 1: nothing of x0 is left
    full = sampler.decode(noise, None, 10)
    torch.testing.assert_close(full, sample(sampler, 10, x_T=noise))
    assert torch.equal(sampler.decode(x0, None, 0), x0)
    z = sampler.stochastic_encode(x0, [4, 4], noise=noise)
    torch.testing.assert_close(sampler.decode(z, None, 4), sample(sampler, 10, x_T=z, t_start=4))
    with pytest.raises(UserError, match="give 0 to 10"):
        sampler.stochastic_encode(x0, 11)
    with pytest.raises(UserError, match="from 0 to 10"):
        sampler.decode(x0, None, 11)


@pytest.mark.parametrize("steps, taken", [(1.5, 0), (7, 6), (20, 19), (25, 19), (0.5, 0)])
def test_legacy_subset_of_timesteps(steps, taken):
    model = Analytic()
    sampler, x_T = DDIMSampler(model), torch.randn(2, *SHAPE)
    sampler.make_schedule(20, verbose=False)
    samples, kept = sampler.ddim_sampling(None, (2, *SHAPE), x_T=x_T, timesteps=steps, log_every_t=1)
    assert len(kept["x_inter"]) == taken + 1 and model.asked == sampler.ddim_timesteps[:taken][::-1].tolist()
    assert taken or torch.equal(samples, x_T)


def test_original_steps_and_single_steps():
    model = Analytic()
    sampler, x = DDIMSampler(model), torch.randn(2, *SHAPE)
    sampler.make_schedule(10, verbose=False)
    torch.manual_seed(0)
    samples, _ = sampler.ddim_sampling(None, (2, *SHAPE), x_T=x, ddim_use_original_steps=True, timesteps=5)
    assert model.asked == [4, 3, 2, 1, 0] and torch.isfinite(samples).all()
    torch.manual_seed(0)
    for index in (4, 3, 2, 1, 0):
        x, _ = sampler.p_sample_ddim(x, None, torch.full((2,), index), index, use_original_steps=True)
    torch.testing.assert_close(x, samples)


def test_the_checkpoints_schedule_is_believed():
    model = Analytic()
    model.alphas_cumprod = torch.linspace(0.99, 0.01, 100)
    assert DDIMSampler(model).ddpm_num_timesteps == 100
    del model.alphas_cumprod, model.schedule
    with pytest.raises(UserError, match="no noise schedule"):
        DDIMSampler(model)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "from 1 to 1000"),
        (dict(steps=1001), "from 1 to 1000"),
        (dict(order=3), "does not know order.*t_start"),
        (dict(mask=torch.ones(2, 1, 8, 8)), "a mask needs x0"),
        (dict(x0=torch.ones(2, 4, 8, 8)), "without a mask"),
        (dict(mask=torch.ones(2, 1, 4, 8), x0=torch.ones(2, 4, 8, 8)), "shape of the samples"),
        (dict(x_T=torch.ones(1, 4, 8, 8)), "x_T has shape"),
        (dict(noise_dropout=1.0), "fraction"),
        (dict(normals_sequence=[1]), "noise=SOURCE"),
        (dict(ddim_discretize="caras"), "trailing"),
    ],
)
@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
def test_what_cannot_be_honoured_is_refused_in_words(sampler_class, options, message):
    with pytest.raises(UserError, match=message):
        sample(sampler_class(Analytic()), **options)
    with pytest.raises(UserError, match="noise"):
        sampler_class(Analytic(), noises=None)
    with pytest.raises(UserError, match="make_schedule"):
        sampler_class(Analytic()).decode(torch.zeros(2, *SHAPE), None, 3)


def test_quantize_x0_with_an_identity_stage_keeps_every_image():
    """An identity first stage gives a tensor, not a tuple: taking its first entry would draw image 0 for the whole batch."""
    from ldm.models.autoencoder import IdentityFirstStage

    model = Analytic()
    model.first_stage_model = IdentityFirstStage()
    x_T = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    options = {"x_T": x_T, "verbose": False}
    plain, _ = DDIMSampler(model).sample(5, 3, SHAPE, **options)
    snapped, _ = DDIMSampler(model).sample(5, 3, SHAPE, quantize_x0=True, **options)
    torch.testing.assert_close(snapped, plain)
