"""One training from its merged config: folders, model, data, loggers, callbacks, trainer, learning rate, resume.

Knows no particular model: anything that `instantiate_from_config` builds into a LightningModule will do.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import inspect
import logging
import os
import pickle
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.training.callbacks import ProgressBar, ProgressLog
from ldm.training.cli import load_yaml, merge_configs
from ldm.training.state import AtomicCheckpointIO, LastCheckpoint, RngStateCallback, StepCheckpoint, Stopped, UpdateCounter
from ldm.training.trainer_args import trainer_arguments
from ldm.util import CheckpointError, ConfigError, get_obj_from_str, instantiate_from_config, plain, trust

log = logging.getLogger(__name__)

DEFAULT_SEED = 23
_SECTIONS = ("trainer", "callbacks", "modelcheckpoint", "logger", "strategy", "find_unused_parameters", "channels_last")
_MODEL_CHECKPOINTS = (
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.ModelCheckpoint",
)
_QUIET = (
    ".*pre-optimization state.*",  # manual optimisation: our checkpoints are taken after the step, on purpose
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*in eval mode at the start of training.*",  # frozen first stages
    ".*smaller than the logging interval.*",
    ".*available but not used.*",
    ".*have no `val_dataloader`.*",
    ".*could not find the monitored key.*",  # a run that ends before its first validation
    ".*treespec, LeafSpec.*",
)


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives, and what it goes on from."""

    path: Path
    checkpoint: Path | None  # of --resume
    configs: tuple[Path, ...]  # the resumed run's

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"


# ---------------------------------------------------------------------- folders
def locate(options: argparse.Namespace, now: str) -> RunFolder:
    """The folder of a new run, or that of the run to resume with its checkpoint and configs."""
    if not options.resume:
        stem = options.name or (Path(options.base[0]).stem if options.base else "run")
        name = f"{now}_{re.sub(r'[^A-Za-z0-9._=+-]+', '-', stem)}{options.postfix}"
        return RunFolder(Path(options.logdir) / options.project / name, None, ())
    path = Path(options.resume)
    if not path.exists():
        raise CheckpointError(f"--resume {options.resume}: there is no such folder or file")
    if path.is_dir():
        checkpoint = path / "checkpoints" / "last.ckpt"
        if not checkpoint.exists():
            raise CheckpointError(f"--resume {options.resume}: there is no {checkpoint}; give the .ckpt file to go on from")
        return RunFolder(path, checkpoint, _saved_configs(path))
    for folder in path.resolve().parents:
        if configs := _saved_configs(folder):
            return RunFolder(folder, path, configs)
    if not options.base:
        raise CheckpointError(f"--resume {options.resume}: no configs folder was found above this file; add --base CONFIG.yaml")
    return RunFolder(Path(options.logdir) / options.project / f"{now}_{options.name or path.stem}{options.postfix}", path, ())


def _saved_configs(folder: Path) -> tuple[Path, ...]:
    configs = folder / "configs"
    return tuple(sorted([*configs.glob("*-project.yaml"), *configs.glob("*-lightning.yaml")]))


def choose_seed(options: argparse.Namespace, folder: RunFolder) -> int:
    """--seed, else the resumed run's, else 23."""
    if options.seed is not None:
        return options.seed
    for path in sorted((folder.path / "configs").glob("*-run.yaml"), reverse=True):
        return int(load_yaml(path).get("seed", DEFAULT_SEED))
    return DEFAULT_SEED


def describe_run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What to write beside the run: command line, seed, git hash, versions, platform."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "pytorch-lightning", "numpy", "omegaconf", "transformers", "open_clip_torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "overrides": list(options.overrides),
        "seed": seed,
        "git": _git_state(),
        "versions": versions,
        "platform": platform.platform(),
    }


