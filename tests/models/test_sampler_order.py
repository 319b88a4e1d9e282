"""Solvers against truth: Gaussian data has an exact denoiser and a closed-form flow, so the order of a solver can be measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.diffusionmodules.schedule import NoiseSchedule, make_beta_schedule
from ldm.util import UserError
from tests.models.sampler_stubs import Analytic, Gaussian

STEPS = (100, 200, 250, 500)  # divisors of 1000 give an even grid
# Every step count at which the historical uniform list left the timesteps, the ends of that range, and some ordinary ones.
ALL_KINDS_OF_STEPS = [1, 2, 3, 4, 7, 9, 10, 27, 30, 36, 37, *range(101, 112), 250, 251, 333, 500, 501, 600, 999, 1000]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def flow_error(sampler, steps: int) -> float:
    """Largest distance from the exact flow at timestep 1, in float64.

    The historical grid adds a step of length 1 from there to timestep 0, whatever the length of the others; a multistep
    method is not of its order over such a step, and its error there hides the rest.
    """
    grid = sampler.make_schedule(steps, verbose=False)
    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = sampler.model.flow(x, float(grid.abar[0]), float(grid.abar[-1]))
    *_, at_1, _ = sampler.walk(grid, x)
    assert at_1.x.dtype == torch.float64
    return float((at_1.x - truth).abs().max())


def slope(sampler) -> float:
    return float(-np.polyfit(np.log(STEPS), np.log([flow_error(sampler, steps) for steps in STEPS]), 1)[0])


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_ddim_is_of_first_order(parameterization):
    assert slope(DDIMSampler(Gaussian(parameterization=parameterization))) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_plms_is_of_second_order_at_least(parameterization):
    sampler = PLMSSampler(Gaussian(parameterization=parameterization))
    assert slope(sampler) >= 1.8
    assert flow_error(sampler, 50) < 0.25 * flow_error(DDIMSampler(sampler.model), 50)


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
def test_what_the_network_predicts_makes_no_difference(sampler_class):
    x_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    samples = [
        sampler_class(Gaussian(parameterization=kind)).sample(20, 2, (4, 8, 8), x_T=x_T, verbose=False)[0] for kind in ("eps", "x0", "v")
    ]
    torch.testing.assert_close(samples[1], samples[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(samples[2], samples[0], atol=1e-4, rtol=1e-4)


def test_ddim_at_eta_1_draws_the_data_distribution():
    torch.manual_seed(0)
    samples, _ = DDIMSampler(Gaussian(mean=0.5, std=0.3)).sample(200, 4000, (1, 2, 2), eta=1.0, verbose=False)
    assert samples.mean().item() == pytest.approx(0.5, abs=0.02)
    assert samples.std().item() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("spacing", ["uniform", "quad", "linspace", "leading", "trailing"])
def test_every_spacing_leads_to_the_data(spacing):
    model = Gaussian(mean=0.5, std=0.3)
    samples, _ = PLMSSampler(model).sample(100, 500, (1, 2, 2), ddim_discretize=spacing, verbose=False)
    assert samples.mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
def test_every_step_count_is_finite(sampler_class):
    model = Analytic()
    x_T = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    for steps in ALL_KINDS_OF_STEPS:
        sampler = sampler_class(model)
        samples, _ = sampler.sample(steps, 1, (4, 2, 2), x_T=x_T, verbose=False)
        assert torch.isfinite(samples).all(), steps
    assert max(model.asked) == 999 and min(model.asked) == 0


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler])
def test_inversion_is_undone_by_decoding(sampler_class):
    model = Gaussian()
    sampler = sampler_class(model)
    x0 = 0.5 + 0.3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = []
    for steps in (50, 200):
        sampler.make_schedule(steps, verbose=False)
        z, out = sampler.encode(x0, None, steps, return_intermediates=5)
        assert 0.8 < z.std().item() < 1.2 and len(out["intermediates"]) == len(out["intermediate_steps"])
        errors.append((sampler.decode(z, None, steps) - x0).abs().max().item())
    assert errors[1] < 0.35 * errors[0] and errors[1] < 0.05


def test_inversion_asks_the_model_at_true_timesteps():
    model = Gaussian()
    sampler = DDIMSampler(model)
    sampler.make_schedule(20, verbose=False)
    sampler.encode(torch.zeros(1, 4, 2, 2), None, 5)
    assert model.asked == [0, 1, 51, 101, 151]  # the level x is at, not the loop's index


def test_zero_terminal_snr_works_with_v_and_is_refused_with_eps():
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, 0.00085, 0.012, zero_terminal_snr=True))
    options = dict(ddim_discretize="trailing", verbose=False)
    samples, _ = DDIMSampler(Gaussian(parameterization="v", schedule=schedule)).sample(50, 500, (1, 2, 2), **options)
    assert samples.mean().item() == pytest.approx(0.5, abs=0.03)
    with pytest.raises(UserError, match="timestep 999 is pure noise"):
        DDIMSampler(Gaussian(parameterization="eps", schedule=schedule)).sample(50, 1, (1, 2, 2), **options)
    leading = {**options, "ddim_discretize": "leading"}  # what the refusal names
    samples, _ = DDIMSampler(Gaussian(parameterization="eps", schedule=schedule)).sample(50, 500, (1, 2, 2), **leading)
    assert samples.mean().item() == pytest.approx(0.5, abs=0.03)


def test_plms_from_pure_noise_is_more_exact_than_ddim():
    """Its first step follows x0; from then on it has a history, and takes no call more than there are steps."""
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, 0.00085, 0.012, zero_terminal_snr=True))
    x = torch.randn(64, 1, 2, 2, dtype=torch.float64)
    errors = {}
    for sampler_class in (PLMSSampler, DDIMSampler):
        model = Gaussian(parameterization="v", schedule=schedule)
        sampler = sampler_class(model, spacing="trailing")
        samples, _ = sampler.sample(20, len(x), (1, 2, 2), x_T=x, verbose=False)
        assert model.calls == sampler.calls(sampler.grid) == 20
        truth = model.flow(x, 0.0, float(sampler.grid.abar_prev[-1]))
        errors[sampler_class] = (samples - truth).square().mean().sqrt().item()
    assert errors[PLMSSampler] < 0.5 * errors[DDIMSampler]
