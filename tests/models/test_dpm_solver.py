from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.dpm_solver import DPM_Solver, NoiseScheduleVP, model_wrapper
from ldm.util import UserError
from tests.models.sampler_stubs import Analytic, Gaussian
from tests.models.test_ddim import SHAPE, draws_between, sample


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def guided(ref):
    return dict(unconditional_guidance_scale=7.5, unconditional_conditioning=ref.input("uc"))


def test_published_sampler_numbers(reference):
    ref, outputs = reference("d40_dpm_solver_sampler"), {}
    common = dict(batch_size=2, shape=SHAPE, conditioning=ref.input("c"), x_T=ref.input("x_T"), verbose=False)
    for steps in (5, 10, 14, 15, 20, 50):
        outputs[f"S{steps}_cfg"] = DPMSolverSampler(Analytic()).sample(S=steps, **common, **guided(ref))[0]
    outputs["S20_nocfg"] = DPMSolverSampler(Analytic()).sample(S=20, **common)[0]
    ref.check_all(outputs)


def test_published_dict_conditioning(reference):
    ref = reference("d35_ddim_hybrid_dict")
    cat = [ref.input("cat")]
    cond, uncond = ({"c_concat": cat, "c_crossattn": [ref.input(name)]} for name in ("c", "uc"))
    guidance = dict(unconditional_guidance_scale=9.0, unconditional_conditioning=uncond)
    samples, _ = DPMSolverSampler(Analytic()).sample(10, 2, SHAPE, cond, x_T=ref.input("x_T"), verbose=False, **guidance)
    ref.check(dpm=samples)


def test_published_noise_schedules(reference):
    ref, outputs = reference("d43_noise_schedule_vp"), {}
    t, lam = ref.input("t"), ref.input("lam")
    discrete = NoiseScheduleVP("discrete", alphas_cumprod=Analytic().alphas_cumprod)
    for name, ns in (("discrete", discrete), ("linear", NoiseScheduleVP("linear")), ("cosine", NoiseScheduleVP("cosine"))):
        outputs |= {f"{name}/lmc": ns.marginal_log_mean_coeff(t), f"{name}/alpha": ns.marginal_alpha(t), f"{name}/std": ns.marginal_std(t)}
        outputs |= {f"{name}/lambda": ns.marginal_lambda(t), f"{name}/inv": ns.inverse_lambda(lam)}
        outputs |= {f"{name}/T": float(ns.T), f"{name}/total_N": float(ns.total_N)}
    ref.check_all(outputs)


def test_the_sampler_is_the_librarys_second_order_multistep():
    model, x = Analytic(), torch.randn(2, *SHAPE)
    for steps in (5, 20):
        ns = NoiseScheduleVP("discrete", alphas_cumprod=model.alphas_cumprod)
        solver = DPM_Solver(model_wrapper(lambda x, t: model.apply_model(x, t, None), ns), ns, predict_x0=True)
        expected = solver.sample(x, steps=steps, order=2, method="multistep")
        torch.testing.assert_close(sample(DPMSolverSampler(model), steps, x_T=x), expected, atol=1e-4, rtol=1e-4)


