"""From the `lightning.trainer` section and the flags to arguments of today's Trainer.

Owns the translation of arguments that published configs use and Lightning no longer has. Whatever is left must be an argument of the
Trainer: anything else is told, all at once, with the nearest right name.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
from collections.abc import Mapping
from typing import Any

from ldm.util import ConfigError

log = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": 1,
    "benchmark": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,  # our loader splits the data itself
}
# Legacy name -> today's.
_RENAMED = {
    "distributed_backend": "strategy",
    "plugins_strategy": "strategy",
    "replace_sampler_ddp": "use_distributed_sampler",
    "checkpoint_callback": "enable_checkpointing",
    "amp_precision": "precision",
}
# Legacy names without an effect that matters today.
_DROPPED = (
    "terminate_on_nan",
    "weights_summary",
    "progress_bar_refresh_rate",
    "flush_logs_every_n_steps",
    "prepare_data_per_node",
    "amp_backend",
    "amp_level",
    "auto_lr_find",
    "auto_scale_batch_size",
    "stochastic_weight_avg",
    "log_gpu_memory",
    "track_grad_norm",
)
_STRATEGY_NAMES = ("ddp", "ddp2", "dp", "ddp_spawn", "ddp_sharded", "deepspeed", "fsdp")
_OURS = ("callbacks", "logger", "default_root_dir", "datamodule", "model")


def parse_gpus(gpus: Any) -> dict[str, Any]:
    """What the legacy `gpus` meant: "0,1" or [0, 1] are devices by number, a whole number (of 2 or more) is how many, -1 all."""
    text = str(list(gpus) if isinstance(gpus, (list, tuple)) else gpus).strip("[]() ").replace(" ", "")
    if "," in text:
        numbers = [part for part in text.split(",") if part]
        if all(part.isdigit() for part in numbers) and numbers:
            return {"accelerator": "gpu", "devices": [int(part) for part in numbers]}
    elif text == "0":
        raise ConfigError("gpus 0 is ambiguous: for the first GPU say --accelerator gpu --devices 0, and for none --accelerator cpu")
    elif text.lstrip("-").isdigit() and int(text) >= -1:
        return {"accelerator": "gpu", "devices": int(text)}
    raise ConfigError(f"gpus {gpus!r} is not understood: use --accelerator gpu --devices 2 (how many) or --devices 0,1 (which)")


def parse_devices(devices: Any) -> Any:
    """`auto`, a number of devices, or (as a list, or with a comma) their indices."""
    if isinstance(devices, list) and devices and all(isinstance(device, int) for device in devices):
        return devices
    text = str(devices).strip("[]() ").replace(" ", "")
    if text == "auto":
        return text
    if "," in text and all(part.isdigit() for part in text.split(",") if part):
        return [int(part) for part in text.split(",") if part]
    if text.lstrip("-").isdigit() and (int(text) > 0 or int(text) == -1):
        return int(text)
    raise ConfigError(f"devices {devices!r} is not understood: use how many (2), which (0,1 or 0,) or auto")


def trainer_arguments(lightning: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `pytorch_lightning.Trainer`: defaults, then the config's `lightning` section, then flags."""
    given = _modernise(dict(lightning.get("trainer") or {}))
    if lightning.get("strategy") is not None:
        given.setdefault("strategy", lightning["strategy"])
    if options.gpus is not None:
        if options.devices is not None or options.accelerator is not None:
            raise ConfigError("--gpus says both accelerator and devices: leave out --gpus, or --accelerator and --devices")
        given.update(parse_gpus(options.gpus))
    for flag in ("accelerator", "devices", "num_nodes", "strategy"):
        if getattr(options, flag) is not None:
            given[flag] = getattr(options, flag)
    arguments = {**DEFAULTS, **given}
    arguments["devices"] = parse_devices(arguments["devices"])
    _check_names(arguments)
    return arguments


def _modernise(given: dict[str, Any]) -> dict[str, Any]:
    for old, new in _RENAMED.items():
        if old in given:
            log.info("lightning.trainer.%s is now called %s", old, new)
            given.setdefault(new, given.pop(old))
    for name in _DROPPED:
        if name in given:
            log.info("lightning.trainer.%s no longer exists and is left out", name)
            del given[name]
    if str(given.get("accelerator")) in _STRATEGY_NAMES:
        given.setdefault("strategy", given.pop("accelerator"))
    if given.get("accelerator") is None:
        given.pop("accelerator", None)
    if given.get("gpus") is not None:
        given.update(parse_gpus(given["gpus"]))
    given.pop("gpus", None)
    return given


def _check_names(arguments: Mapping[str, Any]) -> None:
    import pytorch_lightning as pl

    allowed = [name for name in inspect.signature(pl.Trainer.__init__).parameters if name not in ("self", *_OURS)]
    wrong = []
    for name in arguments:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=2)
            wrong.append(f"{name}{' (did you mean ' + ' or '.join(close) + '?)' if close else ''}")
    if "resume_from_checkpoint" in arguments:
        raise ConfigError("lightning.trainer.resume_from_checkpoint is gone: use main.py --resume RUN")
    if wrong:
        raise ConfigError(f"the Trainer does not know lightning.trainer.{', '.join(wrong)}")
