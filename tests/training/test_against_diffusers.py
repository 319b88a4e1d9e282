"""Fifty training steps of our network and of diffusers' from the same weights, with the same data, noise and optimizer: the same losses."""

from __future__ import annotations

import math

import pytest
import torch

from ldm.inference.weights.diffusers_config import unet_params
from ldm.inference.weights.diffusers_folder import apply_recipe
from ldm.inference.weights.diffusers_names import UNET, to_ours
from ldm.models.diffusion.ddpm import DDPM

STEPS, BATCH = 50, 4
SHAPE = {  # of Stable Diffusion 1, an eighth as wide, with two levels less
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,  # diffusers' word for the number of heads
    "cross_attention_dim": 24,
}
SCHEDULE = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}


class Batches:
    """The same pictures, conditions, timesteps and noise for both."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.pictures = self.normal(16, 4, 8, 8).cumsum(-1) / 3.0
        self.conditions = self.normal(16, 5, 24)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def __iter__(self):
        for _ in range(STEPS):
            i = torch.randint(0, 16, (BATCH,), generator=self.generator)
            t = torch.randint(0, 1000, (BATCH,), generator=self.generator)
            yield self.pictures[i], self.conditions[i], t, self.normal(BATCH, 4, 8, 8)


def optimizer(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-6)


def curve_of_diffusers(network, prediction: str) -> list[float]:
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=prediction)
    steps, losses = optimizer(network.parameters()), []
    for x0, c, t, eps in Batches():
        target = eps if prediction == "epsilon" else scheduler.get_velocity(x0, eps, t)
        loss = torch.nn.functional.mse_loss(network(scheduler.add_noise(x0, eps, t), t, c).sample, target)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


def our_curve(network, prediction: str) -> list[float]:
    model = DDPM(
        {"target": "torch.nn.Identity"},
        conditioning_key="crossattn",
        parameterization={"epsilon": "eps", "v_prediction": "v"}[prediction],
        use_ema=False,
        image_size=8,
        channels=4,
        **SCHEDULE,
    )
    model.model.diffusion_model = network
    steps, losses = optimizer(model.trainable_parameters()), []
    for x0, c, t, eps in Batches():
        output = model.model(model.q_sample(x0, t, eps), t, c_crossattn=[c])
        loss, _ = model._losses(output, model.training_target(x0, eps, t), t)
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_same_curve(prediction: str) -> None:
    from diffusers import UNet2DConditionModel

    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**SHAPE)
    ours = UNetModel(**unet_params(dict(theirs.config)))
    weights = theirs.state_dict()
    ours.load_state_dict({name: apply_recipe(recipe, weights).clone() for name, recipe in to_ours(UNET, weights).items()})
    expected, found = curve_of_diffusers(theirs, prediction), our_curve(ours, prediction)
    assert all(math.isfinite(loss) for loss in expected)
    assert sum(expected[-10:]) < 0.9 * sum(expected[:10])  # it does learn: equal curves mean something
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found == pytest.approx(expected, rel=2e-3)
