"""The published training configs start as they are: data classes find a folder of Shapes pictures, networks are shrunk by `key=value`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.shapes import ShapesDataset
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.modules.losses.lpips import LPIPS
from ldm.training.cli import main
from ldm.training.parts import hand_over
from ldm.training.preflight import start_weights
from ldm.util import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LDM = "configs/latent-diffusion/{}.yaml"
FIRST_STAGE, UNET = "model.params.first_stage_config.params", "model.params.unet_config.params"
STAGE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32, "num_res_blocks": 1}
STAGE |= {"attn_resolutions": [], "dropout": 0.0, "num_groups": 8}
SMALL_STAGE = [f"{FIRST_STAGE}.ddconfig.{key}" for key in ("ch=32", "num_res_blocks=1", "num_groups=8", "attn_resolutions=[]")]
SMALL_UNET = [f"{UNET}.{key}" for key in ("model_channels=32", "num_res_blocks=1")]
EVERYWHERE = [
    *("data.params.batch_size=2", "data.params.num_workers=0"),
    *("lightning.trainer.accelerator=cpu", "lightning.trainer.max_steps=2", "lightning.logger=false"),
    "lightning.callbacks.training_plot=null",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Shapes pictures of 64 pixels in the folders of the published data sets."""
    root = tmp_path_factory.mktemp("data")
    shapes = ShapesDataset(size=10, image_size=64, seed=5)
    images = [Image.fromarray(((item["image"] + 1) * 127.5).astype(np.uint8)) for item in map(shapes.__getitem__, range(10))]
    for i, image in enumerate(images):
        split, name = "train" if i < 8 else "val", f"{i}.png"
        for place in ("celebahq", "lsun/churches", f"imagenet/{split}/n0{i % 2}"):
            (root / place).mkdir(parents=True, exist_ok=True)
            image.save(root / place / name)
    return root


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, pictures) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("LDM_DATA", str(pictures))


def start(config: str, folder: Path, *words: str) -> dict:
    """Two updates of a published config; its last checkpoint."""
    assert main(["--base", config, "-t", "-n", "run", "--logdir", str(folder / "logs"), *EVERYWHERE, *words]) == 0
    (run,) = (folder / "logs").glob("*_run")
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def saved(stage: torch.nn.Module, folder: Path) -> Path:
    path = folder / "model.ckpt"
    torch.save({"state_dict": stage.state_dict()}, path)
    return path


def assert_first_stage_kept(checkpoint: dict, stage: torch.nn.Module) -> None:
    for name, value in stage.state_dict().items():
        assert torch.equal(checkpoint["state_dict"][f"first_stage_model.{name}"], value), name


def test_unconditional_over_a_vq_autoencoder(tmp_path):
    stage = VQModel({**STAGE, "double_z": False, "z_channels": 3, "ch_mult": [1, 1, 1]}, None, n_embed=32, embed_dim=3)
    words = [f"{FIRST_STAGE}.ckpt_path={saved(stage, tmp_path)}", f"{FIRST_STAGE}.n_embed=32", f"{FIRST_STAGE}.ddconfig.ch_mult=[1,1,1]"]
    words += [f"{UNET}.channel_mult=[1,1,1,1]", "data.params.train.params.size=64", "data.params.validation.params.size=64"]
    checkpoint = start(LDM.format("celebahq-ldm-vq-4"), tmp_path, *SMALL_STAGE, *SMALL_UNET, *words)
    assert checkpoint["global_step"] == 2
    assert_first_stage_kept(checkpoint, stage)


def test_unconditional_over_a_kl_autoencoder(tmp_path):
    stage = AutoencoderKL({**STAGE, "ch_mult": [1, 1, 1, 1]}, None, embed_dim=4)
    words = [f"{FIRST_STAGE}.ckpt_path={saved(stage, tmp_path)}", f"{FIRST_STAGE}.ddconfig.ch_mult=[1,1,1,1]"]
    words += [f"{UNET}.channel_mult=[1,1]", "data.params.train.params.size=64", "data.params.validation.params.size=64"]
    checkpoint = start(
        LDM.format("lsun_churches-ldm-kl-8"), tmp_path, *SMALL_STAGE, *SMALL_UNET, f"{UNET}.attention_resolutions=[1]", *words
    )
    assert checkpoint["global_step"] == 2
    assert float(checkpoint["state_dict"]["scale_factor"]) != 1.0, "scale_by_std"
    assert_first_stage_kept(checkpoint, stage)