def _git_state() -> str:
    """Commit of this source tree, with `+changes` when files differ from it; `unknown` outside a repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        output = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return output[0] + ("+changes" if output[1] else "")


# ---------------------------------------------------------------------- parts
def check_config(config: Mapping[str, Any]) -> None:
    """Tell everything that is missing or unknown at the top of a config, at once."""
    wrong = [f"{part}.target is missing" for part in ("model", "data") if not (config.get(part) or {}).get("target")]
    wrong += [f"lightning.{key} is unknown (allowed: {', '.join(_SECTIONS)})" for key in config.get("lightning") or {} if key not in _SECTIONS]
    if wrong:
        raise ConfigError("the config cannot be used: " + "; ".join(wrong))


def learning_rate(config: Mapping[str, Any], scale: bool, devices: int, batch_size: int, accumulate: int) -> float | None:
    """base_learning_rate, times all items of one update when `scale`; None when the config has none."""
    base = config["model"].get("base_learning_rate")
    effective = devices * batch_size * accumulate
    if base is None:
        log.info("learning rate: the model's own (no model.base_learning_rate); effective batch %d", effective)
        return None
    try:
        rate = float(base) * (effective if scale else 1)
    except (TypeError, ValueError):
        raise ConfigError(f"model.base_learning_rate {base!r} is not a number") from None
    how = f"{float(base):.2e} x {effective} (--scale_lr)" if scale else "base_learning_rate, not scaled"
    log.info(
        "learning rate %.3e (%s); effective batch %d = %d devices x %d items x %d accumulated",
        *(rate, how, effective, devices, batch_size, accumulate),
    )
    return rate


def build_loggers(section: Any, logdir: Path) -> list[Any]:
    """CSV always; TensorBoard when it is installed, unless the config names other loggers (`{target, params}`, or several by name)."""
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    loggers: list[Any] = [CSVLogger(str(logdir), name="csv", flush_logs_every_n_steps=20)]
    if section is False:
        return loggers
    entries = [section] if isinstance(section, Mapping) and "target" in section else list((section or {}).values())
    for entry in entries:
        params = {"save_dir": str(logdir), **(entry.get("params") or {})}
        if entry.get("target", "").endswith("TestTubeLogger"):
            log.info("TestTubeLogger no longer exists: TensorBoard is used")
        else:
            loggers.append(instantiate_from_config({"target": entry.get("target"), "params": params}))
    if len(loggers) == 1 and any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        loggers.append(TensorBoardLogger(str(logdir), name="tensorboard", version=""))
    return loggers


def build_callbacks(lightning: Mapping[str, Any], defaults: Mapping[str, Any], checkpoints: Path) -> list[Any]:
    """Default callbacks merged, by name, with those of the config; a name set to null leaves that one out."""
    entries = {name: dict(entry) for name, entry in defaults.items()}
    for name, entry in (lightning.get("callbacks") or {}).items():
        if entry is None:
            entries.pop(name, None)
            continue
        old = entries.get(name, {})
        entries[name] = {"target": entry.get("target", old.get("target"))}
        same = str(entries[name]["target"]).rpartition(".")[2] == str(old.get("target")).rpartition(".")[2]
        entries[name]["params"] = {**((old.get("params") or {}) if same else {}), **(entry.get("params") or {})}
    built = []
    for name, entry in entries.items():
        if entry["target"] in _MODEL_CHECKPOINTS:
            params = {"dirpath": str(checkpoints / name), **(entry.get("params") or {})}
            built.append(_model_checkpoint(entry["target"], params))
        else:
            built.append(instantiate_from_config(entry))
    return built


def build_checkpointing(section: Mapping[str, Any], model: Any, data: Any, folder: Path) -> list[Any]:
    """`last.ckpt`, and the best checkpoints by `model.monitor` or all that `lightning.modelcheckpoint.params` asks for."""
    params = {"filename": "{epoch:06}-{step:09}", "auto_insert_metric_name": True, **(section.get("params") or {})}
    params.setdefault("monitor", getattr(model, "monitor", None))
    if params["monitor"] and params["monitor"].startswith("val") and not has_validation(data):
        log.info("the best checkpoint cannot be told without validation data (monitor %s): only the last is kept", params["monitor"])
        params["monitor"] = None
    every = params.get("every_n_train_steps")
    callbacks: list[Any] = []
    if params.pop("save_last", True):
        callbacks.append(LastCheckpoint(folder, 1000 if every is None else every, params.pop("every_minutes", None)))
    params.setdefault("save_top_k", 1 if params["monitor"] else 0)
    if params["monitor"] and params["save_top_k"] != -1:
        params.pop("every_n_train_steps", None)  # the best are told after each validation
    if params["save_top_k"] != 0:
        params = {"dirpath": str(folder), "save_last": False, "enable_version_counter": False, **params}
        callbacks.insert(0, _model_checkpoint(section.get("target"), params))
    return callbacks


def _model_checkpoint(target: str | None, params: dict[str, Any]) -> Any:
    """A checkpoint callback; Lightning's own becomes ours, whose files hold the whole step."""
    try:
        if target not in (None, *_MODEL_CHECKPOINTS):
            return instantiate_from_config({"target": target, "params": params})
        inspect.signature(StepCheckpoint).bind(**params)
        return StepCheckpoint(**params)
    except (TypeError, MisconfigurationException) as error:
        raise ConfigError(f"ModelCheckpoint: {error}") from None


