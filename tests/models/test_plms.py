from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.plms import PLMSSampler, adams_bashforth
from ldm.util import UserError
from tests.models.sampler_stubs import Analytic
from tests.models.test_ddim import SHAPE, run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("steps", [20, 50])
def test_published_numbers(reference, steps):
    ref = reference(f"d20_plms_{steps}_cfg")
    got = run(ref, PLMSSampler(Analytic()), 6000 + steps, 7.5, S=steps)
    ref.check_all({name: got[name] for name in ref})


def test_step_by_step_parity_with_diffusers():
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.set_timesteps(25)
    model, x = Analytic(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    sampler = PLMSSampler(model)
    steps = list(sampler.walk(sampler.make_schedule(25, verbose=False), x))
    assert model.asked == scheduler.timesteps.tolist()  # the second timestep twice: the start-up's second call
    theirs = []
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(model.apply_model(x, torch.full((2,), t), None), t, x).prev_sample
        theirs.append(x)
    for step, other in zip(steps, theirs[1:], strict=True):
        torch.testing.assert_close(step.x, other, atol=2e-4, rtol=1e-4)


def test_model_calls_and_timesteps():
    model = Analytic()
    PLMSSampler(model).sample(5, 2, SHAPE, verbose=False)
    assert model.asked == [801, 601, 601, 401, 201, 1]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_are_exact_for_polynomials(order):
    """The integral over the next unit interval of a polynomial of degree order - 1 comes out exactly."""
    for degree in range(order):
        history = [torch.tensor(float(-k) ** degree, dtype=torch.float64) for k in range(order)]
        assert adams_bashforth(history).item() == pytest.approx(1 / (degree + 1))


def test_single_steps_are_the_walk():
    sampler = PLMSSampler(Analytic())
    grid = sampler.make_schedule(6, verbose=False)
    x = torch.randn(2, *SHAPE)
    whole = [step.x for step in sampler.walk(grid, x)]
    old: list[torch.Tensor] = []
    for i, expected in enumerate(whole):
        t, t_next = (torch.full((2,), int(g[i])) for g in (grid.t, grid.t_next))
        x, _, eps = sampler.p_sample_plms(x, None, t, len(grid) - 1 - i, old_eps=old, t_next=t_next)
        old = [*old, eps][-3:]
        torch.testing.assert_close(x, expected)


def test_a_second_walk_starts_afresh():
    sampler, x_T = PLMSSampler(Analytic()), torch.randn(2, *SHAPE)
    first, second = (sampler.sample(6, 2, SHAPE, x_T=x_T, verbose=False)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_masks_and_thresholds_work_with_plms_too():
    mask, x0 = torch.zeros(2, 1, 8, 8), torch.full((2, *SHAPE), 3.0)
    mask[..., :4] = 1.0
    samples, _ = PLMSSampler(Analytic()).sample(50, 2, SHAPE, mask=mask, x0=x0, verbose=False)
    assert (samples[..., :4] - 3.0).abs().mean() < 0.3 < (samples[..., 4:] - 3.0).abs().mean()
    previews: list[torch.Tensor] = []
    PLMSSampler(Analytic()).sample(5, 2, SHAPE, x_T=x0, dynamic_threshold=0.6, img_callback=lambda x, i: previews.append(x), verbose=False)
    assert all(p.square().mean().sqrt() <= 0.6 + 1e-6 for p in previews)


def test_eta_is_refused():
    with pytest.raises(UserError, match=r"eta 0\.5.*DDIM"):
        PLMSSampler(Analytic()).sample(5, 2, SHAPE, eta=0.5, verbose=False)
