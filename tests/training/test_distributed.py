"""Several processes train as one does: the same weights from the same global batch, whole checkpoints, and one clear end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from ldm import util
from ldm.inference.checkpoint import load_weights, read_state_dict
from ldm.inference.weights.prune import prune
from ldm.processes import is_first, label, rank_and_world, stands_alone, started_by_another
from ldm.training.distributed import use_strategy
from ldm.training.sharding import find_blocks, find_networks
from ldm.util import ConfigError, UserError, instantiate_from_config
from tests.training import conftest, spread
from tests.training.conftest import last

ROOT = Path(__file__).resolve().parents[2]
CLIPPED = ["lightning.trainer.gradient_clip_val=0.5", "lightning.trainer.accumulate_grad_batches=2"]
SMALL = "lightning.fsdp.min_size=10"  # every block a shard of its own


def steps(n: int) -> str:
    return f"lightning.trainer.max_steps={n}"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "spread.yaml"
    path.write_text(yaml.safe_dump(spread.CONFIG))
    return path


@pytest.fixture
def alone(train: Callable[..., Path]) -> Callable[..., Path]:
    """One process whose batch is that of two."""
    return lambda *words, **options: train("data.params.batch_size=8", *words, **options)


@pytest.fixture
def together(tmp_path: Path, config: Path) -> Callable[..., Path]:
    """together(strategy, *words, name=..., resume=...) -> folder of a run of two processes; with `codes`, what they said."""

    def call(
        strategy: str,
        *words: str,
        name: str = "two",
        resume: Path | None = None,
        codes: bool = False,
        variables: Callable = spread.torchrun_variables,
    ) -> Path | tuple[list[int], list[str]]:
        source = ["--resume", str(resume)] if resume else ["--base", str(config), "--name", name]
        flags = ["--train", "--trust", "tests", "--logdir", str(tmp_path / "logs"), "--devices", "2", "--strategy", strategy]
        found = spread.run_processes(tmp_path / f"said-{name}", "ldm.training.cli.main", [[*source, *flags, *words]], variables=variables)
        if codes:
            return found
        assert found[0] == [0, 0], "\n".join(found[1])
        assert found[1][0].count("effective batch") == 1 and "effective batch" not in found[1][1]
        return resume or max((tmp_path / "logs").glob(f"*_{name}"))

    return call


def assert_close(a: Path, b: Path, moved: bool = True, atol: float = 1e-6) -> None:
    """Weights, EMA and optimizer state agree to float tolerance, under the same names and numbers."""
    one, two = last(a), last(b)
    assert one["global_step"] == two["global_step"]
    assert list(one["state_dict"]) == list(two["state_dict"])
    start = {name: value for name, value in instantiate_from_config(spread.CONFIG["model"]).state_dict().items()} if moved else {}
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-4, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        assert name not in start or name.startswith("frozen") or value.shape == () or not torch.equal(value, start[name])
    ours, theirs = one["optimizer_states"][0], two["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    assert list(ours["state"]) == list(theirs["state"])
    for i, values in ours["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(theirs["state"][i][name], value, rtol=1e-4, atol=atol)


@pytest.fixture(autouse=True)
def _trusted() -> Iterator[None]:
    before = set(util._TRUSTED)
    util.trust("tests")
    yield
    util._TRUSTED.clear()
    util._TRUSTED.update(before)


# ---------------------------------------------------------------------- the same training
def test_main_py_with_two_devices(tmp_path: Path, config: Path, alone: Callable[..., Path]) -> None:
    """The command of the README: Lightning starts the second process; one run folder, one log of each kind, one line about the batch."""
    flags = ["-t", "--trust", "tests", "--logdir", str(tmp_path / "ddp"), "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
    command = [sys.executable, "main.py", "--base", str(config), *flags, "-n", "two"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("effective batch 8 = 2 devices x 4 items x 1 accumulated") == 1
    assert done.stderr.count("finished after 4 updates") == 1
    (folder,) = (tmp_path / "ddp").iterdir()
    assert len(list((folder / "configs").glob("*-project.yaml"))) == len(list((folder / "csv").iterdir())) == 1
    assert_close(alone(), folder)


@pytest.mark.parametrize(
    "strategy, variables", [("ddp", spread.torchrun_variables), ("ddp", spread.slurm_variables), ("fsdp", spread.slurm_variables)]
)
def test_same_weights(together: Callable, alone: Callable[..., Path], strategy: str, variables: Callable) -> None:
    """Under torchrun and under SLURM; with clipping and accumulation."""
    words = [*CLIPPED, *([SMALL] if strategy == "fsdp" else [])]
    assert_close(alone(*CLIPPED, name="one"), together(strategy, *words, variables=variables))


def test_an_autoencoder_with_a_discriminator(together: Callable, config: Path) -> None:
    """Its two optimizers take turns, so that each backward pass leaves parameters out: plain ddp refuses the second batch."""
    size = {"z_channels": 2, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2], "num_res_blocks": 1}
    loss = {"disc_start": 1, "disc_num_layers": 1, "perceptual_weight": 0.0}
    params = {
        "embed_dim": 2,
        "ddconfig": {**size, "double_z": True, "attn_resolutions": [], "dropout": 0.0, "num_groups": 4},
        "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss},
    }
    model = {"base_learning_rate": 0.01, "target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    items = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 16, "image_size": 32, "seed": 1}}
    data = {**spread.CONFIG["data"], "params": {"batch_size": 2, "num_workers": 0, "train": items}}
    config.write_text(yaml.safe_dump({**spread.CONFIG, "model": model, "data": data}))
    state = last(together("ddp", steps(3)))
    assert state["generator_steps"] == 3 and state["optimizer_states"][1]["state"][0]["step"] == 2


def test_unused_parameters_by_config() -> None:
    turns, whole = SimpleNamespace(automatic_optimization=False), SimpleNamespace(automatic_optimization=True)
    for model, strategy, devices, section, expected in (
        (turns, "ddp", 2, {}, "ddp_find_unused_parameters_true"),
        (turns, "auto", 2, {}, "ddp_find_unused_parameters_true"),
        (turns, "auto", 1, {}, "auto"),
        (whole, "ddp", 2, {}, "ddp"),
        (whole, "ddp", 2, {"find_unused_parameters": True}, "ddp_find_unused_parameters_true"),
    ):
        arguments = {"strategy": strategy, "devices": devices}
        use_strategy(arguments, section, model)
        assert arguments["strategy"] == expected


def test_a_resume_of_two_processes_is_exact(together: Callable, config: Path) -> None:
    """To the bit, with noise and dropout of each process's own."""
    config.write_text(yaml.safe_dump(conftest.CONFIG))
    whole, parts = together("ddp", steps(6), name="whole"), together("ddp", steps(3), name="parts")
    together("ddp", steps(6), resume=parts)
    conftest.assert_same_weights(whole, parts)
    states = last(whole)["rng_state"]
    assert len(states) == 2 and not torch.equal(states[0]["torch"], states[1]["torch"])


