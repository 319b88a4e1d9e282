"""What makes a training stoppable: whole checkpoint files, the random state in them, and signals.

Owns `checkpoints/last.ckpt`. Knows no model. A checkpoint is taken when a step is over, which is after the model's own
`on_train_batch_end` (where EMA is updated): Lightning calls callbacks before it, and a file written there lacks one EMA update.
Validation and pictures draw from generators of their own, so it does not matter whether a resume repeats them.
"""
# ruff: noqa: D102 (what a hook is for is documented by Lightning)

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint

from ldm.training.counting import accumulating, updates_done
from ldm.training.guards import unwritable
from ldm.util import plain

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal asked for the end of the training; the checkpoint is written."""

    def __init__(self, signum: int, path: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; everything is in {path}")
        self.signum = signum


# ---------------------------------------------------------------------- files
class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a file under its final name is always whole.

    (Lightning writes to the system's temporary folder and moves, which is a copy where that is another file system.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """torch.save to `path`; configs in the hyper-parameters become plain containers, which restricted unpickling can read.

        Raises `UserError` when the disk is full; the file of that name, if there is one, stays as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = {key: _plain_tree(value) if "hyper_parameters" in key else value for key, value in checkpoint.items()}
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except (OSError, RuntimeError) as error:  # torch tells a failed write as either
            size = temporary.stat().st_size if temporary.exists() else None
            raise unwritable(target, error, size) from error
        finally:
            temporary.unlink(missing_ok=True)


def _plain_tree(value: Any) -> Any:
    value = plain(value)
    if isinstance(value, dict):
        return {key: _plain_tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain_tree(item) for item in value)
    return value


