"""Several processes: what the strategy's name becomes, what they tell each other, and what is said when one of them ends.

Knows no model. `fsdp` is this project's own strategy (see `sharding`), `deepspeed*` needs its package, all others are Lightning's.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import re
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.modules.ema import local_part
from ldm.util import ConfigError, UserError

log = logging.getLogger(__name__)

# What torch says on the processes that are left when one has ended: gloo, its store, NCCL.
_LOST = re.compile(
    r"connection (?:closed|reset) by peer|connection was likely closed|broken pipe|connection refused|connection timeout"
    r"|socket closed|remote process exited|nccl (?:communicator was aborted|error)|watchdog caught collective"
    r"|timed out waiting \d+ms|recvvalue failed",
    re.IGNORECASE,
)
_PARTLY_USED = "ddp_find_unused_parameters_true"
_MIXED = "got mixed torch.Tensor and DTensor"
_PATIENCE = 5.0  # seconds that the others have to say what happened to them


# ---------------------------------------------------------------------- the strategy
def use_strategy(arguments: dict[str, Any], lightning: Mapping[str, Any], model: Any) -> None:
    """Make of `arguments["strategy"]` what the Trainer takes; `lightning.fsdp` has the options of `fsdp`. Raises `ConfigError`."""
    name, section = arguments.get("strategy"), lightning.get("fsdp")
    if isinstance(name, str) and name.startswith("deepspeed"):
        _check_deepspeed(name)
    if isinstance(name, str) and name.startswith("fsdp_"):
        raise ConfigError(f"--strategy {name} is Lightning's, which shards neither averages nor on the CPU: use --strategy fsdp")
    if name != "fsdp":
        if section:
            raise ConfigError(f"lightning.fsdp is there, but the strategy is {name or 'auto'}: add --strategy fsdp, or leave it out")
        partly = lightning.get("find_unused_parameters") or not model.automatic_optimization  # with optimizers that take turns
        if partly and (name == "ddp" or (name in (None, "auto") and _several(arguments))):
            arguments["strategy"] = _PARTLY_USED
        return
    from ldm.training.sharding import ShardedStrategy, sharded_precision

    if not model.automatic_optimization:
        raise ConfigError("--strategy fsdp cannot train a model that steps its optimizers itself (an autoencoder, say): use --strategy ddp")
    options = dict(section or {})
    allowed = list(inspect.signature(ShardedStrategy).parameters)
    if unknown := sorted(set(options) - set(allowed)):
        raise ConfigError(f"lightning.fsdp does not know {', '.join(unknown)}; it takes {', '.join(allowed)}")
    precision = sharded_precision(arguments.pop("precision", None), str(arguments.get("accelerator")))
    arguments["plugins"] = [*(arguments.get("plugins") or []), precision]
    arguments["strategy"] = ShardedStrategy(**options)


def _several(arguments: Mapping[str, Any]) -> bool:
    return arguments.get("devices") not in (None, 1) or (arguments.get("num_nodes") or 1) > 1


def _check_deepspeed(name: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f'--strategy {name} needs the package deepspeed, which is not installed: pip install -e ".[deepspeed]"; '
            "without it, --strategy fsdp shards weights and optimizer too"
        )


# ---------------------------------------------------------------------- what all must agree on
def all_finite(gradients: list[Tensor]) -> bool:
    """Whether all numbers are finite, on every process where gradients are sharded: one pass, one synchronisation with the device."""
    parts = [part for gradient in gradients if (part := local_part(gradient)).numel() > 0]
    finite = torch.ones((), device=local_part(gradients[0]).device)
    if parts:
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts, float("inf"))])
        finite = torch.isfinite(norms).all().float()
    if any(part is not gradient for part, gradient in zip(map(local_part, gradients), gradients, strict=True)):
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    return bool(finite)


# ---------------------------------------------------------------------- ends
def explain_lost(error: BaseException) -> UserError | None:
    """One line where an error means that another process has gone, or that a part was sharded that must not be; else None."""
    text = str(error)
    if _MIXED in text:
        return ConfigError(
            "--strategy fsdp: a sharded part of this model is used otherwise than by calling it; name the parts that may be sharded, "
            "lightning.fsdp.parts=[NAME, ...], or use --strategy ddp"
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized() and _LOST.search(text):
        return UserError(
            "another process of this training has ended, so this one ends too: what happened stands in that process's own output (none "
            "there: it was killed, most often for lack of memory). Go on from the last checkpoint with --resume"
        )
    return None


def end_others(trainer: Any) -> None:
    """End the processes that this one has started and that still run, after giving them time to say what happened to them."""
    processes = getattr(trainer.strategy.launcher, "procs", None) or []
    deadline = time.monotonic() + _PATIENCE
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))  # one that waits for us hears nothing else
    if left:
        log.warning("%d other process%s of this training ended", len(left), "es" if len(left) > 1 else "")


def describe_processes(trainer: Any, arguments: Mapping[str, Any]) -> str:
    """How a run is spread, in words: `cpu x 2 (ddp)`."""
    strategy = arguments.get("strategy")
    name = strategy if isinstance(strategy, str) else getattr(strategy, "strategy_name", None)
    spread = f"{trainer.strategy.root_device.type} x {trainer.world_size}"
    return f"{spread} ({name})" if name and name != "auto" else spread
