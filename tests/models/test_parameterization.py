import pytest
import torch

from ldm.models.diffusion.sampling_util import append_dims, norm_thresholding, spatial_norm_thresholding
from ldm.modules.diffusionmodules import parameterization as param
from ldm.util import UserError


@pytest.fixture
def noisy():
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    abar = torch.tensor([0.999, 0.5, 0.01], dtype=torch.float64).reshape(3, 1, 1, 1)
    return x0, eps, abar, abar.sqrt() * x0 + (1 - abar).sqrt() * eps


@pytest.mark.parametrize("kind", param.KINDS)
def test_every_kind_carries_the_same_information(kind, noisy):
    x0, eps, abar, x = noisy
    out = param.target(kind, x0, eps, abar)
    torch.testing.assert_close(param.to_x0(kind, out, x, abar), x0)
    torch.testing.assert_close(param.to_eps(kind, out, x, abar), eps)


def test_v_is_the_velocity_on_the_circle(noisy):
    x0, eps, _, _ = noisy
    angle = torch.tensor(0.3, dtype=torch.float64)
    step = 1e-6
    slope = ((angle + step).cos() * x0 + (angle + step).sin() * eps - angle.cos() * x0 - angle.sin() * eps) / step
    torch.testing.assert_close(param.v_target(x0, eps, angle.cos() ** 2), slope, atol=1e-5, rtol=1e-5)


def test_numbers_and_tensors_are_the_same(noisy):
    x0, eps, _, x = noisy
    for kind in param.KINDS:
        torch.testing.assert_close(param.to_x0(kind, eps, x, 0.25), param.to_x0(kind, eps, x, torch.tensor(0.25, dtype=x.dtype)))
        torch.testing.assert_close(param.to_eps(kind, x0, x, 0.25), param.to_eps(kind, x0, x, torch.tensor(0.25, dtype=x.dtype)))


def test_v_reference_numbers(reference):
    ref = reference("c07_v_prediction")
    abar = torch.linspace(0.00085**0.5, 0.0120**0.5, 1000, dtype=torch.float64).square().mul(-1).add(1).cumprod(0)[ref.input("t")]
    abar = abar.float().reshape(-1, 1, 1, 1)
    x0, noise, xt, v = (ref.input(name) for name in ("x0", "noise", "xt", "v"))
    ref.check(get_v=param.v_target(x0, noise, abar), start=param.to_x0("v", v, xt, abar), eps=param.to_eps("v", v, xt, abar))


def test_min_snr_weights():
    abar = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    snr = abar / (1 - abar)
    torch.testing.assert_close(param.loss_weight("min_snr", "x0", abar, 5.0), snr.clamp(max=5.0))
    torch.testing.assert_close(param.loss_weight("min_snr", "v", abar, 5.0), snr.clamp(max=5.0) / (snr + 1))
    torch.testing.assert_close(param.loss_weight("min_snr", "eps", abar, 5.0)[1:], (snr.clamp(max=5.0) / snr)[1:])
    assert torch.isfinite(param.loss_weight("min_snr", "eps", abar)).all()  # zero terminal SNR: no division by it
    assert torch.equal(param.loss_weight("none", "v", abar), torch.ones_like(abar))


def test_wrong_names_are_refused():
    x = torch.zeros(1)
    for call in (lambda: param.to_x0("epsilon", x, x, 0.5), lambda: param.target("noise", x, x, 0.5)):
        with pytest.raises(UserError, match="eps, x0, v"):
            call()
    with pytest.raises(UserError, match="none, min_snr"):
        param.loss_weight("snr", "eps", x)
    with pytest.raises(UserError, match="gamma > 0"):
        param.loss_weight("min_snr", "eps", x, gamma=0)


def test_thresholding():
    x0 = torch.tensor([0.1, 10.0]).reshape(2, 1, 1, 1).expand(2, 4, 3, 3)
    limited = norm_thresholding(x0, 0.5)
    torch.testing.assert_close(limited[0], x0[0])
    assert limited[1].square().mean().sqrt().item() == pytest.approx(0.5)
    x0 = x0.clone()
    x0[0, :, 0, 0] = 3.0
    limited = spatial_norm_thresholding(x0, 0.5)
    assert limited[0, :, 0, 0].square().mean().sqrt().item() == pytest.approx(0.5)
    torch.testing.assert_close(limited[0, :, 1:], x0[0, :, 1:])
    assert append_dims(torch.zeros(2), 4).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="dimensions"):
        append_dims(torch.zeros(2, 2), 1)
