"""DiagonalGaussianDistribution against stored numbers, torch.distributions and itself."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, DiracDistribution, normal_kl


def as_normal(d: DiagonalGaussianDistribution) -> torch.distributions.Normal:
    return torch.distributions.Normal(d.mean.double(), d.std.double())


def gaussian(seed: int) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(seed)))


def test_reference_numbers(reference):
    ref = reference("e09_diagonal_gaussian")
    a, b = DiagonalGaussianDistribution(ref.input("p")), DiagonalGaussianDistribution(ref.input("q"))
    fixed = DiagonalGaussianDistribution(ref.input("p"), deterministic=True)
    s = ref.input("s")
    torch.manual_seed(31)
    outputs = dict(sample=a.sample(), mode=a.mode(), kl=a.kl(), kl_other=a.kl(b), nll=a.nll(s), nll_d1=a.nll(s, dims=[1]), std=a.std)
    outputs |= dict(var=a.var, det_sample=fixed.sample(), det_kl=fixed.kl(), det_nll=fixed.nll(s))
    outputs |= dict(clamp=DiagonalGaussianDistribution(ref.input("big")).logvar)
    outputs |= dict(normal_kl=normal_kl(a.mean, a.logvar, b.mean, b.logvar), normal_kl_scalar=normal_kl(a.mean, a.logvar, 0.0, 0.0))
    ref.check_all(outputs)


def test_kl_is_the_closed_form_of_torch():
    a, b = gaussian(0), gaussian(1)
    standard = torch.distributions.Normal(torch.zeros_like(a.mean).double(), 1.0)
    expected = torch.distributions.kl_divergence(as_normal(a), standard).sum((1, 2, 3))
    torch.testing.assert_close(a.kl().double(), expected, rtol=1e-5, atol=1e-4)
    expected = torch.distributions.kl_divergence(as_normal(a), as_normal(b)).sum((1, 2, 3))
    torch.testing.assert_close(a.kl(b).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(normal_kl(a.mean, a.logvar, b.mean, b.logvar).sum((1, 2, 3)).double(), expected, rtol=1e-5, atol=1e-4)


def test_nll_is_minus_the_log_density():
    a, s = gaussian(2), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(a.nll(s).double(), -as_normal(a).log_prob(s.double()).sum((1, 2, 3)), rtol=1e-5, atol=1e-4)


def test_kl_with_itself_is_zero_and_standard_normal_has_none():
    a = gaussian(3)
    assert a.kl(a).abs().max() < 1e-5
    assert DiagonalGaussianDistribution(torch.zeros(1, 4, 2, 2)).kl().item() == 0.0


def test_samples_have_the_moments():
    parameters = torch.cat([torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), -1.0)], dim=1)
    sample = DiagonalGaussianDistribution(parameters).sample(generator=torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(3.0, abs=0.02)
    assert sample.log().isfinite().any() and sample.var().item() == pytest.approx(0.3679, abs=0.01)


def test_sample_lets_gradients_through_to_mean_and_variance():
    parameters = torch.randn(1, 4, 2, 2, requires_grad=True)
    DiagonalGaussianDistribution(parameters).sample().square().sum().backward()
    assert (parameters.grad != 0).all()


def test_sample_keeps_the_parameters_dtype():
    assert DiagonalGaussianDistribution(torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)).sample().dtype == torch.bfloat16


def test_dirac_and_scalar_arguments():
    value = torch.ones(2)
    assert DiracDistribution(value).sample() is value and DiracDistribution(value).mode() is value
    with pytest.raises(TypeError, match="tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)
