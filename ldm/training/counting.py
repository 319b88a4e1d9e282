"""Counting: updates, which Lightning counts for all optimizers together, and batches of an epoch when their size has changed."""
# ruff: noqa: D102 (what a hook is for is documented by Lightning)

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

_WHOLE_EPOCH = 2**40  # batches: more than any epoch has


class UpdateCounter(Callback):
    """Counts updates of the first optimizer, and ends a training with manual optimisation after `max_steps` of them.

    Lightning's own counter adds up the steps of all optimizers, so a VAE with a discriminator would stop after half as many.
    """

    def __init__(self, max_steps: int = -1) -> None:
        self.max_steps = max_steps
        self.updates = 0
        self._hook: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hook = trainer.optimizers[0].register_step_post_hook(self._count) if trainer.optimizers else None
        if 0 <= self.max_steps <= self.updates:
            trainer.should_stop = True

    def _count(self, *_: Any) -> None:
        self.updates += 1

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if 0 <= self.max_steps <= self.updates:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.updates = state_dict["updates"]


def updates_done(trainer: pl.Trainer) -> int:
    """Updates so far, counted once a batch also where several optimizers take turns."""
    counters = [callback for callback in trainer.callbacks if isinstance(callback, UpdateCounter)]
    return counters[0].updates if counters else trainer.global_step


def accumulating(trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> bool:
    """Whether, after this batch, gradients wait for further ones: a checkpoint would lose them."""
    batches = getattr(pl_module, "accumulate_grad_batches", None) or trainer.accumulate_grad_batches
    return (batch_idx + 1) % int(batches) != 0 and not trainer.is_last_batch


class EpochPlace(Callback):
    """Lets a training resumed with another batch size, or number of processes, see the rest of its epoch, neither more nor less.

    Lightning counts batches, so the number of those that are done is put into the new size; the data module keeps the items' place.
    """

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        data = getattr(trainer, "datamodule", None)
        state = checkpoint.get(type(data).__qualname__) or {}
        before, now = state.get("global_batch"), getattr(data, "batch_size", 0) * trainer.world_size
        if not before or not now or before == now:
            return
        counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        done = state["batches"] * before // now if state["batches"] else _WHOLE_EPOCH
        counts |= {name: done - (counts["ready"] - count) for name, count in counts.items()}
