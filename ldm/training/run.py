"""One training from its merged config: model, data, learning rate, trainer, resume.

Knows no particular model: anything that `instantiate_from_config` builds into a LightningModule will do.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import logging
import os
import shlex
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden

from ldm.processes import is_first, stands_alone, started_by_another
from ldm.training.cli import merge_configs
from ldm.training.counting import updates_done
from ldm.training.distributed import describe_processes, end_others
from ldm.training.guards import explain
from ldm.training.parts import build_trainer
from ldm.training.preflight import check_start_weights
from ldm.training.record import RunFolder, check_flags, choose_seed, claim, give_up, locate, read_resumed
from ldm.training.state import Stopped
from ldm.training.trainer_args import trainer_arguments
from ldm.util import ConfigError, get_obj_from_str, instantiate_from_config, trust

log = logging.getLogger(__name__)

_SECTIONS = ("trainer", "callbacks", "modelcheckpoint", "logger", "strategy", "fsdp", "find_unused_parameters", "channels_last", "compile")
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
    ".*`IterableDataset` has `__len__` defined.*",  # streams are cut into shares, so their length is right
)


def check_config(config: Mapping[str, Any]) -> None:
    """Tell everything that is missing or unknown at the top of a config, at once."""
    wrong = [f"{part}.target is missing" for part in ("model", "data") if not (config.get(part) or {}).get("target")]
    unknown = [key for key in config.get("lightning") or {} if key not in _SECTIONS]
    wrong += [f"lightning.{key} is unknown (allowed: {', '.join(_SECTIONS)})" for key in unknown]
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


def build_model(config: Mapping[str, Any], lightning: Mapping[str, Any], options: argparse.Namespace) -> pl.LightningModule:
    """The model of a config, with the weights of --init_from."""
    model = instantiate_from_config({key: config["model"].get(key) for key in ("target", "params")})
    if not isinstance(model, pl.LightningModule):
        raise ConfigError(f"model.target {config['model']['target']} is a {type(model).__name__}, not a LightningModule")
    if lightning.get("channels_last"):  # convolutions on the CPU and on tensor cores like the channels innermost
        model = model.to(memory_format=torch.channels_last)
    compile_parts(model, lightning.get("compile"))
    if options.init_from:
        load_weights = get_obj_from_str("ldm.inference.checkpoint.load_weights")
        load_weights(model, options.init_from, ema=options.init_ema)  # says what it did
    return model


def compile_parts(model: torch.nn.Module, section: Any) -> None:
    """torch.compile parts of the model in place, so that its keys stay: `lightning.compile: true`, or {parts: [names], mode: ..., ...}.

    Without `parts` it is the denoising network (`model.diffusion_model`) or, in an autoencoder, its `encoder` and `decoder`.
    """
    if not section:
        return
    options = {} if section is True else dict(section)
    names = options.pop("parts", None)
    allowed = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
    if unknown := sorted(set(options) - set(allowed)):
        raise ConfigError(f"lightning.compile does not know {', '.join(unknown)}; it takes parts, {', '.join(allowed)}")
    if names is None:
        known = dict(model.named_modules())
        names = [name for name in ("model.diffusion_model", "encoder", "decoder") if name in known]
        if not names:
            raise ConfigError("lightning.compile: this model has no known network: name what to compile, compile: {parts: [NAME]}")
    for name in [names] if isinstance(names, str) else names:
        try:
            part = model.get_submodule(name)
        except AttributeError:
            children = ", ".join(child for child, _ in model.named_children())
            raise ConfigError(f"lightning.compile: the model has no part {name!r}; at its top are {children}") from None
        part.compile(**options)
        log.info("torch.compile: %s (the first step takes long)", name)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    trust(*options.trust)
    _quieten(options.debug)
    now = _timestamp()
    folder = locate(options, now)
    check_flags(options, folder)
    if not options.base and not folder.configs:
        raise ConfigError("no config: name one with --base CONFIG.yaml, or a run with --resume")
    sources = [*folder.configs, *options.base]
    config = merge_configs(sources, options.overrides)
    check_config(config)
    check_start_weights(config)
    resumed = read_resumed(folder.checkpoint) if folder.checkpoint else None
    lightning = config.pop("lightning", None) or {}
    arguments = trainer_arguments(lightning, options)

    seed = choose_seed(options, folder)
    pl.seed_everything(seed, verbose=False)
    model = build_model(config, lightning, options)
    data = instantiate_from_config(config["data"])
    if not options.train:
        log.info("the config is fine: model %s, data %s; add --train to train", type(model).__name__, type(data).__name__)
        return 0
    folder = claim(folder)
    try:
        written = merge_configs(sources, options.overrides, resolve=False)  # so that a resume can give its variables other values
        trainer = build_trainer(model, data, written, lightning, arguments, folder, options, seed, now)
        batch_size = getattr(data, "batch_size", None) or 1
        accumulate = arguments.get("accumulate_grad_batches") or getattr(model, "accumulate_grad_batches", None) or 1
        rate = learning_rate(config, options.scale_lr, trainer.world_size, batch_size, accumulate)
    except Exception:
        give_up(folder, options.logdir)
        raise
    if rate is not None:
        model.learning_rate = rate
    log.info("run folder %s; seed %d; %s", folder.path, seed, describe_processes(trainer, arguments))
    if resumed is not None:
        _announce_resume(folder, resumed, arguments.get("max_steps"))
    code = fit(trainer, model, data, folder)
    if code == 0 and not options.no_test and "test" in getattr(data, "dataset_configs", {}):
        if is_overridden("test_step", model):
            trainer.test(model, datamodule=data, verbose=True)
        else:
            log.info("data.params.test is not used: %s has no test (test_step)", type(model).__name__)
    return code


def _timestamp() -> str:
    """Of this start; processes that it launches take over its own."""
    inherited = os.environ.get("LDM_RUN_STARTED") if started_by_another() else None
    now = inherited or datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    os.environ["LDM_RUN_STARTED"] = now
    return now


def _announce_resume(folder: RunFolder, resumed: Mapping[str, int], max_steps: int | None) -> None:
    log.info("going on from %s: after %d updates, epoch %d", folder.checkpoint, resumed["updates"], resumed["epoch"])
    if max_steps is not None and 0 <= max_steps <= resumed["updates"]:
        log.info("nothing is left to do: lightning.trainer.max_steps is %d; add a higher lightning.trainer.max_steps=N to go on", max_steps)


def fit(trainer: pl.Trainer, model: Any, data: Any, folder: RunFolder) -> int:
    """Train; a signal that asked for the end is exit code 128 + its number, after the checkpoint is written."""
    options: dict[str, Any] = {"datamodule": data}
    if folder.checkpoint:
        options["ckpt_path"] = str(folder.checkpoint)
        if "weights_only" in inspect.signature(trainer.fit).parameters:
            options["weights_only"] = True
    try:
        if trainer.world_size > 1 and stands_alone() and hasattr(data, "prepare_data"):
            data.prepare_data()  # before the others are started: they would wait for a cache of latents no longer than half an hour
        trainer.fit(model, **options)
    except Stopped as stop:
        log.info("%s; go on with: python main.py --resume %s --train", stop, shlex.quote(str(folder.path)))
        return 128 + stop.signum
    except Exception as error:
        end_others(trainer)
        if (explained := explain(error)) is None:
            raise
        raise explained from error
    log.info("finished after %d updates: %s", updates_done(trainer), folder.path)
    return 0


def _quieten(debug: bool) -> None:
    for message in _QUIET:
        warnings.filterwarnings("ignore", message)
    level = logging.INFO if debug else logging.WARNING
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)  # says which process died
    if not is_first():
        logging.getLogger("ldm").setLevel(logging.WARNING)
