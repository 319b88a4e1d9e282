from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ldm.inference.film import Film
from ldm.inference.pipeline import ImageNoise, Settings, Text2Image, drawing_config, load_model, pick_device, rng_state, set_rng_state
from ldm.inference.prompts import Batch
from ldm.util import ConfigError, UserError
from tests.inference.tiny import DATA

SETTINGS = Settings(height=64, width=64, steps=3, scale=2.0)
PROMPTS = ("a red circle", "a blue star", "two green rings", "")


@pytest.fixture(scope="module")
def model(tiny_ckpt: Path):
    return load_model(tiny_ckpt.parent / "config.yaml", tiny_ckpt)


def batch(*which: int, negative: str = "") -> Batch:
    return Batch(0, tuple(PROMPTS[i] for i in which), (negative,) * len(which), tuple(100 + i for i in which))


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal up to the float noise of another batch size: one level."""
    return int(np.abs(a.astype(int) - b).max()) <= 1


def test_the_model_is_loaded_as_it_was_saved(model, tiny_ckpt: Path):
    from ldm.inference.checkpoint import read_state_dict

    own = model.state_dict()
    assert not any(value.is_meta for value in [*own.values(), *model.buffers()])
    assert all(torch.equal(own[key], value) for key, value in read_state_dict(tiny_ckpt).items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not model.use_ema


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_a_picture_does_not_depend_on_its_batch(model, sampler: str):
    settings = dataclasses.replace(SETTINGS, sampler=sampler, eta=0.7 if sampler == "ddim" else 0.0)
    draw = Text2Image(model, settings).draw
    together = draw(batch(0, 1, 2))
    assert all(image.shape == (64, 64, 3) and image.dtype == np.uint8 for image in together)
    assert all(close(together[i], draw(batch(i))[0]) for i in range(3))
    assert not close(together[0], together[1])
    assert all(np.array_equal(a, b) for a, b in zip(together, draw(batch(0, 1, 2)), strict=True))


def test_the_prompt_the_negative_and_the_seed_matter(model):
    draw = Text2Image(model, SETTINGS).draw
    first = draw(batch(0))[0]
    assert not np.array_equal(first, draw(dataclasses.replace(batch(0), prompts=("something else",)))[0])
    assert not np.array_equal(first, draw(batch(0, negative="green"))[0])
    assert not np.array_equal(first, draw(dataclasses.replace(batch(0), seeds=(7,)))[0])


def test_generate_goes_on_counting_seeds_over_batches(model):
    pipeline = Text2Image(model, SETTINGS)
    batches = list(pipeline.generate(["a", "b", "c"], seed=5, batch_size=2))
    assert [len(images) for images in batches] == [2, 1]
    assert np.array_equal(batches[1][0], pipeline.draw(Batch(0, ("c",), ("",), (7,)))[0])


def test_a_fixed_start_is_shared_and_later_noise_is_not(model):
    same = Batch(0, ("x", "x"), ("", ""), (1, 2))
    calm, lively = (Text2Image(model, dataclasses.replace(SETTINGS, fixed_seed=3, eta=eta)).draw(same) for eta in (0.0, 1.0))
    assert close(calm[0], calm[1])
    assert not close(lively[0], lively[1])


def test_legacy_numbers_come_from_the_global_generator(model):
    pipeline = Text2Image(model, dataclasses.replace(SETTINGS, rng="legacy", eta=0.5))
    torch.manual_seed(0)
    state = rng_state(torch.device("cpu"))
    first = pipeline.draw(batch(0, 1))
    assert not np.array_equal(first[0], pipeline.draw(batch(0, 1))[0])
    set_rng_state(state, torch.device("cpu"))
    assert np.array_equal(first[0], pipeline.draw(batch(0, 1))[0])


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_img2img_from_one_end_to_the_other(model, sampler: str):
    """Strength 0 is the VAE's round trip, 1 is txt2img from the same noise, and between lies something else."""
    rng = np.random.default_rng(0)
    init = rng.integers(0, 255, (64, 64, 3), np.uint8)

    def at(strength: float) -> np.ndarray:
        return Text2Image(model, dataclasses.replace(SETTINGS, sampler=sampler, strength=strength), init).draw(batch(0))[0]

    with torch.no_grad():
        from ldm.imaging import to_tensor, to_uint8

        round_trip = to_uint8(model.first_stage_model.decode(model.encode_first_stage(to_tensor(init)).mode()))[0]
    from_noise = Text2Image(model, dataclasses.replace(SETTINGS, sampler=sampler)).draw(batch(0))[0]
    assert close(at(0.0), round_trip)
    assert np.array_equal(at(1.0), from_noise)
    assert not np.array_equal(at(0.7), from_noise) and not close(at(0.7), round_trip)


