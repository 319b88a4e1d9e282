from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.metrics.samplers import Problem, deterministic, flow_errors, mean_table
from ldm.models.diffusion.ancestral import p_sample_loop
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.exact import GaussianMixture
from ldm.models.diffusion.registry import RECOMMENDED, SAMPLERS, SPACINGS, make_sampler
from ldm.models.diffusion.sigmas import half_log_snr, make_grid, nodes, steps_between
from ldm.modules.diffusionmodules.schedule import NoiseSchedule, make_beta_schedule
from ldm.util import UserError
from tests.analytic import latent_model
from tests.models.sampler_stubs import Analytic, sd_schedule

SD = sd_schedule()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("final", ["first", "clean"])
def test_grids_fall_from_noise_to_data(spacing, final):
    for steps in (1, 2, 3, 10, 250, 1000):
        grid = make_grid(SD, steps, spacing=spacing, final=final)
        assert (np.diff(grid.abar) >= 0).all() and (grid.abar_prev >= grid.abar).all() and np.isfinite(grid.t).all()
        np.testing.assert_array_equal(grid.abar_prev[:-1], grid.abar[1:])
        np.testing.assert_allclose([SD.abar_at(t) for t in grid.t.tolist()], grid.abar, rtol=1e-9)
        assert grid.abar_prev[-1] == (1.0 if final == "clean" else SD.abar[0])
        if spacing not in ("uniform", "quad", "leading"):
            assert grid.t[0] == 999


def test_even_in_what_they_say():
    _, abar = nodes(SD, 10, "logSNR", "first")
    sigma = np.sqrt((1 - abar) / abar)
    np.testing.assert_allclose(np.diff(np.log(sigma)), np.diff(np.log(sigma))[0], rtol=1e-6)
    _, abar = nodes(SD, 10, "karras", "clean")
    np.testing.assert_allclose(np.diff(((1 - abar[:-1]) / abar[:-1]) ** (0.5 / 7), 2), 0.0, atol=1e-9)
    assert abar[-2] == SD.abar[0] and len(abar) == 11  # the last level before the clean picture is timestep 0
    assert nodes(SD, 10, "logSNR", "clean")[1][-2] < SD.abar[0]  # here the clean picture replaces timestep 0
    np.testing.assert_allclose(np.diff(nodes(SD, 9, "time_uniform", "first")[0]), -111.0)
    assert nodes(SD, 1, "linspace", "clean")[0].tolist() == [999, 0]


def test_timesteps_of_noise_levels():
    t = np.array([0.0, 0.25, 17.5, 998.9, 999.0])
    np.testing.assert_allclose(SD.t_at([SD.abar_at(s) for s in t.tolist()]), t, atol=1e-8)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "logSNR"])
def test_pure_noise_is_a_level_of_its_own(spacing):
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, 0.00085, 0.012, zero_terminal_snr=True))
    grid = make_grid(schedule, 10, spacing=spacing)
    assert grid.abar[0] == 0.0 and grid.t[0] == 999 and len(grid) == 10
    assert 1.0 / grid.abar[1] - 1.0 == pytest.approx(80.0**2)  # sigma 80, not the 2000 and more of timestep 998


def test_stages_lie_evenly_in_lambda_and_keep_together():
    grid = steps_between(SD, nodes(SD, 3, "logSNR", "first"), sizes=[3, 2, 1])
    assert grid.group.tolist() == [0, 0, 0, 1, 1, 2]
    steps = np.diff([half_log_snr(a) for a in grid.abar[:4]])
    np.testing.assert_allclose(steps, steps[0])
    assert grid.last(4).group.tolist() == [0, 1, 1, 2] and grid.inverted().group.tolist() == [2, 1, 1, 0, 0, 0]
    back = grid.inverted()
    np.testing.assert_array_equal(back.t_prev, grid.t[::-1])
    np.testing.assert_array_equal(back.abar_prev, grid.abar[::-1])


def test_wrong_names_list_the_right_ones():
    with pytest.raises(UserError, match="karras, exponential"):
        make_grid(SD, 5, spacing="caras")
    with pytest.raises(UserError, match=r"first .* or clean"):
        make_grid(SD, 5, final="last")


def test_ddpm_with_all_timesteps_is_the_published_loop():
    model, c = latent_model(timesteps=50, v_posterior=0.3, linear_end=0.2), torch.zeros(2, 1, 4)
    x_T = torch.randn(2, 4, 8, 8)
    torch.manual_seed(5)
    expected = p_sample_loop(model, c, x_T.shape, x_T=x_T)
    torch.manual_seed(5)
    samples, _ = make_sampler("ddpm", model).sample(50, 2, (4, 8, 8), c, x_T=x_T, verbose=False)
    torch.testing.assert_close(samples, expected, atol=2e-5, rtol=2e-5)