# ---------------------------------------------------------------------- random state
def rng_state() -> dict[str, Any]:
    """State of this process's global generators (python, numpy, torch, its accelerator) in types that `weights_only` loading accepts."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {"name": str(name), "keys": torch.from_numpy(keys.astype(np.int64)), "rest": [float(x) for x in rest]},
        "torch": torch.get_rng_state(),
    }
    if (kind := _accelerator()) is not None:
        state[kind] = torch.get_device_module(kind).get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> bool:
    """Put back what `rng_state` returned. False where the state knows nothing of the accelerator that is in use, which goes on as it is."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    position, has_gauss, gauss = numpy["rest"]
    np.random.set_state((numpy["name"], numpy["keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if (kind := _accelerator()) is None:
        return True
    own = state.get(kind)
    if isinstance(own, (list, tuple)):  # of an earlier version: those of all devices
        place = torch.accelerator.current_device_index()
        own = own[place] if place < len(own) else None
    if own is None:
        return False
    torch.get_device_module(kind).set_rng_state(own.cpu())
    return True


def _accelerator() -> str | None:
    """The kind of accelerator that is in use, such as cuda or mps."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if there is None else there.type


def seed_all(seed: int) -> None:
    """Start all global generators from `seed` (unlike Lightning's function, without changing the seed of the run)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Inside, the global generators start from `seed`; afterwards they go on as if nothing had been drawn."""
    state = rng_state()
    seed_all(seed)
    try:
        yield
    finally:
        set_rng_state(state)


class RngStateCallback(Callback):
    """Keeps the random state in checkpoints, one for every process, and keeps validation from touching it.

    Validation starts from the same seed every time: its losses use the same noise and timesteps, so they can be compared.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._loaded: list[dict[str, Any]] | None = None
        self._outer: dict[str, Any] | None = None  # while validation draws from generators of its own: the training's
        self._stack = contextlib.ExitStack()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        own = self._outer or rng_state()
        state: list[Any] = [own]
        if trainer.world_size > 1:
            state = [None] * trainer.world_size
            torch.distributed.all_gather_object(state, own)
        checkpoint["rng_state"] = state

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get("rng_state")
        if self._loaded is None:
            log.warning("the checkpoint holds no random state: this training goes on with other noise than it would have had")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaded, self._loaded = self._loaded or [], None
        rank = trainer.global_rank
        if rank < len(loaded) and set_rng_state(loaded[rank]):
            return
        if loaded:  # more processes than before, or another kind of device: noise that is neither another's nor that of the first start
            log.warning("the checkpoint holds no random state for process %d on its device: it goes on with other noise", rank)
            seed_all(int(np.random.SeedSequence([self.seed, rank, trainer.global_step]).generate_state(1)[0]))
        elif rank > 0:  # the same weights everywhere, but other noise
            seed_all(self.seed + rank)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._outer = rng_state()
        self._stack.enter_context(isolated_rng(self.seed + trainer.global_rank))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._outer = None
        self._stack.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._outer = None
        self._stack.close()


class RateCallback(Callback):
    """A learning rate that is another when a training goes on: optimizers and schedules come back from the checkpoint with the old one."""

    def __init__(self) -> None:
        self._before: float | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["learning_rate"] = getattr(pl_module, "learning_rate", None)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._before = checkpoint.get("learning_rate")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        now, before, self._before = getattr(pl_module, "learning_rate", None), self._before, None
        if not now or not before or now == before:
            return
        factor = now / before
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            group.update({name: group[name] * factor for name in ("lr", "initial_lr") if name in group})
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        log.info("the learning rate, %.3e in the checkpoint, is %.3e from here on", before, now)


# ---------------------------------------------------------------------- checkpoints
class _AfterStep(Callback):
    """Calls `after_step` at the very end of a step, when the model's own `on_train_batch_end` has run; not while gradients accumulate."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        inner = pl_module.on_train_batch_end

        def finish(outputs: Any, batch: Any, batch_idx: int) -> None:
            inner(outputs, batch, batch_idx)
            if not accumulating(trainer, pl_module, batch_idx):
                self.after_step(trainer, pl_module, outputs, batch, batch_idx)

        pl_module.on_train_batch_end = finish  # an attribute of this instance, taken away at the end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        vars(pl_module).pop("on_train_batch_end", None)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        vars(pl_module).pop("on_train_batch_end", None)

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """What to do then."""
        raise NotImplementedError


class StepCheckpoint(_AfterStep, ModelCheckpoint):
    """Lightning's ModelCheckpoint, whose files taken every n steps hold the whole step."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Too early: see `after_step`."""

    def after_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = self._every_n_train_steps
        if every > 0 and updates_done(trainer) % every != 0:
            return
        self._every_n_train_steps = min(every, 1)  # decided: Lightning would count the steps of all optimizers
        try:
            ModelCheckpoint.on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx)
        finally:
            self._every_n_train_steps = every


_STOPS_FIRST = 1000  # above all numbers of signals


def _stops(number: int) -> bool:
    """Whether a signal ends the training; SIGUSR1 only saves."""
    return number != getattr(signal, "SIGUSR1", None)


def _most_urgent(pending: set[int]) -> int | None:
    """The signal to answer first: one that ends the training before one that saves."""
    return max(pending, key=lambda number: (_stops(number), number), default=None)


class LastCheckpoint(_AfterStep, Checkpoint):
    """Writes `last.ckpt` every n updates, at the end of the training, and when a signal asks for it.

    SIGUSR1 saves and goes on; SIGTERM and the first ctrl-C finish the step, save, and stop with `Stopped`. A second ctrl-C
    interrupts at once, without saving. Signals that the platform lacks are left out. During a validation of one process the batch is
    finished and what was before it is saved; several processes, whose validations may differ in length, act after it.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int = 1000, every_minutes: float | None = None) -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self.every = every_n_train_steps
        self.every_minutes = every_minutes
        self._saved_at = 0
        self._saved_when = time.monotonic()
        self._pending: set[int] = set()  # signals that wait for the end of the step
        self._answering: int | None = None  # the one that is being saved for
        self._previous: dict[int, Any] = {}
        self._progress: dict[str, Any] | None = None  # of the training's loop, while a validation runs

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.path = Path(trainer.strategy.broadcast(str(self.path)))  # one path for all processes

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.deafen()

    # -- signals
    def listen(self) -> None:
        """Install the signal handlers (from the main thread only)."""
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                number = getattr(signal, name)
                with contextlib.suppress(ValueError):  # not the main thread
                    self._previous[number] = signal.signal(number, self._on_signal)

    def deafen(self) -> None:
        """Put the former handlers back."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and signal.SIGINT in (*self._pending, self._answering):
            raise KeyboardInterrupt
        self._pending.add(number)

    # -- saving
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_at = updates_done(trainer)
        self._saved_when = time.monotonic()
        self.listen()  # not earlier: while data is prepared, a signal may simply end the process

    def after_step(self, trainer: pl.Trainer, *_: Any) -> None:
        if (number := self._agreed_signal(trainer)) is not None:
            self._answer(trainer, number)
        elif self._is_due(trainer):
            self._save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._previous and trainer.world_size == 1:
            self._progress = copy.deepcopy(trainer.fit_loop.state_dict())

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self._progress is None or accumulating(trainer, pl_module, trainer.fit_loop.epoch_loop.batch_idx):
            return  # gradients wait for further batches: after the step
        if (number := _most_urgent(self._pending)) is not None:
            self._answer(trainer, number)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._progress = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._progress is not None and self._answering is not None:  # not for the best, which are taken when it has ended
            checkpoint["loops"]["fit_loop"] = self._progress

    def _answer(self, trainer: pl.Trainer, number: int) -> None:
        self._pending.discard(number)
        self._answering = number
        try:
            self._save(trainer)
        finally:
            self._answering = None
        log.info("%s: saved %s", signal.Signals(number).name, self.path)
        if _stops(number):
            raise Stopped(number, str(self.path))

    def _agreed_signal(self, trainer: pl.Trainer) -> int | None:
        """The signal to act on; with several processes, the most urgent that any of them got."""
        number = _most_urgent(self._pending)
        if trainer.world_size > 1:
            urgency = 0 if number is None else number + (_STOPS_FIRST if _stops(number) else 0)
            tensor = torch.tensor(float(urgency), device=trainer.strategy.root_device)
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
            number = int(tensor) % _STOPS_FIRST or None
        return number

    def _is_due(self, trainer: pl.Trainer) -> bool:
        done = updates_done(trainer)
        if done <= self._saved_at:  # accumulating, or just resumed
            return False
        due = self.every > 0 and done % self.every == 0
        if self.every_minutes is not None:
            passed = time.monotonic() - self._saved_when >= 60 * self.every_minutes
            due |= trainer.strategy.broadcast(passed)
        return due or self._is_last(trainer)

    @staticmethod
    def _is_last(trainer: pl.Trainer) -> bool:
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= (trainer.max_epochs or 0)
        last_step = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        return trainer.should_stop or last_step or (last_epoch and trainer.is_last_batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if updates_done(trainer) > self._saved_at:  # the end was decided after the last batch, by early stopping for instance
            self._save(trainer)
        super().on_train_end(trainer, pl_module)
        self.deafen()

    def _save(self, trainer: pl.Trainer) -> None:
        self._saved_at = updates_done(trainer)
        self._saved_when = time.monotonic()
        trainer.save_checkpoint(self.path)