def has_validation(data: Any) -> bool:
    """Whether this data module has validation data."""
    configs = getattr(data, "dataset_configs", None)
    return True if configs is None else "validation" in configs


def load_start_weights(model: Any, options: argparse.Namespace) -> None:
    """--init_from: weights only."""
    load_weights = get_obj_from_str("ldm.inference.checkpoint.load_weights")
    report = load_weights(model, options.init_from, ema=options.init_ema)
    log.info("weights from %s: %s", options.init_from, report)


# ---------------------------------------------------------------------- the run
def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    trust(*options.trust)
    _quieten(options.debug)
    now = os.environ.setdefault("LDM_RUN_STARTED", datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S"))  # shared with other processes
    folder = locate(options, now)
    if not options.base and not folder.configs:
        raise ConfigError("no config: name one with --base CONFIG.yaml, or a run with --resume")
    config = merge_configs([*folder.configs, *options.base], options.overrides)
    check_config(config)
    state = read_resumed(folder.checkpoint) if folder.checkpoint else {}
    seed = choose_seed(options, folder)
    pl.seed_everything(seed, verbose=False)
    lightning = config.pop("lightning", None) or {}
    trainer_section = {**(lightning.get("trainer") or {})}
    if lightning.get("strategy") is not None:
        trainer_section.setdefault("strategy", lightning["strategy"])
    arguments = trainer_arguments(trainer_section, options, bool(lightning.get("find_unused_parameters")))

    model = instantiate_from_config({key: config["model"].get(key) for key in ("target", "params")})
    if lightning.get("channels_last"):  # convolutions on the CPU and on tensor cores like the channels innermost
        model = model.to(memory_format=torch.channels_last)
    if not isinstance(model, pl.LightningModule):
        raise ConfigError(f"model.target {config['model']['target']} is a {type(model).__name__}, not a LightningModule")
    if options.init_from:
        load_start_weights(model, options)
    data = instantiate_from_config(config["data"])
    if not options.train:
        log.info("the config is fine: model %s, data %s; add --train to train", type(model).__name__, type(data).__name__)
        return 0
    trainer = build_trainer(model, data, config, lightning, arguments, folder, options, seed, now)
    batch_size = getattr(data, "batch_size", None) or 1
    accumulate = arguments.get("accumulate_grad_batches") or getattr(model, "accumulate_grad_batches", None) or 1
    rate = learning_rate(config, options.scale_lr, trainer.world_size, batch_size, accumulate)
    if rate is not None:
        model.learning_rate = rate
    log.info("run folder %s; seed %d; %s x %d", folder.path, seed, trainer.strategy.root_device.type, trainer.world_size)
    if state:
        log.info("going on from %s: step %s, epoch %s", folder.checkpoint, state["global_step"], state["epoch"])
    code = fit(trainer, model, data, folder)
    if code == 0 and not options.no_test and "test" in getattr(data, "dataset_configs", {}):
        trainer.test(model, datamodule=data, verbose=True)
    return code


def build_trainer(
    model: Any,
    data: Any,
    config: dict[str, Any],
    lightning: dict[str, Any],
    arguments: dict[str, Any],
    folder: RunFolder,
    options: argparse.Namespace,
    seed: int,
    now: str,
) -> pl.Trainer:
    """The Trainer with all its callbacks and loggers."""
    arguments = dict(arguments)
    setup_params = {
        "resume": options.resume,
        "now": now,
        "logdir": str(folder.path),
        "ckptdir": str(folder.checkpoints),
        "cfgdir": str(folder.path / "configs"),
        "config": plain(config),
        "lightning_config": plain(lightning),
        "record": describe_run(options, seed),
    }
    defaults = {
        "setup_callback": {"target": "main.SetupCallback", "params": setup_params},
        "image_logger": {"target": "main.ImageLogger", "params": {"seed": seed}},
        "learning_rate_logger": {"target": "pytorch_lightning.callbacks.LearningRateMonitor", "params": {"logging_interval": "step"}},
        "training_plot": {"target": "ldm.training.callbacks.TrainingPlot"},
    }
    counter = UpdateCounter()
    if not model.automatic_optimization:
        counter = UpdateCounter(arguments.pop("max_steps", -1) or -1)
        arguments.setdefault("max_epochs", -1)
        _check_manual(arguments)
    callbacks = [counter, RngStateCallback(seed), *build_callbacks(lightning, defaults, folder.checkpoints)]
    callbacks += build_checkpointing(lightning.get("modelcheckpoint") or {}, model, data, folder.checkpoints)
    if arguments.get("enable_progress_bar", True) and sys.stderr.isatty():
        callbacks.append(ProgressBar())
    else:
        arguments["enable_progress_bar"] = False
        callbacks.append(ProgressLog())
    arguments.setdefault("enable_model_summary", False)
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        arguments["enable_checkpointing"] = False  # or Lightning adds one of its own
    plugins = [AtomicCheckpointIO(), *(arguments.pop("plugins", None) or [])]
    loggers = build_loggers(lightning.get("logger"), folder.path)
    try:
        return pl.Trainer(default_root_dir=str(folder.path), logger=loggers, callbacks=callbacks, plugins=plugins, **arguments)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"the Trainer refuses lightning.trainer: {error}") from error