def exact_solver(predict_x0: bool) -> tuple[DPM_Solver, torch.Tensor, torch.Tensor]:
    """A solver for Gaussian data on the analytic linear schedule, a start, and where the exact flow takes it."""
    ns, mean, std = NoiseScheduleVP("linear"), 0.5, 0.3

    def spread(t):
        return (ns.marginal_alpha(t) ** 2 * std**2 + ns.marginal_std(t) ** 2).sqrt().reshape(-1, 1)

    def eps(x, t):
        return ns.marginal_std(t).reshape(-1, 1) * (x - ns.marginal_alpha(t).reshape(-1, 1) * mean) / spread(t) ** 2

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, last = (torch.full((4,), t, dtype=torch.float64) for t in (1.0, 1e-3))
    alpha = [ns.marginal_alpha(t).reshape(-1, 1) for t in (first, last)]
    truth = alpha[1] * mean + spread(last) / spread(first) * (x - alpha[0] * mean)
    return DPM_Solver(eps, ns, predict_x0=predict_x0), x, truth


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("solver_type", ["dpm_solver", "taylor"])
@pytest.mark.parametrize("method", ["multistep", "singlestep", "singlestep_fixed"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_against_the_exact_flow(predict_x0, solver_type, method, order):
    solver, x, truth = exact_solver(predict_x0)
    options = dict(order=order, method=method, skip_type="logSNR", solver_type=solver_type)
    errors = [(solver.sample(x, steps=steps, **options) - truth).abs().max() for steps in (240, 480)]
    # Order 3 begins (multistep) or ends (singlestep) with steps of order 1 and 2, which the whole cannot outdo.
    reached = order if order < 3 or method == "singlestep_fixed" else 2
    assert torch.log2(errors[0] / errors[1]).item() == pytest.approx(reached, abs=0.2)
    assert errors[1] < (4e-3, 1e-4, 1e-5)[order - 1]


@pytest.mark.parametrize("predict_x0", [True, False])
@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_end_near_the_exact_flow(predict_x0, order):
    solver, x, truth = exact_solver(predict_x0)
    assert (solver.sample(x, method="adaptive", order=order, atol=1e-4, rtol=1e-4) - truth).abs().max() < 2e-3
    assert torch.isfinite(solver.sample(x, method="adaptive", order=order)).all()


def test_options_of_the_library():
    solver, x, truth = exact_solver(True)
    for skip in ("time_uniform", "time_quadratic", "logSNR"):
        assert (solver.sample(x, steps=60, order=2, method="multistep", skip_type=skip) - truth).abs().max() < 0.06
    to_zero = solver.sample(x, steps=60, order=2, method="multistep", denoise_to_zero=True)
    assert torch.isfinite(to_zero).all()
    for steps in (2, 3, 4, 5, 6, 7):
        for order in (1, 2, 3):
            if steps >= order:
                assert sum(DPM_Solver._orders(steps, order)) == steps
                for method in ("multistep", "singlestep"):
                    assert torch.isfinite(solver.sample(x, steps=steps, order=order, method=method)).all()
    limited = DPM_Solver(solver.model, solver.noise_schedule, predict_x0=True, thresholding=True, max_val=0.1)
    assert limited.sample(x, steps=10, order=2, method="multistep").abs().max() <= 1.1
    for wrong in (dict(method="euler"), dict(order=4, method="multistep"), dict(skip_type="karras"), dict(steps=1), dict(solver_type="x")):
        with pytest.raises(UserError):
            solver.sample(x, **wrong)


@pytest.mark.parametrize("model_type, kind", [("noise", "eps"), ("x_start", "x0"), ("v", "v")])
def test_model_types_agree(model_type, kind):
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    ns = NoiseScheduleVP("discrete", alphas_cumprod=torch.tensor(Gaussian().schedule.abar))
    t = torch.full((2,), 0.5, dtype=torch.float64)
    model = Gaussian(parameterization=kind)
    fn = model_wrapper(lambda x, t: model.apply_model(x, t.round().long(), None), ns, model_type)
    plain = model_wrapper(lambda x, t: Gaussian().apply_model(x, t.round().long(), None), ns)
    torch.testing.assert_close(fn(x, t), plain(x, t))


def test_few_steps_come_nearer_than_ddim():
    from ldm.models.diffusion.ddim import DDIMSampler

    model, x = Gaussian(), torch.randn(2, *SHAPE, dtype=torch.float64)
    errors = {}
    for sampler in (DPMSolverSampler(model), DDIMSampler(model)):
        grid = sampler.make_schedule(20, "logSNR" if sampler.name == "DPM-Solver" else "uniform", verbose=False)
        *_, last = sampler.walk(grid, x)
        errors[sampler.name] = (last.x - model.flow(x, float(grid.abar[0]), float(grid.abar_prev[-1]))).abs().max()
    assert errors["DPM-Solver"] < 0.1 * errors["DDIM"]


def test_the_loops_options_work_with_it():
    model = Analytic()
    dpm, x = DPMSolverSampler(model), torch.randn(2, *SHAPE)
    assert draws_between(lambda: sample(dpm, 10)) == 0
    keep = dict(mask=torch.ones(2, 1, 8, 8), x0=torch.zeros(2, *SHAPE))
    assert draws_between(lambda: sample(dpm, 10, **keep)) == 10
    numbers = []
    _, kept = dpm.sample(6, 2, SHAPE, x_T=x, callback=numbers.append, log_every_t=1, verbose=False)
    assert numbers == list(range(6)) and len(kept["x_inter"]) == 7
    dpm.make_schedule(10, verbose=False)
    z = dpm.stochastic_encode(x, 10, noise=x)
    torch.testing.assert_close(dpm.decode(z, None, 10), sample(dpm, 10, x_T=x))
    for spacing in ("uniform", "time_quadratic", "logSNR"):
        for steps in (1, 2, 3, 20, 1000):
            for final in ("first", "clean"):
                assert torch.isfinite(sample(dpm, steps, x_T=x, ddim_discretize=spacing, final=final)).all(), (spacing, steps, final)
    with pytest.raises(UserError, match="eta"):
        sample(dpm, 5, eta=1.0)
    with pytest.raises(UserError, match="logSNR"):
        sample(dpm, 5, ddim_discretize="quad")


def test_v_models_and_zero_terminal_snr():
    from ldm.modules.diffusionmodules.schedule import NoiseSchedule, make_beta_schedule

    x = torch.randn(2, *SHAPE)
    eps, v = (sample(DPMSolverSampler(Gaussian(parameterization=kind)), 20, x_T=x) for kind in ("eps", "v"))
    torch.testing.assert_close(v, eps, atol=1e-3, rtol=1e-3)
    schedule = NoiseSchedule(make_beta_schedule("linear", 1000, 0.00085, 0.012, zero_terminal_snr=True))
    samples, _ = DPMSolverSampler(Gaussian(parameterization="v", schedule=schedule)).sample(100, 500, (1, 2, 2), verbose=False)
    assert samples.mean().item() == pytest.approx(0.5, abs=0.03) and samples.std().item() == pytest.approx(0.3, abs=0.03)
