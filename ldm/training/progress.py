"""How far a training is: a bar for terminals, a line now and then for files, with images a second, loss, learning rate and memory.

Owns nothing that the training depends on.
"""
# ruff: noqa: D102 (what a hook is for is documented by Lightning)

from __future__ import annotations

import contextlib
import datetime
import logging
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from torch import Tensor

from ldm.training.counting import UpdateCounter, updates_done

log = logging.getLogger(__name__)


class _Speed:
    """Items a second, averaged over about the last `window` seconds."""

    def __init__(self, window: float = 30.0) -> None:
        self.window, self.rate, self._last = window, 0.0, time.monotonic()

    def step(self, items: int) -> None:
        now = time.monotonic()
        elapsed, self._last = max(now - self._last, 1e-9), now
        keep = math.exp(-elapsed / self.window) if self.rate else 0.0
        self.rate = keep * self.rate + (1 - keep) * items / elapsed


def batch_items(batch: Any) -> int:
    """How many items a batch holds: the length of its first tensor or list."""
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((len(value) for value in values if isinstance(value, (Tensor, list, tuple))), 1)


def _learning_rate(trainer: pl.Trainer) -> float:
    return trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else 0.0


def peak_memory(device: torch.device) -> int:
    """Most bytes that tensors have taken on an accelerator since the start or `forget_peak_memory`; 0 where it does not count them."""
    try:
        return 0 if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)
    except RuntimeError:  # an accelerator without the statistics
        return 0


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on."""
    with contextlib.suppress(RuntimeError):
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)


def memory_in_use(device: torch.device) -> str:
    """Peak memory of this process: the device's own where it counts it, otherwise the resident memory. Empty where neither is known."""
    if peak := peak_memory(device):
        return f"{peak / 2**30:.1f}G"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f}G"


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with images a second, the learning rate and the peak memory, for terminals."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._speed = _Speed()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._speed = _Speed()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._speed.step(batch_items(batch) * trainer.world_size)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {
            **metrics,
            "lr": f"{_learning_rate(trainer):.2e}",
            "img/s": f"{self._speed.rate:.1f}",
            "mem": memory_in_use(pl_module.device),
        }


class ProgressLog(Callback):
    """One log line every so often instead of a bar, for output that goes to a file."""

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self._speed, self._start, self._shown = _Speed(), 0.0, -math.inf
        self._first = self._epoch = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._speed, self._start, self._first = _Speed(), time.monotonic(), updates_done(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._speed.step(batch_items(batch) * trainer.world_size)
        self._epoch = trainer.current_epoch
        if trainer.is_global_zero and time.monotonic() - self._shown >= self.every_n_seconds:
            self._shown = time.monotonic()
            log.info(self.line(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val")}
            shown = "  ".join(f"{name} {float(value):.4g}" for name, value in values.items())
            log.info("step %d  validation  %s", updates_done(trainer), shown)
        self._speed.step(0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            log.info(self.line(trainer))

    def line(self, trainer: pl.Trainer) -> str:
        """Step, epoch, what the model shows in the bar, learning rate, speed, and the time left when there is an end."""
        done = updates_done(trainer)
        words = [f"step {done}", f"epoch {self._epoch}"]
        shown = {name: value for name, value in trainer.progress_bar_metrics.items() if not name.endswith("_epoch")}
        words += [f"{name} {float(value):.4g}" for name, value in shown.items() if name != "v_num"]
        words += [f"lr {_learning_rate(trainer):.2e}", f"{self._speed.rate:.1f} img/s"]
        words += [f"memory {memory}"] if (memory := memory_in_use(trainer.strategy.root_device)) else []
        goal = self._goal(trainer)
        if goal and done > self._first:
            seconds = (time.monotonic() - self._start) * (goal - done) / (done - self._first)
            words.append(f"left {datetime.timedelta(seconds=max(round(seconds), 0))}")
        return "  ".join(words)

    @staticmethod
    def _goal(trainer: pl.Trainer) -> int | None:
        counters = [c.max_steps for c in trainer.callbacks if isinstance(c, UpdateCounter) and c.max_steps > 0]
        return counters[0] if counters else trainer.max_steps if trainer.max_steps > 0 else None
