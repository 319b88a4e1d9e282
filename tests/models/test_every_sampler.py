"""What holds for every sampler of the registry: names, step counts, dtypes, predictions, img2img, masks, inversion, zero terminal SNR."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ldm.models.diffusion.registry import ALIASES, RECOMMENDED, SAMPLERS, SPACINGS, make_sampler, sampler_info
from ldm.models.diffusion.sampler import Sampler
from ldm.modules.diffusionmodules.schedule import NoiseSchedule, make_beta_schedule
from ldm.util import UserError
from tests.models.sampler_stubs import Analytic, Gaussian, sd_schedule

SHAPE = (4, 2, 2)
NAMES = list(SAMPLERS)
STOCHASTIC = [name for name, info in SAMPLERS.items() if info.stochastic]
DETERMINISTIC = [name for name, info in SAMPLERS.items() if not info.stochastic]
# On a short schedule every step count can be tried.
SHORT = NoiseSchedule(make_beta_schedule("linear", 12, linear_start=0.01, linear_end=0.75))
ZERO_SNR = NoiseSchedule(make_beta_schedule("linear", 1000, 0.00085, 0.012, zero_terminal_snr=True))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def accurate(name: str, model: Gaussian) -> Sampler:
    """A sampler on a grid that suits it: bh1 takes long steps badly, and linspace ends in one."""
    return make_sampler(name, model, spacing="karras" if name == "unipc_bh1" else None)


def draw(sampler: Sampler, steps: int, dtype: torch.dtype = torch.float32, **options) -> torch.Tensor:
    x_T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    return sampler.sample(steps, 2, SHAPE, verbose=False, **{"x_T": x_T, **options})[0]


# ----------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", NAMES)
def test_registry_entries(name):
    info, sampler = SAMPLERS[name], make_sampler(name, Analytic())
    assert info.name == name and isinstance(sampler, Sampler) and info.summary and "\n" not in info.summary
    assert sampler.invertible == info.invertible == (not info.stochastic)
    assert (sampler.default_eta > 0) == info.stochastic


def test_names_and_aliases():
    assert {"ddim", "plms", "dpm_solver", RECOMMENDED} <= set(SAMPLERS)
    assert set(ALIASES.values()) <= set(SAMPLERS) and not set(ALIASES) & set(SAMPLERS)
    for alias in ("dpm", "DPM-Solver", "dpm_solver"):
        assert sampler_info(alias).name == "dpm_solver"
    assert sampler_info("DPM++ 2M Karras").name == "dpmpp_2m_karras"
    assert sampler_info("Euler a").name == "euler_a" and sampler_info("recommended").name == RECOMMENDED
    with pytest.raises(UserError, match=r"'eulr': did you mean euler"):
        sampler_info("eulr")
    with pytest.raises(UserError, match="does not know quality"):
        make_sampler("euler", Analytic(), quality=3)
    assert (
        make_sampler("euler", Analytic(), spacing="karras").make_schedule(5).t[1] != make_sampler("euler", Analytic()).make_schedule(5).t[1]
    )


def test_the_registry_imports_no_torch():
    code = "import sys; import ldm.models.diffusion.registry as r; r.sampler_info('ddim'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ------------------------------------------------------------------------------------------- step counts, dtypes, predictions


@pytest.mark.parametrize("kind, dtype", [("eps", torch.float32), ("v", torch.bfloat16), ("x0", torch.float64)])
@pytest.mark.parametrize("name", NAMES)
def test_every_step_count_of_a_short_schedule(name, kind, dtype):
    sampler = make_sampler(name, Analytic(kind, SHORT))
    for steps in range(1, SHORT.T + 1):
        samples = draw(sampler, steps, dtype)
        assert samples.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert samples.isfinite().all(), steps
        assert len(sampler.grid) == steps or (sampler.spacing == "uniform" and steps < len(sampler.grid) <= SHORT.T)


@pytest.mark.parametrize("name", NAMES)
def test_step_counts_of_a_long_schedule(name):
    sampler = make_sampler(name, Analytic())
    for steps in (1, 2, 3, 19) if SAMPLERS[name].options.get("final") == "clean" else (1, 2, 3, 7, 111, 999, 1000):
        assert draw(sampler, steps).isfinite().all(), steps
    for steps in (0, 1001, 2.5):
        with pytest.raises(UserError, match="whole number from 1 to 1000"):
            draw(sampler, steps)


@pytest.mark.parametrize("name", NAMES)
def test_schedules_of_one_and_two_timesteps(name):
    for T in (1, 2):
        sampler = make_sampler(name, Analytic(schedule=NoiseSchedule(np.full(T, 0.4))))
        for steps in range(1, T + 1):
            assert draw(sampler, steps).isfinite().all()


KINDS = ("ddim", "plms", "ddpm", "euler", "euler_a", "heun", "dpm_solver", "dpmpp_3s", "dpmpp_2m_sde", "unipc", "fast")
NO_QUAD = ("dpm_solver", "dpmpp_3s", "dpmpp_2m_sde", "fast")  # these offer time_quadratic instead


@pytest.mark.parametrize("name, spacing", [(n, s) for n in KINDS for s in SPACINGS if s != "quad" or n not in NO_QUAD])
def test_every_grid_with_every_kind_of_sampler(name, spacing):
    for schedule in (sd_schedule(), SHORT):
        sampler = make_sampler(name, Analytic("v", schedule))
        for final in ("first", "clean"):
            for steps in (1, 2, 3, 11, 12):
                samples = draw(sampler, steps, ddim_discretize=spacing, final=final)
                assert samples.isfinite().all(), (final, steps)
            assert sampler.grid.abar_prev[-1] == (1.0 if final == "clean" else schedule.abar[0])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_what_the_network_predicts_makes_no_difference(name):
    eps, x0, v = (draw(make_sampler(name, Gaussian(parameterization=kind)), 12, torch.float64) for kind in ("eps", "x0", "v"))
    torch.testing.assert_close(x0, eps)
    torch.testing.assert_close(v, eps)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_what_the_network_predicts_makes_no_difference_with_noise(name):
    samples = []
    for kind in ("eps", "x0", "v"):
        torch.manual_seed(1)
        samples.append(draw(make_sampler(name, Gaussian(parameterization=kind)), 12, torch.float64))
    torch.testing.assert_close(samples[1], samples[0])
    torch.testing.assert_close(samples[2], samples[0])


# ------------------------------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("name", NAMES)
def test_every_sampler_draws_the_data(name):
    """Gaussian data: mean and spread of many samples, with noise and without."""
    sampler = accurate(name, Gaussian(mean=0.5, std=0.3))
    samples, _ = sampler.sample(60, 1500, (1, 1, 2), verbose=False)
    assert samples.mean().item() == pytest.approx(0.5, abs=0.04)
    assert samples.std().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("name", NAMES)
def test_img2img_starts_where_the_noise_is(name):
    """From data noised half-way, each sampler gives data again; from all the way it is txt2img."""
    sampler = accurate(name, Gaussian(mean=0.5, std=0.3))
    sampler.make_schedule(60, verbose=False)
    n = len(sampler.grid)
    x0 = 0.5 + 0.3 * torch.randn(1000, 1, 1, 2)
    for t_start in (1, n // 2, n):
        z = sampler.stochastic_encode(x0, t_start)
        back = sampler.decode(z, None, t_start)
        assert back.mean().item() == pytest.approx(0.5, abs=0.06) and back.std().item() == pytest.approx(0.3, abs=0.06)
    noise = torch.randn_like(x0)
    assert torch.equal(sampler.stochastic_encode(x0, n, noise=noise), noise)
    if not sampler.shifted_levels:
        assert torch.equal(sampler.stochastic_encode(x0, 0), x0) and torch.equal(sampler.decode(x0, None, 0), x0)
        spread = sampler.stochastic_encode(torch.zeros_like(x0), n // 2, noise=noise).std() / noise.std()
        assert spread.item() == pytest.approx((1 - sampler.grid.last(n // 2).abar[0]) ** 0.5, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_masks_keep_what_they_should(name):
    mask, x0 = torch.zeros(1, 1, 2, 2), torch.full((2, *SHAPE), 2.0)
    mask[..., 0] = 1.0
    samples = draw(make_sampler(name, Analytic()), 60, mask=mask.expand(2, 1, 2, 2), x0=x0)
    assert (samples[..., 0] - 2.0).abs().mean() < 0.35 < (samples[..., 1] - 2.0).abs().mean()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inversion_is_undone(name):
    sampler, errors = make_sampler(name, Gaussian()), []
    x0 = 0.5 + 0.3 * torch.randn(8, 1, 2, 2, dtype=torch.float64)
    for steps in (40, 160):
        sampler.make_schedule(steps, verbose=False)
        z, _ = sampler.encode(x0, None, len(sampler.grid))
        assert z.mean().abs() < 0.6 and 0.6 < z.std() < 1.4
        errors.append((sampler.decode(z, None, len(sampler.grid)) - x0).abs().max().item())
    assert errors[1] < max(0.5 * errors[0], 0.01) and errors[1] < 0.08


@pytest.mark.parametrize("name", STOCHASTIC)
def test_inversion_is_refused_where_there_is_none(name):
    sampler = make_sampler(name, Analytic())
    sampler.make_schedule(5, verbose=False)
    with pytest.raises(UserError, match="no way back"):
        sampler.encode(torch.zeros(2, *SHAPE), None, 5)


@pytest.mark.parametrize("kind", ["v", "x0"])
@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name, kind):
    sampler = accurate(name, Gaussian(parameterization=kind, schedule=ZERO_SNR))
    spacing = "trailing" if name in ("ddim", "plms") else None  # the published grid leaves pure noise out
    samples, _ = sampler.sample(60, 1500, (1, 1, 2), ddim_discretize=spacing, verbose=False)
    assert sampler.grid.abar[0] == 0.0
    assert samples.mean().item() == pytest.approx(0.5, abs=0.04) and samples.std().item() == pytest.approx(0.3, abs=0.04)
    short = NoiseSchedule(make_beta_schedule("linear", 12, 0.01, 0.75, zero_terminal_snr=True))
    for steps in range(1, 13):
        assert draw(make_sampler(name, Analytic(kind, short)), steps, ddim_discretize=spacing).isfinite().all(), steps
    with pytest.raises(UserError, match="pure noise"):
        draw(make_sampler(name, Gaussian(parameterization="eps", schedule=ZERO_SNR)), 10, ddim_discretize=spacing)


@pytest.mark.parametrize("name", NAMES)
def test_guidance_rescale_limits_and_callbacks_work(name):
    model, numbers = Analytic("v"), []
    c, uc = torch.ones(2, 1, 4), -torch.ones(2, 1, 4)
    guided = dict(conditioning=c, unconditional_conditioning=uc, unconditional_guidance_scale=6.0)
    plain, rescaled, limited = (
        draw(make_sampler(name, model), 9, **guided, **more) for more in ({}, {"guidance_rescale": 0.7}, {"dynamic_threshold": 0.1})
    )
    assert not torch.allclose(plain, rescaled) and limited.abs().mean() < plain.abs().mean()
    sampler = make_sampler(name, model)
    _, kept = sampler.sample(9, 2, SHAPE, callback=numbers.append, log_every_t=1, verbose=False)
    assert numbers == list(range(len(sampler.grid))) and len(kept["x_inter"]) == len(sampler.grid) + 1


# ------------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("name", STOCHASTIC)
def test_eta_of_stochastic_samplers(name):
    sampler = make_sampler(name, Analytic())
    torch.manual_seed(0)
    first = draw(sampler, 6)
    assert not torch.equal(first, draw(sampler, 6))  # it draws
    with pytest.raises(UserError, match="eta"):
        draw(sampler, 6, eta=0.0)


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "ddim"])
def test_eta_of_deterministic_samplers(name):
    sampler = make_sampler(name, Analytic())
    assert torch.equal(draw(sampler, 6), draw(sampler, 6, eta=0.0))
    with pytest.raises(UserError, match="eta"):
        draw(sampler, 6, eta=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_a_noise_source_makes_images_independent_of_their_batch(name):
    class PerImage:
        def __init__(self, seeds):
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def __call__(self, shape, device, dtype):
            return torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators]).to(device, dtype)

    def images(seeds):
        sampler = make_sampler(name, Analytic(), noise=PerImage(seeds))
        return sampler.sample(6, len(seeds), SHAPE, verbose=False)[0]

    before = torch.get_rng_state()
    together = images([1, 2])
    torch.testing.assert_close(images([2])[0], together[1])
    assert torch.equal(before, torch.get_rng_state())
