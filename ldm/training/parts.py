"""The parts of a run that a config's `lightning` section describes: loggers, callbacks, checkpoints, and the Trainer with them.

Names that a config may use to change or remove a default callback: setup_callback, image_logger, learning_rate_logger, training_plot,
skip_non_finite.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from ldm.training.callbacks import ProgressBar, ProgressLog
from ldm.training.counting import EpochPlace, UpdateCounter
from ldm.training.distributed import use_strategy
from ldm.training.record import RunFolder, describe_run
from ldm.training.state import AtomicCheckpointIO, LastCheckpoint, RateCallback, RngStateCallback, StepCheckpoint
from ldm.util import ConfigError, instantiate_from_config

log = logging.getLogger(__name__)

_ABSENT = object()
_MODEL_CHECKPOINTS = (
    "pytorch_lightning.callbacks.ModelCheckpoint",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.ModelCheckpoint",
)


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


def build_trainer(
    model: Any,
    data: Any,
    config: dict[str, Any],  # to be written beside the run
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
        "config": {key: value for key, value in config.items() if key != "lightning"},
        "lightning_config": config.get("lightning") or {},
        "record": describe_run(options, seed),
    }
    defaults = {
        "setup_callback": {"target": "main.SetupCallback", "params": setup_params},
        "image_logger": {"target": "main.ImageLogger", "params": {"seed": seed}},
        "learning_rate_logger": {"target": "pytorch_lightning.callbacks.LearningRateMonitor", "params": {"logging_interval": "step"}},
        "training_plot": {"target": "ldm.training.callbacks.TrainingPlot"},
        "skip_non_finite": {"target": "ldm.training.guards.SkipNonFinite"},
    }
    counter = UpdateCounter()
    if not model.automatic_optimization:
        counter = UpdateCounter(arguments.pop("max_steps", -1) or -1)
        arguments.setdefault("max_epochs", -1)
        hand_over(arguments, model)
    callbacks = [counter, EpochPlace(), RngStateCallback(seed), RateCallback(), *build_callbacks(lightning, defaults, folder.checkpoints)]
    callbacks += build_checkpointing(lightning.get("modelcheckpoint") or {}, model, data, folder.checkpoints)
    if arguments.get("enable_progress_bar", True) and sys.stderr.isatty():
        callbacks.append(ProgressBar())
    else:
        arguments["enable_progress_bar"] = False
        callbacks.append(ProgressLog())
    arguments.setdefault("enable_model_summary", False)
    if not any(isinstance(callback, Checkpoint) for callback in callbacks):
        arguments["enable_checkpointing"] = False  # or Lightning adds one of its own
    loggers = build_loggers(lightning.get("logger"), folder.path)
    use_strategy(arguments, lightning, model)
    plugins = [AtomicCheckpointIO(), *(arguments.pop("plugins", None) or [])]
    try:
        return pl.Trainer(default_root_dir=str(folder.path), logger=loggers, callbacks=callbacks, plugins=plugins, **arguments)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise ConfigError(f"the Trainer refuses lightning.trainer: {error}") from error


def hand_over(arguments: dict[str, Any], model: Any) -> None:
    """What the Trainer cannot do for a model that steps its optimizers itself becomes the model's own setting of the same name."""
    for name, neutral in (("gradient_clip_val", None), ("accumulate_grad_batches", 1)):
        value = arguments.pop(name, None)
        if value in (None, neutral, 0):
            continue
        own = getattr(model, name, _ABSENT)
        if own not in (None, neutral, value):
            reason = "has no setting of that name" if own is _ABSENT else f"has {name}={own} of its own"
            raise ConfigError(f"lightning.trainer.{name}={value} cannot be used: this model steps its optimizers itself, and {reason}")
        setattr(model, name, value)