def test_sharded_checkpoints_are_those_of_one_process(together: Callable, alone: Callable[..., Path], train: Callable[..., Path]) -> None:
    """What fsdp leaves loads in one process, and a training goes on from it, and back, under either."""
    whole = alone(steps(6), name="whole")
    parts = together("fsdp", SMALL, steps(2), name="parts")
    model = instantiate_from_config(spread.CONFIG["model"])
    load_weights(model, parts / "checkpoints" / "last.ckpt", ema="raw")
    assert torch.equal(model.net.enter.weight, last(parts)["state_dict"]["net.enter.weight"])
    together("fsdp", SMALL, steps(3), resume=parts)
    train("data.params.batch_size=8", "lightning.fsdp=null", steps(5), resume=parts)
    together("fsdp", SMALL, "data.params.batch_size=4", steps(6), resume=parts)
    assert_close(whole, parts)
    assert len(last(parts)["rng_state"]) == 2


def test_pictures_and_validation_of_a_sharded_model(together: Callable, alone: Callable[..., Path]) -> None:
    """Both processes draw, the first one writes, and the weights are as if nothing had been drawn."""
    validation = ["data.params.validation.target=tests.training.spread.Items", "lightning.trainer.val_check_interval=2"]
    pictures = "lightning.callbacks.image_logger.params.batch_frequency=2"
    folder = together("fsdp", SMALL, *validation, pictures)
    assert len(list((folder / "images" / "train").glob("samples_gs-000002*.png"))) == 1
    assert_close(alone(name="one"), folder)


