"""The fine-tuning configs that ship: they build, name what they leave open, train on a picture or two, and what comes out draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ldm.inference.cli import main as draw
from ldm.inference.output import read_metadata
from ldm.inference.zoo import build_on_meta
from ldm.training.cli import main, merge_configs
from ldm.training.finetune import FineTuning
from ldm.util import instantiate_from_config
from tests.contracts.shipped import built, summarise

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "finetune"
METHODS = ("lora", "textual_inversion", "dreambooth")
OPEN = {"lora": {"data_root", "ckpt"}, "textual_inversion": {"data_root", "ckpt", "start"}, "dreambooth": {"data_root", "ckpt", "class"}}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def test_each_method_has_one_for_shapes_and_one_for_stable_diffusion():
    assert {path.name for path in FOLDER.iterdir()} == {f"{method}-{base}.yaml" for method in METHODS for base in ("shapes", "sd1")}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_open_is_named(method, capsys, tmp_path):
    text = (FOLDER / f"{method}-sd1.yaml").read_text()
    assert set(re.findall(r"^(\w+): \?\?\?  # \w", text, re.M)) == OPEN[method]
    assert main(["--base", f"configs/finetune/{method}-sd1.yaml", "-t", "--logdir", str(tmp_path)]) == 2
    given = " ".join(f"{key}=VALUE" for key in sorted(OPEN[method]))
    assert capsys.readouterr().err == f"error: the config leaves open what you must give: add {given}\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["shapes", "sd1"])
def test_the_model_is_that_of_its_base(method, base):
    words = [f"{key}=x" for key in OPEN[method]] if base == "sd1" else []
    config = merge_configs([FOLDER / f"{method}-{base}.yaml"], words)
    of = {"shapes": "models/shapes/config.yaml", "sd1": "configs/stable-diffusion/v1-inference.yaml"}[base]
    ours = summarise(build_on_meta(config["model"])).shapes
    theirs = {name: shape for name, shape in built(of).shapes.items() if not name.startswith("model_ema.")}
    assert {name: shape for name, shape in ours.items() if name in theirs} == theirs
    assert config["model"]["params"]["ckpt_path"] == ("x" if base == "sd1" else "models/shapes/model.safetensors")
    callbacks = config["lightning"]["callbacks"]
    if method == "dreambooth":
        assert config["model"]["params"]["prior_weight"] == 1.0
    else:
        assert isinstance(instantiate_from_config(callbacks[method]), FineTuning)


# ------------------------------------------------------------------------------------------------------- the model that ships
FLAGS = {
    "lora": ("a sks heart", "--lora", "lora.safetensors"),
    "textual_inversion": ("a <mine>", "--embedding", "embedding.safetensors"),
}


@pytest.mark.parametrize("method", METHODS)
def test_from_the_config_to_a_picture_with_the_model_that_ships(method, tmp_path, capsys):
    words = ["lightning.trainer.max_steps=2", "lightning.callbacks.image_logger=null", "lightning.callbacks.training_plot=null"]
    words += ["lightning.logger=false", "data.params.batch_size=1", "lightning.trainer.accelerator=cpu"]
    train = "data.params.train.params"
    if method == "textual_inversion":
        words += [f"{train}.image_size=128"]
    else:  # latents are kept, of few pictures here
        words += [f"{train}.{part}.params.cache_dir={tmp_path}/latents" for part in ("instance", "prior")]
        drawn = ["pictures=2", "steps=2", "size=128", f"cache_dir={tmp_path}/drawn"]
        prior = drawn if method == "dreambooth" else ["size=2", "image_size=128"]
        words += [f"{train}.prior.params.dataset.params.{word}" for word in prior]
        words += [f"{train}.instance.params.dataset.params.image_size=128"]
    assert main(["--base", f"configs/finetune/{method}-shapes.yaml", "-t", "-n", "run", "-l", str(tmp_path / "logs"), *words]) == 0
    (run,) = (tmp_path / "logs").iterdir()
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    if method == "dreambooth":
        assert "model.diffusion_model.out.2.weight" in state and not (run / "lora.safetensors").exists()
        return
    assert all("lora_" in name or "learnt" in name for name in state)
    prompt, flag, file = FLAGS[method]
    options = ["--prompt", prompt, flag, str(run / file), "--steps", "2", "--n_samples", "1", "--outdir", str(tmp_path / "out")]
    assert draw("txt2img", [*options, "--H", "128", "--W", "128", "--n_iter", "1", "--skip_grid"]) == 0
    record = read_metadata(tmp_path / "out" / "samples" / "00000.png")
    assert record["options"][flag[2:]] == [f"{run / file}:{'1.0' if method == 'lora' else '<mine>'}"]
    assert draw("txt2img", ["--reproduce", str(tmp_path / "out" / "samples" / "00000.png"), "--outdir", str(tmp_path / "out")]) == 0
    first, second = ((tmp_path / "out" / "samples" / f"0000{i}.png") for i in range(2))
    from PIL import Image

    assert Image.open(first).tobytes() == Image.open(second).tobytes()
    capsys.readouterr()
