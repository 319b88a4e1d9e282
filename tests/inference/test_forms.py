"""One tiny model in every form in which checkpoints come: all of them fill it, and with the same numbers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from ldm.inference.checkpoint import load_weights, read_metadata, read_state_dict, save_weights
from ldm.inference.facts import REPO, SHIPPED_WEIGHTS, read_config
from ldm.inference.weights import key_names
from ldm.inference.weights.convert import convert
from ldm.inference.weights.families import resolve_model
from ldm.inference.weights.prune import prune
from ldm.models.autoencoder import AutoencoderKL
from ldm.modules.encoders.text import FrozenOpenCLIPEmbedder
from ldm.util import CheckpointError, instantiate_from_config
from tests.inference.diffusers_models import parts, save

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """The folder of a tiny Stable Diffusion 1, and its tensors under our names."""
    folder = save(tmp_path_factory.mktemp("source") / "sd1", parts("sd1"))
    return folder, read_state_dict(folder)


def fresh(folder: Path, **params: Any) -> Any:
    """A model of that shape with other numbers."""
    model = read_config(resolve_model(None, str(folder))[0])["model"]
    return instantiate_from_config({**model, "params": {**model["params"], **params}})


def with_averages(state: State) -> State:
    """Trained weights that are off by one, averages that are right."""
    shadows = key_names.shadows([name for name in state if name.startswith("model.")], "model_ema.", "model.")
    full = {name: value + 1 if name in shadows else value for name, value in state.items()}
    full |= {shadow: state[name] for name, shadow in shadows.items()}
    return full | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int32)}


def flat(state: State) -> State:
    return {name.replace("text_model.", ""): value for name, value in state.items()}


def averages_alone(state: State) -> State:
    return {name: value for name, value in with_averages(state).items() if not name.startswith("model.")}


def training(state: State) -> dict[str, Any]:
    """As Lightning writes it: optimizer and settings beside the weights, and schedule and loss among them."""
    buffers = {
        "betas": torch.rand(1000),
        "lvlb_weights": torch.rand(1000),
        "logvar": torch.zeros(1000),
        "first_stage_model.loss.logvar": torch.zeros(()),
    }
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {
        "state_dict": {**state, **buffers},
        "optimizer_states": [optimizer],
        "hyper_parameters": OmegaConf.create({"lr": 1e-4}),
        "epoch": 3,
    }


def wrapped(state: State) -> dict[str, Any]:
    return {"state_dict": state}


def positions(state: State) -> State:
    return {**state, "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: value for name, value in state.items()}


CKPTS: dict[str, Callable[[State], Any]] = {
    "EMA only": wrapped,  # the averages have become the weights
    "full": lambda state: training(with_averages(state)),
    "averages alone": lambda state: wrapped(averages_alone(state)),
    "without the wrapper": lambda state: state,
    "with position_ids": lambda state: wrapped(positions(state)),
    "without text_model.": lambda state: wrapped(flat(state)),
    "without text_model., with position_ids": lambda state: wrapped(flat(positions(state))),
    "DDP": lambda state: wrapped(prefixed("module.")(state)),
    "compiled": lambda state: wrapped(prefixed("_orig_mod.")(state)),
    "DDP, full, flat": lambda state: training(prefixed("module.")(flat(with_averages(state)))),
    "with marks of other tools": lambda state: {**state, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
}


def assert_filled(model: Any, want: State, half: bool = False) -> None:
    got = model.state_dict()
    for name, value in want.items():
        assert torch.equal(got[name], value.half().float() if half else value), name


@pytest.mark.parametrize(("form", "zipped"), [*((form, True) for form in CKPTS), ("EMA only", False), ("without the wrapper", False)])
def test_every_ckpt_fills_the_model(source: tuple[Path, State], tmp_path: Path, form: str, zipped: bool) -> None:
    folder, want = source
    torch.save(CKPTS[form](want), tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    model = fresh(folder)
    load_weights(model, tmp_path / "m.ckpt")
    assert_filled(model, want)


@pytest.mark.parametrize("form", ["plain", "half", "pruned", "pruned half", "converted", "DDP"])
def test_every_safetensors_fills_the_model(source: tuple[Path, State], tmp_path: Path, form: str) -> None:
    folder, want = source
    path, half = tmp_path / "m.safetensors", form.endswith("half")
    if form.startswith("pruned"):
        torch.save(training(with_averages(want)), tmp_path / "m.ckpt")
        done = prune(tmp_path / "m.ckpt", path, dtype="float16" if half else "float32")
        assert done["tensors"] < len(with_averages(want))
        assert not any(name.startswith("model_ema.") for name in load_file(path))
    elif form == "converted":
        convert(folder, path)
    else:
        save_weights(prefixed("module.")(want) if form == "DDP" else want, path, dtype=torch.float16 if half else None)
    model = fresh(folder)
    load_weights(model, path)
    assert_filled(model, want, half)


@pytest.mark.parametrize("form", ["plain", "sharded", "fp16"])
def test_every_folder_fills_the_model(source: tuple[Path, State], tmp_path: Path, form: str) -> None:
    folder, want = source
    if form != "plain":
        models = parts("sd1")
        folder = save(tmp_path / "other", models, max_shard_size="200KB")
        if form == "fp16":
            for name in ("unet", "vae", "text_encoder"):
                for path in (folder / name).glob("*.safetensors*"):
                    path.unlink()
                models[name].half().save_pretrained(folder / name, variant="fp16")
    model = fresh(folder)
    load_weights(model, folder)
    assert_filled(model, want, half=form == "fp16")


def test_pruning_keeps_what_its_author_wrote_and_can_make_a_file_complete(source: tuple[Path, State], tmp_path: Path) -> None:
    folder, want = source
    full = prefixed("module.")(with_averages(want))
    full |= {"module.first_stage_model.loss.discriminator.main.0.weight": torch.ones(2), "module.betas": torch.rand(1000)}
    path = save_weights(full, tmp_path / "full.safetensors", metadata={"modelspec.title": "mine", "licence": "open"})
    (tmp_path / "own.yaml").write_text(OmegaConf.to_yaml(resolve_model(None, str(folder))[0]))
    prune(path, tmp_path / "small.safetensors", dtype="bfloat16", config=tmp_path / "own.yaml")
    header, state = read_metadata(tmp_path / "small.safetensors"), load_file(tmp_path / "small.safetensors")
    assert (header["modelspec.title"], header["licence"], header["averages"]) == ("mine", "open", "ema")
    assert state.keys() == {*want, "betas"} and state["betas"].dtype == torch.float32
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in want.items())
    config, _ = resolve_model(None, str(tmp_path / "small.safetensors"))
    load_weights(instantiate_from_config(config["model"]), tmp_path / "small.safetensors")
    prune(folder, tmp_path / "from_folder.safetensors", dtype="float32")
    assert load_file(tmp_path / "from_folder.safetensors").keys() == want.keys()


def test_a_model_that_keeps_averages_gets_both(source: tuple[Path, State], tmp_path: Path) -> None:
    folder, want = source
    torch.save(training(with_averages(want)), tmp_path / "m.ckpt")
    model = fresh(folder, use_ema=True)
    assert load_weights(model, tmp_path / "m.ckpt").ema == "both"
    name = "model.diffusion_model.time_embed.0.weight"
    assert torch.equal(model.state_dict()[name], want[name] + 1)
    assert torch.equal(model.state_dict()["model_ema.diffusion_modeltime_embed0weight"], want[name])
    raw = fresh(folder)
    assert load_weights(raw, tmp_path / "m.ckpt", ema="raw").ema == "raw"
    assert torch.equal(raw.state_dict()[name], want[name] + 1)


# ------------------------------------------------------------------------------------------------------- parts of a file
def test_parts_are_found_in_the_file_of_a_whole_model(source: tuple[Path, State], tmp_path: Path) -> None:
    folder, want = source
    torch.save(training(with_averages(want)), tmp_path / "m.ckpt")
    model = fresh(folder)
    for name in ("model", "model.diffusion_model", "first_stage_model", "cond_stage_model"):
        report = load_weights(model.get_submodule(name), tmp_path / "m.ckpt")
        assert report.ema == ("ema" if name.startswith("model") else "none")  # the file averages the network alone
    assert_filled(model, want)
    load_weights(model.model.diffusion_model, tmp_path / "m.ckpt", ema="raw")
    name = "model.diffusion_model.time_embed.0.weight"
    assert torch.equal(model.state_dict()[name], want[name] + 1)
    with pytest.raises(CheckpointError, match=r"nothing under embedder\."):
        load_weights(model.first_stage_model, tmp_path / "m.ckpt", prefix="embedder.")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_weights(model.first_stage_model, save_weights(want, tmp_path / "m.safetensors"), ema="ema")


def test_classes_find_their_part_in_the_model_that_ships(tmp_path: Path) -> None:
    params = read_config(REPO / "models" / "shapes" / "config.yaml")["model"]["params"]
    want = read_state_dict(SHIPPED_WEIGHTS)
    stage = AutoencoderKL(**{**params["first_stage_config"]["params"], "ckpt_path": str(SHIPPED_WEIGHTS)})
    assert torch.equal(stage.decoder.conv_in.weight, want["first_stage_model.decoder.conv_in.weight"].float())
    text = FrozenOpenCLIPEmbedder(**params["cond_stage_config"]["params"])
    load_weights(text, SHIPPED_WEIGHTS)
    assert torch.equal(text.model.ln_final.weight, want["cond_stage_model.model.ln_final.weight"].float())


def test_a_part_in_two_places_needs_a_prefix(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    state = {f"{place}.{name}": value for place in ("one", "two") for name, value in layer.state_dict().items()}
    path = save_weights(state, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"several places: say prefix='one\.' or 'two\.'"):
        load_weights(torch.nn.Linear(2, 2), path)
    load_weights(torch.nn.Linear(2, 2), path, prefix="two.")


def test_an_unused_last_block_may_be_missing(tmp_path: Path) -> None:
    """Files made from diffusers folders of Stable Diffusion 2 have 23 of 24 blocks, and no projection."""
    arch = {"embed_dim": 8, "text_cfg": {"width": 16, "heads": 2, "layers": 3, "vocab_size": 49408, "context_length": 77}}
    whole = FrozenOpenCLIPEmbedder(arch, layer="penultimate")
    state = whole.state_dict()
    left_out = [n for n in state if "resblocks.2." in n or n in ("model.text_projection", "model.logit_scale")]
    path = save_weights({n: v for n, v in state.items() if n not in left_out}, tmp_path / "m.safetensors")
    for device in ("cpu", "meta"):
        with torch.device(device):
            other = FrozenOpenCLIPEmbedder(arch, layer="penultimate")
        report = load_weights(other, path)
        assert sorted(report.missing) == sorted(left_out)
        torch.testing.assert_close(other(["a red circle"]), whole(["a red circle"]))
    with pytest.raises(CheckpointError, match=r"lacks model\.transformer\.resblocks\.2"):
        load_weights(FrozenOpenCLIPEmbedder(arch, layer="last"), path)


# ---------------------------------------------------------------------------------------------------------- file alone
OFFLINE = """
import runpy, socket, sys