def test_ddpm_limits_x0_as_the_model_says():
    x_T = 9.0 * torch.ones(2, 4, 2, 2)
    for clip in (False, True):
        samples, _ = make_sampler("ddpm", Analytic(), clip_denoised=clip).sample(5, 2, (4, 2, 2), x_T=x_T, verbose=False)
        assert (samples.abs().max() <= 1.0) == clip
    with pytest.raises(UserError, match="v_posterior"):
        make_sampler("ddpm", Analytic(), v_posterior=2.0)


def test_the_recommended_sampler_is_many_times_nearer():
    from ldm.metrics.samplers import flow_errors, problems

    for problem in problems()[1:3]:
        table = flow_errors(problem, ["ddim", "dpm_solver", "dpmpp_2m_karras", RECOMMENDED], calls=(8, 20), batch=16)
        for others, times in ((("ddim", "dpm_solver"), (3.0, 8.0)), (("dpmpp_2m_karras",), (1.5, 2.0))):
            for name in others:
                assert all(theirs > k * ours for theirs, ours, k in zip(table[name], table[RECOMMENDED], times, strict=True)), (name, table)


def test_options_of_dpm_solver_that_do_not_fit_are_refused():
    for options in (
        dict(method="singlestep", exact_weights=True),
        dict(algorithm="ddim"),
        dict(order=4),
        dict(method="x"),
        dict(solver_type="x"),
    ):
        with pytest.raises(UserError):
            make_sampler("dpm_solver", Analytic(), **options)
    for options in (dict(order=4), dict(variant="bh3"), dict(integrates="v")):
        with pytest.raises(UserError):
            make_sampler("unipc", Analytic(), **options)


def test_model_calls_are_as_foretold():
    for name in ("ddim", "plms", "heun", "heun_karras", "dpm_solver", "dpmpp_3s", "dpmpp_3m_full", "unipc", RECOMMENDED):
        for final in ("first", "clean"):
            model = Analytic()
            sampler = make_sampler(name, model, final=final)
            sampler.sample(7, 1, (4, 2, 2), verbose=False)
            assert sampler.calls(sampler.grid) == model.calls, (name, final)


def test_sdxl_conditioning_is_joined_entry_by_entry():
    seen = {}

    class Xl(Analytic):
        def output(self, x, t, cond):
            seen.update({key: value for key, value in cond.items()})
            return torch.zeros_like(x)

    def condition(value):
        return {
            "crossattn": torch.full((2, 7, 8), value),
            "vector": torch.full((1, 16), value),
            "concat": [torch.full((2, 1, 2, 2), value)],
        }

    Denoiser(Xl(), condition(1.0), condition(-1.0), 5.0)(torch.zeros(2, 4, 2, 2), 3)
    assert seen["crossattn"].shape == (4, 7, 8) and seen["vector"][:, 0].tolist() == [-1.0, -1.0, 1.0, 1.0]
    assert seen["concat"][0][:, 0, 0, 0].tolist() == [-1.0, -1.0, 1.0, 1.0]


def test_the_script_writes_table_and_figure(tmp_path, monkeypatch, capsys):
    from scripts import plot_samplers

    monkeypatch.setattr("sys.argv", ["plot_samplers.py", "--outdir", str(tmp_path), "--samplers", "euler", "Euler a", "fast"])
    assert plot_samplers.main() == 0
    text = (tmp_path / "samplers.md").read_text()
    assert (tmp_path / "samplers.png").stat().st_size > 1000 and "| `euler_a` |" in text and "nan" not in text
    monkeypatch.setattr("sys.argv", ["plot_samplers.py", "--ckpt", "x"])
    assert plot_samplers.main() == 2 and "belong together" in capsys.readouterr().err


def test_the_recommended_sampler_is_the_best_of_all_for_few_calls():
    """On mixtures other than those it was chosen by (scripts/plot_samplers.py)."""
    calls = (5, 7, 8, 10, 12, 15, 20, 30)
    shapes = ((3, 5, 0.05, 0.7, 11, 1.0), (8, 6, 0.05, 0.9, 21, 1.0), (24, 7, 0.03, 1.0, 12, 1.0), (48, 9, 0.03, 1.0, 13, 5.0))
    mixtures = [(GaussianMixture.random(dim, n, low, high, seed=seed), scale) for dim, n, low, high, seed, scale in shapes]
    names = deterministic(SAMPLERS)
    table = mean_table([flow_errors(Problem("", model, scale), names, calls, batch=16) for model, scale in mixtures])
    for i, n in enumerate(calls):
        best = min((errors[i], name) for name, errors in table.items() if errors[i] == errors[i])
        assert table[RECOMMENDED][i] <= 1.02 * best[0], (n, table[RECOMMENDED][i], best)