def test_nan_is_skipped_by_all(together: Callable, alone: Callable[..., Path]) -> None:
    """An item with infinite numbers reaches one process only; both leave that update out."""
    bad = "data.params.train.params.bad=[17]"
    one = alone(bad, name="one")
    two = together("fsdp", SMALL, bad)
    states = [next(state for name, state in last(run)["callbacks"].items() if "SkipNonFinite" in name) for run in (one, two)]
    assert states[0] == states[1] == {"skipped": 1}
    assert_close(one, two)


UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 4,
        "in_channels": 3,
        "out_channels": 3,
        "model_channels": 32,
        "attention_resolutions": [2],
        "num_res_blocks": 1,
        "channel_mult": [1, 2],
        "num_heads": 2,
        "use_checkpoint": True,
    },
}
DIFFUSION = {
    "base_learning_rate": 0.001,
    "target": "ldm.models.diffusion.ddpm.DDPM",
    "params": {"unet_config": UNET, "image_size": 4, "channels": 3, "timesteps": 20, "learn_logvar": True, "log_every_t": 10},
}


def test_a_diffusion_model_sharded(tmp_path: Path, config: Path, together: Callable) -> None:
    """The real network with activation checkpointing, EMA and learnt variance: fsdp gives what ddp gives, with the same noise."""
    data = {"batch_size": 2, "num_workers": 0, "train": {"target": "tests.training.toy.NoisyData"}}
    small = {**spread.CONFIG, "model": DIFFUSION, "data": {"target": "main.DataModuleFromConfig", "params": data}}
    config.write_text(yaml.safe_dump(small))
    pictures = "lightning.callbacks.image_logger.params={batch_frequency: 2, log_images_kwargs: {N: 2}}"
    words = [steps(3), "lightning.trainer.gradient_clip_val=0.1"]
    sharded = [*words, "lightning.fsdp.min_size=5000", pictures]
    runs = [together("ddp", *words, name="ddp"), together("fsdp", *sharded, name="fsdp")]
    validation = [
        "data.params.validation={target: tests.training.toy.NoisyData, params: {size: 4}}",
        "lightning.trainer.val_check_interval=1",
    ]
    whole = together("fsdp", *sharded, *validation, "lightning.fsdp.reshard_after_forward=false", name="whole")
    assert_close(runs[1], whole, moved=False)
    assert_close(*runs, moved=False, atol=2e-5)  # three steps of 1e-3; where gradients begin as nothing, AdamW makes much of rounding
    prune(runs[1] / "checkpoints" / "last.ckpt", tmp_path / "pruned.safetensors", dtype="float32")
    shipped, averaged = read_state_dict(tmp_path / "pruned.safetensors"), last(runs[1])["state_dict"]
    assert torch.equal(shipped["model.diffusion_model.out.2.weight"], averaged["model_ema.diffusion_modelout2weight"])
    assert list((runs[1] / "images" / "train").glob("samples_*.png"))


# ---------------------------------------------------------------------- ends
def test_one_crash_ends_all(together: Callable, tmp_path: Path) -> None:
    codes, said = together("ddp", "model.params.fails={rank: 1, step: 2}", codes=True)
    assert 0 not in codes
    assert "this process cannot count" in said[1]
    assert "error: another process of this training has ended" in said[0]
    assert "Traceback" not in said[0]


