"""What can go wrong while a training runs, and what is made of it: numbers that overflow, a full disk, a data worker that dies.

Knows no particular model. Updates with NaN or infinite gradients are left out and counted; everything else becomes one clear line.
"""
# ruff: noqa: D102 (what a hook is for is documented by Lightning)

from __future__ import annotations

import errno
import logging
import re
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ldm.training.counting import updates_done
from ldm.training.distributed import all_finite, explain_lost
from ldm.util import UserError

log = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEAD_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? [\d, ]+\) (?:is killed by signal: [^.]+|exited unexpectedly)[^.]*", re.IGNORECASE
)
_TIMED_OUT = re.compile(r"DataLoader timed out after \d+ seconds", re.IGNORECASE)


class SkipNonFinite(Callback):
    """Leaves out an update whose gradients are NaN or infinite: weights, optimizer state and the good run behind them stay as they are.

    Gradients are looked at rather than the loss: with several processes they are the same everywhere, or are asked for everywhere
    when they are sharded, so all skip alike. A skipped update counts as a step. With fp16 the loss scaler does the skipping, as it
    must to find its scale; here it is only counted.
    The training ends with a `UserError` after `limit` skipped updates of one optimizer in a row.
    """

    def __init__(self, limit: int = 20) -> None:
        if limit < 1:
            raise UserError(f"skip_non_finite: limit is {limit}, it must be at least 1")
        self.limit = limit
        self.skipped = 0  # of the whole run
        self._in_a_row: dict[int, int] = {}  # of each optimizer

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        if not gradients or all_finite(gradients):
            self._in_a_row[id(optimizer)] = 0
            return
        self.skipped += 1
        self._in_a_row[id(optimizer)] = in_a_row = self._in_a_row.get(id(optimizer), 0) + 1
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            for parameter in parameters:
                parameter.grad = None  # an optimizer passes over parameters without a gradient
        pl_module.log("skipped_updates", float(self.skipped), on_step=True, on_epoch=False)
        message = "update %d has NaN or infinite gradients and is left out (%d so far, %d in a row)"
        log.warning(message, updates_done(trainer) + 1, self.skipped, in_a_row)
        if in_a_row >= self.limit:
            raise UserError(
                f"training stopped: {in_a_row} updates in a row had NaN or infinite gradients; the weights are those before them. Try "
                "a lower model.base_learning_rate, lightning.trainer.gradient_clip_val=1.0, or precision bf16-mixed or 32-true for fp16"
            )

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]


def unwritable(path: Path, error: BaseException, needed: int | None = None) -> UserError:
    """What to say when `path` cannot be written; `needed` is its size in bytes where known."""
    free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    size = f"it needs about {needed / 2**20:.0f} MiB, " if needed else ""
    return UserError(
        f"{path} could not be written ({reason}): {size}{free / 2**20:.0f} MiB are free there. Files written before are untouched; "
        "make room, or lower lightning.modelcheckpoint.params.save_top_k, and go on with --resume"
    )


def explain(error: BaseException) -> UserError | None:
    """One clear line for failures of the machine rather than of the program; None for any other error."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in _FULL:
        return unwritable(Path(error.filename or "."), error)
    found = _DEAD_WORKER.search(text)
    if found or (isinstance(error, (ConnectionError, EOFError)) and _was_loading(error)):
        reason = found[0] if found else text or type(error).__name__
        return UserError(
            f"a data worker died ({reason}): most often memory ran out. Try fewer workers (data.params.num_workers=1, or 0 to load in "
            "the main process, where the cause shows); go on from the last checkpoint with --resume"
        )
    if found := _TIMED_OUT.search(text):
        return UserError(f"the data workers hang ({found[0]}): try data.params.num_workers=0, where the cause shows")
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(
            "the device ran out of memory: try a smaller data.params.batch_size with lightning.trainer.accumulate_grad_batches, "
            "lightning.trainer.precision=bf16-mixed, or use_checkpoint: true in the unet_config"
        )
    if isinstance(error, UserError) and "DataLoader worker process" in text:  # raised in a worker, with its traceback as text
        return type(error)(text.strip().splitlines()[-1].partition(": ")[2] or text)
    return explain_lost(error)


def _was_loading(error: BaseException) -> bool:
    """Whether the error came up while data was taken from the workers: what a dead one breaks depends on when it dies."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("torch.utils.data") for frame, _ in frames)