def test_other_sizes_than_the_models(model):
    settings = dataclasses.replace(SETTINGS, height=48, width=96)
    assert Text2Image(model, settings).draw(batch(0))[0].shape == (48, 96, 3)
    with pytest.raises(UserError, match="the init image is 64x64, not 96x48"):
        Text2Image(model, settings, np.zeros((64, 64, 3), np.uint8))


def test_bf16_draws_nearly_the_same(model):
    settings = [dataclasses.replace(SETTINGS, precision=precision) for precision in ("full", "bf16", "autocast")]
    full, half, autocast = (Text2Image(model, chosen).draw(batch(0))[0] for chosen in settings)
    assert np.array_equal(full, autocast)  # on the CPU
    assert np.abs(full.astype(float) - half).mean() < 10 and not np.array_equal(full, half)


def test_frames_of_a_film_are_decoded_in_float32_as_the_picture_is(model, monkeypatch: pytest.MonkeyPatch):
    """Amid the sampling, which runs under autocast: the VAEs of some models overflow in float16."""
    seen = []
    usual = model.decode_first_stage
    monkeypatch.setattr(model, "decode_first_stage", lambda z: seen.append(torch.is_autocast_enabled("cpu")) or usual(z))
    monkeypatch.setattr(Text2Image, "_autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    Text2Image(model, SETTINGS).draw(batch(0), film=Film())
    assert len(seen) == SETTINGS.steps and not any(seen)


def test_nan_is_told_with_the_part_it_came_from(model, monkeypatch: pytest.MonkeyPatch):
    pipeline = Text2Image(model, SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(model, "apply_model", lambda x, t, c: x * float("nan"))
        with pytest.raises(UserError, match="the UNet gave NaN"):
            pipeline.draw(batch(0))
    monkeypatch.setattr(model, "decode_first_stage", lambda z: torch.full((1, 3, 64, 64), float("inf")))
    with pytest.raises(UserError, match="the VAE gave NaN"):
        pipeline.draw(batch(0))


def test_noise_of_one_picture_is_that_of_its_seed():
    noise = ImageNoise([4, 9])
    first, second = (noise((2, 3, 4), torch.device("cpu"), torch.float32) for _ in range(2))
    alone = ImageNoise([9])
    assert torch.equal(first[1:], alone((1, 3, 4), torch.device("cpu"), torch.float32))
    assert torch.equal(second[1:], alone((1, 3, 4), torch.device("cpu"), torch.float32))
    assert not torch.equal(first, second)
    with pytest.raises(ValueError, match="3 pictures"):
        noise((3, 4), torch.device("cpu"), torch.float32)


def test_a_config_for_training_draws_without_its_start_weights():
    config = yaml.safe_load((DATA / "tiny_text2image.yaml").read_text())["model"]
    config["params"] |= {"ckpt_path": "gone.ckpt", "use_ema": True}
    stage = config["params"]["first_stage_config"]["params"]
    stage |= {"ckpt_path": "gone.ckpt", "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator"}}
    cleaned = drawing_config(config)["params"]
    assert "gone.ckpt" not in yaml.safe_dump(cleaned) and cleaned["use_ema"] is False
    assert cleaned["first_stage_config"]["params"]["lossconfig"] == {"target": "torch.nn.Identity"}
    assert config["params"]["ckpt_path"] == "gone.ckpt"  # the given one is left alone


def test_a_config_of_something_that_does_not_draw_is_refused(tmp_path: Path, tiny_ckpt: Path):
    with pytest.raises(ConfigError, match="does not draw from prompts"):
        load_model(DATA / "tiny_clip.yaml", tiny_ckpt)


def test_averaged_weights_are_drawn_with(tmp_path: Path):
    """A checkpoint in the middle of training: `auto` draws with its averages, `raw` with the trained weights."""
    from ldm.inference.checkpoint import save_weights
    from ldm.inference.facts import read_config
    from ldm.util import instantiate_from_config

    config = read_config(DATA / "tiny_text2image.yaml")
    config["model"]["params"]["use_ema"] = True
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    trained = instantiate_from_config(config["model"])
    name, weight = next((n, p) for n, p in trained.model.named_parameters() if p.ndim == 4)
    with torch.no_grad():
        weight.add_(1.0)
    save_weights(trained, tmp_path / "model.safetensors")
    averaged, raw = (load_model(tmp_path / "config.yaml", tmp_path / "model.safetensors", ema=ema) for ema in ("auto", "raw"))
    difference = dict(raw.model.named_parameters())[name] - dict(averaged.model.named_parameters())[name]
    torch.testing.assert_close(difference, torch.ones_like(difference))


def test_devices():
    assert pick_device("cpu").type == "cpu"
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    assert pick_device("auto").type == (there.type if there else "cpu")
    with pytest.raises(UserError, match="not available here"):
        pick_device("xpu" if there is None or there.type != "xpu" else "mps")
