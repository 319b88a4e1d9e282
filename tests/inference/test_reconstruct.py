"""scripts/reconstruct.py: pictures through a first stage and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.inference.checkpoint import read_state_dict, save_weights
from ldm.inference.facts import SHIPPED_CONFIG, SHIPPED_WEIGHTS
from ldm.inference.reconstruction import latent_picture, load_first_stage, reconstruct
from ldm.inference.tasks.reconstruct import METADATA_KEY, main
from ldm.util import CheckpointError
from tests.inference.zoo import write_zoo_model

NO_LOSS = {"lossconfig": {"target": "torch.nn.Identity"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (64, 64)), ("b.jpg", (70, 100))):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(size).save(f"in/{name}")
    return tmp_path


@pytest.mark.parametrize(
    ("yaml", "overrides", "size"),
    [
        ("models/first_stage_models/kl-f16/config.yaml", NO_LOSS, (64, 96)),
        ("models/first_stage_models/vq-f8/config.yaml", None, (72, 96)),  # the file has the training's loss networks, too
        ("models/ldm/bsr_sr/config.yaml", None, (68, 100)),
        ("configs/stable-diffusion/v2-inference.yaml", None, (72, 96)),
    ],
    ids=["KL", "VQ with losses", "in a VQ model", "in a KL model"],
)
def test_first_stages_alone_and_in_whole_models(folder: Path, yaml, overrides, size, capsys):
    weights = write_zoo_model(folder / "model", yaml, overrides=overrides)
    assert main(["in", "--ckpt", str(weights), "--safety", "off", "--watermark", "none", "--outdir", "out"]) == 0
    said = capsys.readouterr().out.splitlines()
    values = [float(re.search(r"([\d.]+) dB", line)[1]) for line in said[:3]]
    assert (
        said[0].startswith("in/a.png: ")
        and f"{size[0]}x{size[1]}, latent" in said[1]
        and values[2] == pytest.approx(sum(values[:2]) / 2, abs=0.01)
    )
    for i, expected in enumerate([(64, 64), size]):
        reconstruction, latent = Image.open(f"out/samples/0000{i}.png"), Image.open(f"out/latents/0000{i}.png")
        assert reconstruction.size == latent.size == expected
    original, first = (np.asarray(Image.open(path)).astype(float) for path in ("in/a.png", "out/samples/00000.png"))
    assert 10 * np.log10(255**2 / ((original - first) ** 2).mean()) == pytest.approx(values[0], abs=0.05)
    record = json.loads(Image.open("out/samples/00000.png").text[METADATA_KEY])
    assert record["psnr"] == pytest.approx(values[0], abs=0.01) and Path("out/grid-0000.png").is_file()


def test_the_stage_is_the_same_whole_or_alone(folder: Path):
    whole = load_first_stage(SHIPPED_CONFIG, SHIPPED_WEIGHTS)
    state = {
        k.removeprefix("first_stage_model."): v for k, v in read_state_dict(SHIPPED_WEIGHTS).items() if k.startswith("first_stage_model.")
    }
    alone = load_first_stage(SHIPPED_CONFIG, save_weights(state, folder / "vae.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), alone.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_first_stage(SHIPPED_CONFIG, SHIPPED_WEIGHTS, ema="ema")


def test_averages_of_the_network_are_none_of_the_first_stage(folder: Path):
    state = read_state_dict(SHIPPED_WEIGHTS)
    name = "model.diffusion_model.time_embed.0.weight"
    both = {**state, "model_ema." + name.removeprefix("model.").replace(".", ""): state[name]}
    with pytest.raises(CheckpointError, match="no averaged weights of what is under first_stage_model"):
        load_first_stage(SHIPPED_CONFIG, save_weights(both, folder / "both.safetensors"), ema="ema")
    load_first_stage(SHIPPED_CONFIG, folder / "both.safetensors")


def test_the_shipped_first_stage_measures_about_34_decibels():
    from ldm.data.shapes_world import render, sample_scene

    stage, rng = load_first_stage(SHIPPED_CONFIG, SHIPPED_WEIGHTS), np.random.default_rng(0)
    values = [reconstruct(stage, np.asarray(render(sample_scene(rng)))).psnr for _ in range(8)]
    assert 32.5 < sum(values) / len(values) < 36.0


def test_safety_and_watermark_as_everywhere(folder: Path, capsys):
    from ldm.inference.safety import safety_card
    from ldm.inference.watermark import detect
    from tests.inference.tiny import write_safety

    strict = write_safety(folder / "strict", -2.0)
    Image.open("in/a.png").resize((256, 256)).save("large.png")
    assert main(["large.png", "--safety_ckpt", str(strict), "--watermark", "none", "--outdir", "a"]) == 0
    assert "flagged by the safety check" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open("a/samples/00000.png")), safety_card(256, 256))
    assert np.array_equal(np.asarray(Image.open("a/latents/00000.png")), safety_card(256, 256))
    assert main(["large.png", "--safety", "off", "--outdir", "b"]) == 0
    assert detect(np.asarray(Image.open("b/samples/00000.png"))) is not None


def test_latent_pictures_show_the_strongest_components():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, 16, 16, generator=generator) * torch.tensor([10.0, 5.0, 2.0])[:, None, None]
    z = torch.cat([0.01 * torch.randn(5, 16, 16, generator=generator), base])  # the strong ones come last
    shown = latent_picture(z, 32, 32).astype(float)[::2, ::2]
    for i in range(3):
        correlation = np.corrcoef(shown[:, :, i].ravel(), base[i].numpy().ravel())[0, 1]
        assert abs(correlation) > 0.95
    assert np.array_equal(latent_picture(z, 32, 32), latent_picture(z, 32, 32))
    assert latent_picture(torch.zeros(2, 4, 4), 8, 8).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["lost.png"], "image 'lost.png' does not exist"),
        (["in/a.png", "--H", "65"], "--H 65 must be a multiple of 16: use 64 or 80"),
        (["empty"], "folder 'empty' has no pictures"),
        (["in", "--ckpt", "lost.ckpt"], "lost.ckpt"),
        (["in", "--watermark_text", "too long"], "--watermark_text"),
        (["in", "--config", "pixels.yaml", "--ckpt", "in/a.png", "--safety", "off"], "has no autoencoder"),
    ],
)
def test_wrong_input_is_told_in_one_line(folder: Path, capsys, flags, message):
    (folder / "empty").mkdir()
    stage = "first_stage_config: {target: ldm.models.autoencoder.IdentityFirstStage}"
    (folder / "pixels.yaml").write_text(
        f"model: {{target: ldm.models.diffusion.ddpm.LatentDiffusion, params: {{unet_config: {{}}, {stage}}}}}"
    )
    assert main([*flags, "--outdir", "out"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said and not Path("out").exists()


def test_a_model_of_your_own_needs_its_safety_named(folder: Path, capsys):
    weights = write_zoo_model(folder / "model", "models/ldm/bsr_sr/config.yaml")
    assert main(["in", "--ckpt", str(weights)]) == 2
    assert "--safety_ckpt" in capsys.readouterr().err
