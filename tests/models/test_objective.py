"""What a diffusion model is trained on: weights of the loss, learnt variance, noise, noised conditions."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.modules.diffusionmodules.parameterization import loss_weight
from ldm.util import ConfigError
from tests.analytic import latent_model
from tests.models.latent_stubs import model_of
from tests.reference_rule import philox


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_min_snr_weights_every_sample(kind):
    x0, c, t, noise = philox(0, (2, 4, 8, 8)), philox(1, (2, 3, 4)), torch.tensor([5, 700]), philox(2, (2, 4, 8, 8))
    plain = latent_model(parameterization=kind)
    losses = torch.stack([plain.p_losses(x0[i : i + 1], c[i : i + 1], t[i : i + 1], noise=noise[i : i + 1])[0] for i in range(2)])
    abar = plain.alphas_cumprod[t]
    snr = abar / (1 - abar)
    weights = snr.clamp(max=5) / {"x0": 1, "eps": snr, "v": snr + 1}[kind]  # arXiv:2303.09556, Sec. 3.4
    for weighting in ("min_snr", {"name": "min_snr", "gamma": 5.0}):
        weighted = latent_model(parameterization=kind, loss_weighting=weighting)
        torch.testing.assert_close(weighted.p_losses(x0, c, t, noise=noise)[0], (weights * losses).mean())
    torch.testing.assert_close(loss_weight("min_snr", kind, abar), weights)
    unweighted = latent_model(parameterization=kind, loss_weighting="none").p_losses(x0, c, t, noise=noise)[0]
    torch.testing.assert_close(unweighted, losses.mean())


@pytest.mark.parametrize("weighting", ["max_snr", {"name": "min_snr", "gama": 5}, {"name": "min_snr", "gamma": 0}, {"gamma": 5}])
def test_a_wrong_loss_weighting_is_told_when_the_model_is_built(weighting):
    with pytest.raises(ConfigError, match="loss_weighting"):
        latent_model(loss_weighting=weighting)


def test_zero_terminal_snr():
    with pytest.raises(ConfigError, match="needs parameterization v or x0"):
        latent_model(rescale_betas_zero_snr=True)
    model = latent_model(rescale_betas_zero_snr=True, parameterization="v")
    assert model.alphas_cumprod[-1] == 0 and model.alphas_cumprod[0] == latent_model().alphas_cumprod[0]
    x0, noise = philox(0, (1, 4, 8, 8)), philox(1, (1, 4, 8, 8))
    last = torch.tensor([999])
    assert torch.equal(model.q_sample(x0, last, noise), noise) and torch.equal(model.get_v(x0, noise, last), -x0)
    assert torch.isfinite(model.p_losses(x0, philox(2, (1, 1, 4)), last, noise=noise)[0])


def test_learned_logvar_is_the_log_of_the_error():
    """exp(-s) L + s is least at s = log L, so that the learnt value tells how hard each timestep is."""
    model = latent_model(learn_logvar=True)
    x0, c, t = philox(0, (1, 4, 8, 8)), philox(1, (1, 1, 4)), torch.tensor([3])
    noise = philox(2, (1, 4, 8, 8))
    error = model.p_losses(x0, c, t, noise=noise)[1]["train/loss_simple"].item()
    model.logvar.data[3] = math.log(error)
    loss, _ = model.p_losses(x0, c, t, noise=noise)
    loss.backward()
    assert loss.item() == pytest.approx(1 + math.log(error)) and abs(model.logvar.grad[3]) < 1e-5


def test_noised_conditioning():
    model = latent_model(timesteps=50, num_timesteps_cond=5)
    loss, _ = model(philox(0, (2, 4, 8, 8)), philox(1, (2, 1, 4)))
    assert torch.isfinite(loss)
    assert model.sample(philox(1, (2, 1, 4)), batch_size=2).shape == (2, 4, 8, 8)
    with pytest.raises(ConfigError, match="must not exceed timesteps"):
        latent_model(timesteps=50, num_timesteps_cond=51)


def test_offset_noise_is_shared_by_the_pixels_of_a_channel():
    x = torch.zeros(512, 3, 4, 4)
    plain, offset = model_of(offset_noise=0.0), model_of(offset_noise=0.5)
    torch.manual_seed(0)
    expected = torch.randn_like(x)
    torch.manual_seed(0)
    assert torch.equal(plain.training_noise(x), expected)  # the original's draws
    torch.manual_seed(0)
    added = (offset.training_noise(x) - expected) / 0.5
    assert torch.allclose(added, added[..., :1, :1].expand_as(added), atol=1e-6)
    assert added[..., 0, 0].std().item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ConfigError, match="offset_noise"):
        model_of(offset_noise=-0.1)