def _check_manual(arguments: Mapping[str, Any]) -> None:
    wrong = [name for name in ("gradient_clip_val", "accumulate_grad_batches") if arguments.get(name) not in (None, 0, 0.0, 1)]
    if wrong:
        raise ConfigError(f"lightning.trainer.{wrong[0]} has no effect here, for this model steps its optimizers itself: set model.params.{wrong[0]}")


def fit(trainer: pl.Trainer, model: Any, data: Any, folder: RunFolder) -> int:
    """Train; a signal that asked for the end is exit code 128 + its number, after the checkpoint is written."""
    options: dict[str, Any] = {"datamodule": data}
    if folder.checkpoint:
        options["ckpt_path"] = str(folder.checkpoint)
        if "weights_only" in inspect.signature(trainer.fit).parameters:
            options["weights_only"] = True
    listeners = [callback for callback in trainer.callbacks if isinstance(callback, LastCheckpoint)]
    for listener in listeners:
        listener.listen()
    try:
        trainer.fit(model, **options)
    except Stopped as stop:
        log.info("%s; go on with: python main.py --resume %s --train", stop, shlex.quote(str(folder.path)))
        return 128 + stop.signum
    finally:
        for listener in listeners:
            listener.deafen()
    log.info("finished after %d updates: %s", trainer.global_step, folder.path)
    return 0


def read_resumed(path: Path) -> dict[str, Any]:
    """Look into a checkpoint before anything is built: it must be whole, safe, and hold a training rather than weights only."""
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise CheckpointError(f"checkpoint {path} holds more than tensors and plain values, and is not loaded: {what}") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read, it may be cut short: {str(error).splitlines()[0]}") from None
    missing = [key for key in ("loops", "optimizer_states", "state_dict", "global_step") if key not in checkpoint]
    if missing:
        raise CheckpointError(f"checkpoint {path} holds weights but no training state ({', '.join(missing)}): use --init_from {path}")
    return {"global_step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}


def _quieten(debug: bool) -> None:
    for message in _QUIET:
        warnings.filterwarnings("ignore", message)
    level = logging.INFO if debug else logging.WARNING
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(level)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        logging.getLogger("ldm").setLevel(logging.WARNING)