class Closed(socket.socket):
    def __new__(cls, *args, **kwargs):
        raise OSError("networking is switched off")

def refuse(*args, **kwargs):
    raise OSError("networking is switched off")

socket.socket, socket.create_connection, socket.getaddrinfo = Closed, refuse, refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_checkpoint_alone_draws_without_a_network(source: tuple[Path, State], tmp_path: Path, form: str) -> None:
    if form == "file":
        model = tmp_path / "alone" / "downloaded.safetensors"
        model.parent.mkdir()
        model.write_bytes(SHIPPED_WEIGHTS.read_bytes())
        assert [path.name for path in model.parent.iterdir()] == ["downloaded.safetensors"]
        size = ["--H", "64", "--W", "64"]
    else:
        model, size = source[0], ["--H", "16", "--W", "16"]
    flags = ["--ckpt", str(model), "--safety", "off", "--watermark", "none", "--prompt", "a red circle", "--steps", "2", "--n_samples", "1"]
    command = [sys.executable, "-c", OFFLINE, str(REPO / "scripts" / "txt2img.py"), *flags, *size, "--outdir", str(tmp_path / "out")]
    environment = {"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--n_iter", "1"], capture_output=True, text=True, env=environment, timeout=250, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 1
    assert not (tmp_path / "hf").exists()


def test_the_block_blocks() -> None:
    """That test proves something only if no socket opens."""
    probe = "import runpy, sys, tempfile, pathlib; import socket\ntry:\n    socket.socket()\nexcept OSError:\n    sys.exit(7)\n"
    script = OFFLINE.replace("runpy.run_path", "exec(compile(sys.argv[1], 'probe', 'exec')); runpy.run_path")
    assert subprocess.run([sys.executable, "-c", script, "x", probe], capture_output=True, timeout=60).returncode == 7