def test_stop_of_one_stops_all_and_keeps_everything(together: Callable, alone: Callable[..., Path], config: Path) -> None:
    """SIGTERM to one process: both finish the step, the checkpoint is written, both go."""
    import signal

    codes, _ = together("fsdp", SMALL, "model.params.stops={rank: 1, step: 1}", name="stopped", codes=True)
    assert codes == [128 + signal.SIGTERM] * 2
    folder = max((config.parent / "logs").glob("*_stopped"))
    assert last(folder)["global_step"] == 2
    together("fsdp", SMALL, "model.params.stops=null", resume=folder)
    assert_close(alone(name="one"), folder)


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    "words, message",
    [
        (["--strategy", "deepspeed_stage_2"], r'needs the package deepspeed.*pip install -e "\.\[deepspeed\]"'),
        (["--strategy", "fsdp_cpu_offload"], "use --strategy fsdp"),
        (["--strategy", "fsdp", "model.params.manual=true"], "steps its optimizers itself"),
        (["--strategy", "fsdp", "lightning.trainer.precision=16-mixed"], "32-true or bf16-mixed"),
        (["--strategy", "fsdp", "lightning.fsdp.size=3"], "does not know size; it takes parts, min_size"),
        (["--strategy", "ddp", "lightning.fsdp.min_size=3"], "the strategy is ddp"),
    ],
)
def test_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], message: str
) -> None:
    import re

    from ldm.training import distributed
    from ldm.training.cli import main

    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    assert main(["--base", str(config), "--train", "--trust", "tests", "--logdir", str(tmp_path / "logs"), *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "logs").exists()


def test_parts_are_found_and_told() -> None:
    model = instantiate_from_config(spread.CONFIG["model"])
    assert list(find_networks(model)) == ["net"]
    assert list(find_networks(model, ["net.enter"])) == ["net.enter"]
    with pytest.raises(ConfigError, match=r"no part nett; at its top are net, frozen, model_ema"):
        find_networks(model, ["nett"])
    with pytest.raises(ConfigError, match="nothing can be sharded"):
        find_networks(torch.nn.Module())


def test_blocks_of_stable_diffusion() -> None:
    """No process ever has more than a ninth of the network whole beside its own share."""
    config = yaml.safe_load((ROOT / "configs/stable-diffusion/v1-inference.yaml").read_text())["model"]["params"]["unet_config"]
    with torch.device("meta"):
        unet = instantiate_from_config(config)
    blocks = find_blocks(unet, 1_000_000)
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
    assert len(blocks) == 24
    assert sum(sizes) > 0.99 * 859_520_964 and max(sizes) < 859_520_964 / 8.5


# ---------------------------------------------------------------------- who is who
@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, (0, 1)),
        (spread.torchrun_variables(1, 4, 1), (1, 4)),
        (spread.slurm_variables(3, 4, 1), (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # the script of a job: not one of eight
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "0"}, (0, 1)),  # Lightning's own: no place of its own is told
    ],
)
def test_rank_and_world(environment: dict[str, str], place: tuple[int, int]) -> None:
    assert rank_and_world(environment) == place


def test_first_and_others() -> None:
    child = {"LOCAL_RANK": "1", "NODE_RANK": "2"}
    assert is_first({}) and not is_first(child) and not is_first({"NODE_RANK": "1"})
    assert started_by_another(child) and not started_by_another(spread.torchrun_variables(1, 2, 1))
    assert stands_alone({}) and not stands_alone(child) and not stands_alone(spread.torchrun_variables(0, 2, 1))
    assert label({}) == "" and label(child) == " (node 2, process 1)" and label(spread.slurm_variables(3, 4, 1)) == " (process 3)"
    with pytest.raises(UserError, match="RANK=4 and WORLD_SIZE=4 are no process"):
        rank_and_world({"RANK": "4", "WORLD_SIZE": "4"})