def test_class_conditional_with_pictures_in_the_log(tmp_path):
    words = [f"{FIRST_STAGE}.ckpt_path=null", f"{FIRST_STAGE}.n_embed=32", f"{FIRST_STAGE}.ddconfig.ch_mult=[1,1,1,1]"]
    words += [f"{UNET}.channel_mult=[1,1,1]", f"{UNET}.context_dim=16", "model.params.cond_stage_config.params.embed_dim=16"]
    words += [f"data.params.{split}.params.config.size=64" for split in ("train", "validation")]
    log = "lightning.callbacks.image_logger.params"
    words += [f"{log}.batch_frequency=2", f"{log}.log_images_kwargs={{ddim_steps: 2, plot_progressive_rows: false}}"]
    checkpoint = start(LDM.format("cin-ldm-vq-f8"), tmp_path, *SMALL_STAGE, *SMALL_UNET, *words)
    assert checkpoint["global_step"] == 2
    assert checkpoint["state_dict"]["cond_stage_model.embedding.weight"].shape == (1000, 16)
    assert list((tmp_path / "logs").rglob("samples_*.png"))


def test_kl_autoencoder_with_lpips_and_discriminator(tmp_path, monkeypatch):
    """With accumulation over two batches, as published; the discriminator joins from the start here."""
    net = {name: torch.randn(value.shape) * value[0].numel() ** -0.5 for name, value in LPIPS().named_parameters()}
    torch.save({name: value.abs() if name.startswith("lin") else value for name, value in net.items()}, tmp_path / "lpips.pth")
    monkeypatch.setenv("LDM_LPIPS_WEIGHTS", str(tmp_path / "lpips.pth"))
    params = "model.params"
    words = [f"{params}.ddconfig.{key}" for key in ("ch=32", "num_res_blocks=1", "ch_mult=[1,1,1,1]", "num_groups=8")]
    words += [f"{params}.lossconfig.params.disc_start=0", "data.params.train.params.size=32", "data.params.validation.params.size=32"]
    checkpoint = start("configs/autoencoder/autoencoder_kl_32x32x4.yaml", tmp_path, *words)
    assert checkpoint["generator_steps"] == 2
    moved = [name for name in checkpoint["state_dict"] if name.startswith("loss.discriminator.") and name.endswith("running_mean")]
    assert all(checkpoint["state_dict"][name].any() for name in moved) and moved


@pytest.mark.parametrize("name", ["celebahq-ldm-vq-4", "lsun_churches-ldm-kl-8", "cin-ldm-vq-f8"])
def test_a_first_stage_that_is_not_there_is_told_before_any_work(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ldm.training.run.build_model", lambda *args: pytest.fail("a model was built"))
    assert main(["--base", LDM.format(name), "-t", "--logdir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith(
        "error: weights that the model starts from are not there: models/first_stage_models/"
    )
    assert "model.ckpt does not exist" in message and f"{FIRST_STAGE}.ckpt_path=FILE" in message
    assert not list(tmp_path.iterdir()), "nothing was made"


def test_a_config_in_the_place_of_weights(tmp_path, capsys):
    """Some published files name their first stage's YAML as its checkpoint."""
    word = f"{FIRST_STAGE}.ckpt_path=models/first_stage_models/vq-f4/config.yaml"
    assert main(["--base", LDM.format("ffhq-ldm-vq-4"), "-t", "--logdir", str(tmp_path), word]) == 2
    assert "config.yaml is a config and holds no weights" in capsys.readouterr().err


def test_all_start_weights_are_found():
    model = {"params": {"ckpt_path": "a", "first": {"ckpt_path": None}, "list": [{"ckpt_path": "b"}]}}
    assert list(start_weights(model, "model")) == [("model.params.ckpt_path", "a"), ("model.params.list.0.ckpt_path", "b")]
    towers = {name: {"version": name} for name in ("laion2b_s32b_b79k", "openai/clip-vit-large-patch14", "tower.safetensors")}
    assert list(start_weights(towers, "model")) == [("model.tower.safetensors.version", "tower.safetensors")]


def test_data_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LDM_DATA", str(tmp_path / "nowhere"))
    words = [f"{FIRST_STAGE}.ckpt_path=null", *SMALL_STAGE, *SMALL_UNET, f"{UNET}.channel_mult=[1,1,1,1]", *EVERYWHERE]
    assert main(["--base", LDM.format("celebahq-ldm-vq-4"), "-t", "--logdir", str(tmp_path), *words]) == 2
    message = capsys.readouterr().err
    assert "CelebAHQTrain" in message and "nowhere/celebahq does not exist" in message


def test_accumulation_is_handed_to_a_model_that_steps_itself():
    """lightning.trainer says 2, as in the published autoencoders; a model that says 3 itself is a contradiction."""
    model = AutoencoderKL({**STAGE, "ch_mult": [1, 1]}, None, embed_dim=4)
    arguments = {"accumulate_grad_batches": 2, "gradient_clip_val": 0, "benchmark": True}
    hand_over(arguments, model)
    assert model.accumulate_grad_batches == 2 and model.gradient_clip_val is None and arguments == {"benchmark": True}
    model.accumulate_grad_batches = 3
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 cannot .* accumulate_grad_batches=3 of its own"):
        hand_over({"accumulate_grad_batches": 2}, model)
    with pytest.raises(ConfigError, match="has no setting of that name"):
        hand_over({"gradient_clip_val": 1.0}, torch.nn.Identity())
