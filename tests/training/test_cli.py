"""Flags, merging, and errors in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from ldm.training.cli import main, merge_configs, parse_args
from ldm.training.run import RunFolder, claim, learning_rate, locate
from ldm.training.trainer_args import trainer_arguments
from ldm.util import ConfigError
from tests.training.conftest import CONFIG, last

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "argv",
    [
        ["--base", "a.yaml", "b.yaml", "x.y=1", "-t", "-n", "name"],
        ["-t", "-b", "a.yaml", "-b", "b.yaml", "-n", "name", "x.y=1"],
        ["x.y=1", "-t", "True", "--base", "a.yaml", "b.yaml", "--name", "name"],
        ["--train", "x.y=1", "--base", "a.yaml", "b.yaml", "--name=name"],
    ],
)
def test_any_order(argv: list[str]) -> None:
    options = parse_args(argv)
    assert (options.base, options.overrides, options.train, options.name) == (["a.yaml", "b.yaml"], ["x.y=1"], True, "name")


def test_defaults() -> None:
    options = parse_args(["-b", "a.yaml"])
    assert (options.train, options.scale_lr, options.logdir, options.seed, options.no_test) == (False, False, "logs", None, False)
    assert parse_args(["-t", "false"]).train is False
    assert parse_args(["--scale_lr", "--no-test"]).scale_lr is True


def test_help_needs_no_torch() -> None:
    code = "import sys, main; from ldm.training.cli import build_parser; build_parser().format_help(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_addresses() -> None:
    import main as module
    from ldm.util import get_obj_from_str

    for name in ("DataModuleFromConfig", "WrappedDataset", "ImageLogger", "SetupCallback", "CUDACallback"):
        assert get_obj_from_str(f"main.{name}") is getattr(module, name)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--bse", "a.yaml"], "unknown flag --bse (did you mean --base"),
        (["--base", "no.yaml", "-t"], "config 'no.yaml' does not exist"),
        (["-t"], "no config"),
        (["--seed", "x"], "invalid int value"),
        (["--resume", "nowhere", "-t"], "no such folder or file"),
        (["--base", "CONFIG", "-t", "--init_ema", "raw"], "--init_ema raw chooses among the weights of --init_from"),
        (["--base", "CONFIG", "-t", "notapair"], "'notapair' is neither a flag nor a key=value pair"),
        (["--base", "CONFIG", "=3", "-t"], "'=3' is neither a flag nor a key=value pair"),
        (["--base", "CONFIG", "a=[1", "-t"], "cannot read 'a=[1'"),
        (["--base", "CONFIG", "lightning.trainer.max_step=3", "-t"], "max_step (did you mean max_step"),
        (["--base", "CONFIG", "lightning.trainr.x=3", "-t"], "lightning.trainr is unknown"),
        (["--base", "CONFIG", "model.target=tests.training.toy.NoModel", "-t"], "has no 'NoModel'"),
        (["--base", "CONFIG", "model.params.widht=3", "-t"], "widht"),
        (["--base", "CONFIG", "model.base_learning_rate=fast", "-t"], "'fast' is not a number"),
        (["--base", "CONFIG", "data.params.batch_size=0", "-t"], "batch_size is 0"),
        (["--base", "CONFIG", "--gpus", "0", "-t"], "gpus 0 is ambiguous"),
        (["--base", "CONFIG", "--gpus", "0,1", "--devices", "1", "-t"], "leave out --gpus, or --accelerator and --devices"),
        (["--base", "CONFIG", "--devices", "two", "-t"], "devices 'two' is not understood"),
        (["--base", "CONFIG", "--accelerator", "abacus", "-t"], "abacus"),
        (
            ["--base", "CONFIG", "model.params.manual=true", "lightning.trainer.gradient_clip_val=1", "-t"],
            "steps its optimizers itself, and has no setting",
        ),
        (["--base", "CONFIG", "lightning.modelcheckpoint.params.evry=1", "model.params.monitor=train/loss", "-t"], "evry"),
    ],
)
def test_error_lines(argv: list[str], message: str, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    argv = [str(config) if word == "CONFIG" else word for word in argv]
    try:
        code = main([*argv, "--trust", "tests", "--logdir", str(tmp_path / "logs")])
    except SystemExit as exit_:
        code = exit_.code
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "logs").exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"no checkpoint", "cannot be read"),
        (b"", "cannot be read"),
        ({"state_dict": {"w": torch.zeros(2)}}, "weights but no training state"),
        ({"state_dict": Path("x")}, "more than tensors and plain values"),
    ],
)
def test_refused_checkpoints(content: object, message: str, tmp_path: Path, config: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "some.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert main(["--base", str(config), "-r", str(path), "-t", "--trust", "tests", "--logdir", str(tmp_path / "logs")]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("error: ") == 1


def test_merge(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {target: x.Y, params: {width: 1, sizes: [1, 2], copy: '${model.params.width}'}}\n")
    (tmp_path / "b.yaml").write_text("model: {params: {width: 2}}\n")
    merged = merge_configs([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["model.params.sizes=[3]", "data.params.batch_size=8", "a.b=null"])
    assert merged["model"]["params"] == {"width": 2, "sizes": [3], "copy": 2}
    assert merged["data"]["params"]["batch_size"] == 8
    assert merged["a"] == {"b": None}
    assert type(merged["model"]["params"]) is dict


def test_trainer_arguments() -> None:
    def arguments(section: dict, *flags: str) -> dict:
        return trainer_arguments({"trainer": section}, parse_args(list(flags)))

    assert arguments({})["devices"] == 1
    assert arguments({"gpus": "0,"})["devices"] == [0]
    assert arguments({}, "--gpus", "0,1") | {"accelerator": "gpu", "devices": [0, 1]} == arguments({}, "--gpus", "0,1")
    assert arguments({"gpus": 2}, "--accelerator", "cpu", "--devices", "1")["accelerator"] == "cpu"
    old = {"accelerator": "ddp", "weights_summary": "top", "replace_sampler_ddp": False, "benchmark": True}
    assert arguments(old)["strategy"] == "ddp"
    assert arguments(old)["accelerator"] == "auto"
    with pytest.raises(ConfigError, match="--resume RUN"):
        arguments({"resume_from_checkpoint": "x"})


def test_learning_rate(caplog: pytest.LogCaptureFixture) -> None:
    config = {"model": {"base_learning_rate": "1e-4"}}
    with caplog.at_level("INFO"):
        assert learning_rate(config, False, 2, 8, 4) == 1e-4
        assert learning_rate(config, True, 2, 8, 4) == pytest.approx(64e-4)
    assert "effective batch 64 = 2 devices x 8 items x 4 accumulated" in caplog.text
    assert learning_rate({"model": {}}, False, 1, 1, 1) is None


def test_folders(tmp_path: Path) -> None:
    def place(*argv: str) -> RunFolder:
        return locate(parse_args([*argv, "--logdir", str(tmp_path)]), "NOW")

    assert place("-b", "configs/x.yaml").path == tmp_path / "NOW_x"
    assert place("-b", "x.yaml", "-n", "a b/c", "-p", "project", "--postfix=-v2").path == tmp_path / "project" / "NOW_a-b-c-v2"


def test_two_runs_of_one_second(tmp_path: Path) -> None:
    for name in ("NOW_a", "NOW_a-2", "NOW_a-3"):
        folder = locate(parse_args(["-b", "a.yaml", "--logdir", str(tmp_path)]), "NOW")
        assert claim(folder).path == tmp_path / name
        assert (tmp_path / name).is_dir(), "made at once: another start of this second must find it"


def test_record_beside_the_run(train: Callable[..., Path]) -> None:
    folder = train("model.params.width=5", "--seed", "4")
    (project,) = (folder / "configs").glob("*-project.yaml")
    (record,) = (folder / "configs").glob("*-run.yaml")
    (lightning,) = (folder / "configs").glob("*-lightning.yaml")
    assert yaml.safe_load(project.read_text())["model"]["params"] == {"width": 5}
    assert yaml.safe_load(lightning.read_text())["lightning"]["trainer"] == CONFIG["lightning"]["trainer"]
    content = yaml.safe_load(record.read_text())
    assert content["seed"] == 4
    assert content["overrides"] == ["model.params.width=5"]
    assert content["versions"]["torch"] == torch.__version__.split("+")[0] or content["versions"]["torch"]
    assert {"command", "git", "platform"} <= set(content)


def test_without_train_only_checks(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["--base", str(config), "--trust", "tests", "--logdir", str(tmp_path / "logs")]) == 0
    assert "the config is fine" in caplog.text
    assert not (tmp_path / "logs").exists()


def test_resume_from_a_file_and_with_another_config(train: Callable[..., Path], config: Path, tmp_path: Path) -> None:
    folder = train("lightning.trainer.max_steps=3")
    path = folder / "checkpoints" / "last.ckpt"
    assert main(["-r", str(path), "-t", "--trust", "tests", "lightning.trainer.max_steps=5"]) == 0
    assert last(folder)["global_step"] == 5


def test_variables_of_a_config_stay_variables(train: Callable[..., Path], config: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Data that has moved is named once when a run is resumed, as it was when it began."""
    content = {**CONFIG, "items": 30}
    content["data"] = {**CONFIG["data"], "params": {**CONFIG["data"]["params"]}}
    content["data"]["params"]["train"] = {"target": "tests.training.toy.NoisyData", "params": {"size": "${items}"}}
    config.write_text(yaml.safe_dump(content))
    folder = train("lightning.trainer.max_steps=2")
    train("items=10", "lightning.trainer.max_steps=3", resume=folder)
    assert "NoisyData, 10 items an epoch" in caplog.text


def test_flags_that_a_resume_would_ignore(train: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = train("lightning.trainer.max_steps=2")
    assert main(["-r", str(folder), "-t", "-n", "other", "--init_from", "w.ckpt", "--trust", "tests"]) == 2
    assert "leave out --init_from, --name" in capsys.readouterr().err


def test_what_a_config_leaves_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`???` in a YAML: all such keys are told at once; given as pairs they are filled in wherever they are used."""
    path = tmp_path / "a.yaml"
    path.write_text("data_root: ???\nmodel:\n  target: m\n  params:\n    ckpt_path: ???\n    x: ${data_root}/x\n")
    assert main(["--base", str(path), "-t"]) == 2
    error = capsys.readouterr().err
    assert "data_root=VALUE" in error and "model.params.ckpt_path=VALUE" in error
    config = merge_configs([path], ["data_root=/d", "model.params.ckpt_path=w.ckpt"])
    assert config["model"]["params"] == {"ckpt_path": "w.ckpt", "x": "/d/x"}
