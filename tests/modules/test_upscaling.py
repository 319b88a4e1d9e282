"""Noise augmentation of conditioning: stored numbers of the published code, and what has no numbers, as properties."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.diffusionmodules.schedule import make_beta_schedule
from ldm.modules.diffusionmodules.upscaling import AbstractLowScaleModel, ImageConcatWithNoiseAugmentation, SimpleImageConcat
from ldm.modules.encoders.modules import CLIPEmbeddingNoiseAugmentation
from ldm.util import ConfigError, UserError
from tests.reference_rule import philox

LINEAR = {"linear_start": 1e-4, "linear_end": 2e-2}
KARLO = {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
X = philox(0, (2, 3, 8, 8))


def test_reference_numbers(reference):
    ref = reference("i06_noise_augmentation")
    x, embedding, level = ref.input("x"), ref.input("e"), ref.input("lvl")
    image = ImageConcatWithNoiseAugmentation(LINEAR, max_noise_level=350)
    clip = CLIPEmbeddingNoiseAugmentation(noise_schedule_config=KARLO, timestep_dim=16)
    torch.manual_seed(41)
    z, given = image(x, noise_level=level)
    z_random, random_level = image(x)
    clip_z, level_embedding = clip(embedding, noise_level=level)
    simple, simple_level = SimpleImageConcat()(x)
    ref.check_all(
        dict(
            z=z,
            l=given,
            z_rand=z_random,
            l_rand=random_level,
            clip_z=clip_z,
            clip_lvl_emb=level_embedding,
            simple=simple,
            simple_l=simple_level,
            betas=clip.betas,
        )
    )


def test_random_levels_stay_below_the_limit():
    model = ImageConcatWithNoiseAugmentation(LINEAR, max_noise_level=3)
    levels = model(torch.zeros(500, 1))[1]
    assert levels.dtype == torch.int64 and set(levels.tolist()) == {0, 1, 2}


def test_noise_has_the_variance_of_its_level():
    model = ImageConcatWithNoiseAugmentation(LINEAR)
    torch.manual_seed(0)
    z, level = model(torch.zeros(1, 1, 100, 100), noise_level=torch.tensor([250]))
    expected = torch.as_tensor(1 - (1 - make_beta_schedule("linear", 1000, 1e-4, 2e-2))[:251].prod())
    torch.testing.assert_close(z.var().double(), expected, rtol=0.05, atol=0.0)
    assert level.tolist() == [250]


def test_a_seed_gives_the_same_noise_and_leaves_the_global_generator_alone():
    model = ImageConcatWithNoiseAugmentation(LINEAR)
    level, state = torch.tensor([100, 100]), torch.get_rng_state()
    first, again, other = (model(X, noise_level=level, seed=seed)[0] for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(first, model.q_sample(X, level, noise))


def test_one_level_serves_the_whole_batch():
    model = ImageConcatWithNoiseAugmentation(LINEAR)
    z, level = model(X, noise_level=torch.tensor([5]), seed=1)
    assert level.tolist() == [5, 5]
    assert torch.equal(z, model(X, noise_level=torch.tensor([5, 5]), seed=1)[0])


@pytest.mark.parametrize(("level", "message"), [([1000], "0 .none. to 999"), ([-1, 3], "-1 is out of range"), ([], "1 or 2 levels")])
def test_levels_out_of_range_are_refused(level, message):
    with pytest.raises(UserError, match=message):
        ImageConcatWithNoiseAugmentation(LINEAR)(X, noise_level=torch.tensor(level, dtype=torch.long))


def test_levels_must_be_a_tensor():
    with pytest.raises(UserError, match="a tensor"):
        ImageConcatWithNoiseAugmentation(LINEAR)(X, noise_level=20)


@pytest.mark.parametrize("limit", [0, 1001])
def test_max_noise_level_must_be_within_the_schedule(limit):
    with pytest.raises(ConfigError, match="1 to 1000"):
        ImageConcatWithNoiseAugmentation(LINEAR, max_noise_level=limit)


def test_unknown_schedule_options_are_refused():
    with pytest.raises(ConfigError, match="noise_schedule_config"):
        AbstractLowScaleModel({"beta_stop": 1})


def test_without_schedule_nothing_is_stored_or_changed():
    model = AbstractLowScaleModel()
    assert model.state_dict() == {} and model(X) == (X, None) and model.decode(X) is X


def test_the_schedule_comes_from_the_config_not_from_a_file():
    """A file in half precision would spoil the small levels."""
    model = ImageConcatWithNoiseAugmentation(LINEAR)
    stored = {name: value.half() for name, value in model.state_dict().items()}
    own = model.alphas_cumprod.clone()
    model.load_state_dict(stored)
    assert torch.equal(model.alphas_cumprod, own)


def test_schedule_is_real_on_the_meta_device():
    with torch.device("meta"):
        model = ImageConcatWithNoiseAugmentation(LINEAR)
    assert torch.equal(model.betas, ImageConcatWithNoiseAugmentation(LINEAR).betas)
