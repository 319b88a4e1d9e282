import math

import numpy as np
import pytest
import torch

from ldm.modules.diffusionmodules import schedule as sched
from ldm.modules.diffusionmodules.schedule import NoiseSchedule, make_beta_schedule, make_ddim_timesteps
from ldm.util import UserError

SD = dict(linear_start=0.00085, linear_end=0.0120)


def test_beta_schedules_match_published_numbers(reference):
    cos = lambda s: math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    reference("c01_beta_schedules").check_all(
        {
            **{name: make_beta_schedule(name, 1000) for name in ("linear", "cosine", "sqrt_linear", "sqrt")},
            "linear_sd": make_beta_schedule("linear", 1000, **SD),
            "linear_ldm": make_beta_schedule("linear", 1000, linear_start=0.0015, linear_end=0.0195),
            "cosine_50_s01": make_beta_schedule("cosine", 50, cosine_s=0.1),
            "alpha_bar_cos_100": sched.betas_for_alpha_bar(100, cos),
        }
    )


def test_squaredcos_is_the_capped_cosine():
    capped = make_beta_schedule("squaredcos_cap_v2", 1000)
    abar = np.cos((np.arange(1000) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert capped.max() == 0.999
    np.testing.assert_allclose(np.cumprod(1 - capped)[:-1], abar[1:] / abar[0])


def test_buffers_are_bit_equal_to_the_published_ones(reference):
    ref = reference("c03_schedule_buffers_sd1")
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, **SD))
    for name, value in schedule.buffers().items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, ref[name], err_msg=name)
    np.testing.assert_array_equal(schedule.buffers(parameterization="x0")["lvlb_weights"], ref["lvlb_weights_x0"])
    np.testing.assert_array_equal(schedule.buffers(parameterization="v")["lvlb_weights"], np.ones(1000))
    mixed = schedule.buffers(v_posterior=0.3)
    for name in ("posterior_variance", "posterior_log_variance_clipped", "lvlb_weights"):
        np.testing.assert_array_equal(mixed[name], ref[name + "_v03"], err_msg=name)


def test_timestep_lists_match_published_numbers(reference):
    ref = reference("d31_ddim_timesteps")
    for key in ref:
        method, steps, *of = key.split("_")
        got = make_ddim_timesteps(method, int(steps), int(of[1]) if of else 1000, verbose=False)
        np.testing.assert_array_equal(got, ref[key], err_msg=key)


@pytest.mark.parametrize("spacing", sched.SPACINGS)
@pytest.mark.parametrize("total", [1, 2, 3, 7, 50, 1000])
def test_every_step_count_gives_a_legal_grid(spacing, total):
    schedule = NoiseSchedule(make_beta_schedule("linear", total, **SD))
    for steps in range(1, total + 1):
        grid = schedule.grid(steps, eta=1.0, spacing=spacing)
        assert grid.t.min() >= 0 and grid.t.max() < total
        assert (np.diff(grid.t) <= 0).all() and (spacing == "quad" or (np.diff(grid.t) < 0).all())
        assert len(grid) == steps or (spacing == "uniform" and steps < len(grid) <= total)
        assert np.isfinite(grid.sigma).all() and (grid.sigma**2 <= 1 - grid.abar_prev + 1e-12).all()


def test_uniform_grid_keeps_the_historical_list_where_it_is_legal():
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, **SD))
    for steps in range(1, 1001):
        historical = make_ddim_timesteps("uniform", steps, 1000, verbose=False)
        grid = schedule.grid(steps)
        if historical[-1] < 1000:
            np.testing.assert_array_equal(grid.t[::-1], historical)
        else:
            assert len(grid) == steps
    assert schedule.grid(7).t.tolist() == [995, 853, 711, 569, 427, 285, 143, 1]
    assert schedule.grid(3).t.tolist() == [667, 334, 1]
    assert schedule.grid(1000).t.tolist() == list(range(999, -1, -1))


def test_modern_spacings():
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, **SD))
    assert schedule.grid(4, spacing="leading").t.tolist() == [750, 500, 250, 0]
    assert schedule.grid(4, spacing="linspace").t.tolist() == [999, 666, 333, 0]
    assert schedule.grid(4, spacing="trailing").t.tolist() == [999, 749, 499, 249]


def test_where_the_last_step_arrives():
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, **SD))
    assert schedule.grid(10).abar_prev[-1] == schedule.abar[0]
    assert schedule.grid(10, eta=1.0, final="clean").abar_prev[-1] == 1.0
    assert schedule.full_grid().abar_prev[-1] == 1.0
    with pytest.raises(UserError, match=r"first .* or clean"):
        schedule.grid(10, final="last")


def test_inverted_grid_is_the_same_road_back():
    grid = NoiseSchedule(make_beta_schedule("linear", 1000, **SD)).grid(20)
    back = grid.inverted()
    np.testing.assert_array_equal(back.abar[1:], back.abar_prev[:-1])
    np.testing.assert_array_equal(back.abar_prev, grid.abar[::-1])
    assert back.t.tolist() == [0, *grid.t[:0:-1].tolist()] and not back.sigma.any()
    assert len(grid.last(0).inverted()) == 0


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True])
def test_impossible_step_counts_are_refused_in_words(steps):
    with pytest.raises(UserError, match="whole number from 1 to 1000"):
        NoiseSchedule(make_beta_schedule("linear", 1000)).grid(steps)


def test_wrong_names_list_the_right_ones():
    with pytest.raises(UserError, match="linear, cosine"):
        make_beta_schedule("scaled", 10)
    with pytest.raises(UserError, match="uniform, quad"):
        make_ddim_timesteps("karras", 5, 10)
    with pytest.raises(UserError, match="eps, x0, v"):
        NoiseSchedule(make_beta_schedule("linear", 10)).buffers(parameterization="noise")
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        NoiseSchedule(np.array([0.1, 1.5]))


def test_zero_terminal_snr():
    plain = NoiseSchedule(make_beta_schedule("linear", 1000, **SD))
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, **SD, zero_terminal_snr=True))
    assert schedule.abar[-1] == 0.0 and schedule.abar[0] == pytest.approx(plain.abar[0]) and (np.diff(schedule.abar) < 0).all()
    assert schedule.snr()[-1] == 0.0
    buffers = schedule.buffers(parameterization="v")
    finite = {k for k, v in buffers.items() if np.isfinite(v).all()}
    assert set(buffers) - finite == {"sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"}


def test_from_abar_round_trip_and_immutability():
    schedule = NoiseSchedule(make_beta_schedule("cosine", 100))
    np.testing.assert_allclose(NoiseSchedule.from_abar(schedule.abar).betas, schedule.betas)
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 1.0


def test_the_meta_device_does_not_reach_the_schedule():
    with torch.device("meta"):
        buffers = NoiseSchedule(make_beta_schedule("cosine", 50)).buffers()
    assert np.isfinite(buffers["alphas_cumprod"]).all()


def test_torch_helpers():
    a = torch.arange(10.0)
    assert sched.extract_into_tensor(a, torch.tensor([2, 7]), (2, 3, 4, 4)).flatten().tolist() == [2.0, 7.0]
    torch.manual_seed(0)
    shared = sched.noise_like((3, 2, 2), "cpu", repeat=True)
    torch.manual_seed(0)
    assert torch.equal(shared, torch.randn(1, 2, 2).repeat(3, 1, 1))
