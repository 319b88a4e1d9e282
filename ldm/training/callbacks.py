"""What happens beside a training: the record of the run, pictures, curves, times.

Owns nothing that the training depends on: leaving all of these out gives the same weights. What resuming needs is in `state`.
"""
# ruff: noqa: D102 (what a hook is for is documented by Lightning)

from __future__ import annotations

import csv
import inspect
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ldm.training.counting import UpdateCounter, updates_done
from ldm.training.progress import ProgressBar, ProgressLog, forget_peak_memory, peak_memory
from ldm.training.state import LastCheckpoint, RngStateCallback, isolated_rng
from ldm.util import ConfigError

__all__ = [
    "CUDACallback",
    "ImageLogger",
    "LastCheckpoint",
    "ProgressBar",
    "ProgressLog",
    "RngStateCallback",
    "SetupCallback",
    "TrainingPlot",
    "UpdateCounter",
]

log = logging.getLogger(__name__)


class SetupCallback(Callback):
    """Makes the run's folders and writes down, beside the run, all that is needed to do it again."""

    def __init__(
        self,
        resume: str | None,  # what is resumed, if anything
        now: str,  # timestamp of this start
        logdir: str | Path,
        ckptdir: str | Path,
        cfgdir: str | Path,
        config: Mapping[str, Any],  # model and data, merged
        lightning_config: Mapping[str, Any] | None = None,  # trainer, callbacks, logger
        record: Mapping[str, Any] | None = None,  # command line, seed, git hash, versions, ...
    ) -> None:
        super().__init__()
        self.resume, self.now = resume, now
        self.logdir, self.ckptdir, self.cfgdir = Path(logdir), Path(ckptdir), Path(cfgdir)
        self.config, self.lightning_config, self.record = config, lightning_config, record

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            self.write()

    def write(self) -> None:
        """Make the folders and write `configs/<now>-{run,lightning,project}.yaml`: the project last, which says that all are there."""
        import yaml

        for folder in (self.logdir, self.ckptdir, self.cfgdir):
            folder.mkdir(parents=True, exist_ok=True)
        parts = {"run": self.record, "lightning": self.lightning_config, "project": self.config}
        for part, content in parts.items():
            if content is not None:
                content = {"lightning": content} if part == "lightning" else content
                path = self.cfgdir / f"{self.now}-{part}.yaml"
                temporary = path.with_suffix(".tmp")
                temporary.write_text(yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True), encoding="utf-8")
                temporary.replace(path)


class ImageLogger(Callback):
    """Writes what `log_images` of the model shows as PNG grids to `images/{train,val}/` of the run, and to TensorBoard.

    Drawing has its own random state: how often pictures are made does not change the training. Works with any module that has
    `log_images(batch, ...) -> dict[str, Tensor (B, C, H, W) in [-1, 1]]`; does nothing for others.
    """

    def __init__(
        self,
        batch_frequency: int = 1000,  # updates between pictures
        max_images: int = 8,  # at most this many a grid
        clamp: bool = True,  # to [-1, 1]
        increase_log_steps: bool = True,  # also at the updates 1, 2, 4, 8, ... below batch_frequency
        rescale: bool = True,  # [-1, 1] -> [0, 1]; off for pictures that are in [0, 1] already
        disabled: bool = False,
        log_on_batch_idx: bool = False,  # count batches of the epoch, not updates
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,  # of what is drawn
    ) -> None:
        super().__init__()
        self.batch_freq, self.max_images = batch_frequency, max_images
        self.clamp, self.rescale, self.disabled = clamp, rescale, disabled or batch_frequency < 1
        self.log_on_batch_idx, self.log_first_step = log_on_batch_idx, log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self.seed = seed
        steps = range(int(math.log2(max(batch_frequency, 1))) + 1) if increase_log_steps else ()
        self.log_steps = {2**n for n in steps}
        self._last = -1

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = updates_done(trainer)
        index = batch_idx if self.log_on_batch_idx else done
        if done != self._last and self.check_frequency(index):
            self._last = done
            self.log_img(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0 and updates_done(trainer) > 0:
            self.log_img(trainer, pl_module, batch, batch_idx, "val")

    def check_frequency(self, index: int) -> bool:
        """Whether pictures are due after this many updates (or batches)."""
        if index == 0:
            return self.log_first_step
        return (index == 1 and self.log_first_step) or index % self.batch_freq == 0 or index in self.log_steps

    def log_img(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str = "train") -> None:
        """Draw one set of grids; the first process writes it. Where the model is sharded, all draw: none has it whole."""
        draw = getattr(pl_module, "log_images", None)
        alone = not getattr(trainer.strategy, "draws_together", False)
        if self.disabled or draw is None or self.max_images < 1 or (alone and not trainer.is_global_zero):
            return
        was_training = pl_module.training
        pl_module.eval()
        try:
            with torch.no_grad(), isolated_rng(self.seed), trainer.precision_plugin.forward_context():
                images = draw(batch, **self._arguments(draw, split))
        finally:
            pl_module.train(was_training)
        step = updates_done(trainer)
        for name, value in images.items() if trainer.is_global_zero else ():
            grid = self._grid(value)
            if grid is not None:
                stem = f"{name}_gs-{step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}".replace("/", "_")
                self._write(Path(trainer.default_root_dir) / "images" / split / f"{stem}.png", grid)
                self._to_loggers(trainer, f"{split}/{name}", grid, step)

    def _arguments(self, draw: Any, split: str) -> dict[str, Any]:
        """`split` and the number of pictures, where `log_images` takes them."""
        parameters = inspect.signature(draw).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if unknown := [] if open_ended else sorted(set(self.log_images_kwargs) - set(parameters)):
            known = ", ".join(name for name in parameters if name != "batch")
            raise ConfigError(f"image_logger: log_images of this model does not know {', '.join(unknown)}; it takes {known}")
        arguments: dict[str, Any] = {"split": split} if open_ended or "split" in parameters else {}
        if "N" in parameters:
            arguments["N"] = self.max_images
        return {**arguments, **self.log_images_kwargs}

    def _grid(self, images: Any) -> Tensor | None:
        """(B, C, H, W) or one (C, H, W) -> (3, H', W') in [0, 1], four pictures a row."""
        from torchvision.utils import make_grid

        if not isinstance(images, Tensor) or images.ndim not in (3, 4):
            return None
        images = (images[None] if images.ndim == 3 else images)[: self.max_images].detach().float().cpu()
        if images.shape[1] not in (1, 3):
            images = images[:, :3] if images.shape[1] > 3 else images[:, :1]
        if self.clamp:
            images = images.clamp(-1, 1)
        if self.rescale:
            images = (images + 1) / 2
        return make_grid(images, nrow=4).clamp(0, 1)

    @staticmethod
    def _write(path: Path, grid: Tensor) -> None:
        from PIL import Image

        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (grid.nan_to_num() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()  # (H', W', 3)
        Image.fromarray(pixels).save(path)

    @staticmethod
    def _to_loggers(trainer: pl.Trainer, name: str, grid: Tensor, step: int) -> None:
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):
                logger.experiment.add_image(name, grid, global_step=step)


class TrainingPlot(Callback):
    """Draws the logged curves of all starts of a run into `training.png` beside the log, now and then and at the end."""

    def __init__(self, every_n_seconds: float = 300.0) -> None:
        super().__init__()
        self.every_n_seconds = every_n_seconds
        self._drawn = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and time.monotonic() - self._drawn > self.every_n_seconds:
            self.draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.draw(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.is_global_zero and trainer.global_step > 0:
            self.draw(trainer)

    def draw(self, trainer: pl.Trainer) -> None:
        """Flush the CSV log and draw it."""
        self._drawn = time.monotonic()
        for logger in trainer.loggers:
            logger.save()
        try:
            plot_metrics(Path(trainer.default_root_dir))
        except ImportError:
            log.info("training.png is not drawn: pip install matplotlib")
            self.every_n_seconds = math.inf


def read_metrics(logdir: Path) -> dict[str, list[tuple[float, float]]]:
    """All logged scalars of a run: name -> [(step, value)], over all its starts; a step logged twice keeps the later value.

    A line that a kill has cut short is passed over.
    """
    found: dict[str, dict[float, float]] = {}
    files = sorted(logdir.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.rpartition("_")[2]))
    for path in files:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    step = float(row.pop("step", "") or "nan")
                    values = {name: float(text) for name, text in row.items() if text and name not in ("epoch", None)}
                except ValueError:
                    continue
                for name, value in values.items():
                    found.setdefault(name, {})[step] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def plot_metrics(logdir: Path) -> Path | None:
    """Write `training.png`; one panel a metric, train and val of the same name together. None when nothing was logged."""
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in read_metrics(logdir).items():
        title = name.removeprefix("train/").removeprefix("val/").removesuffix("_step").removesuffix("_epoch")
        panels.setdefault(title, {})[name] = points
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    for i, (title, curves) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker="." if len(points) < 30 else "")
        values = [value for points in curves.values() for _, value in points if math.isfinite(value)]
        if values and min(values) > 0 and max(values) > 20 * min(values):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    temporary = logdir / ".training.png"
    figure.savefig(temporary, dpi=90, format="png")
    return temporary.replace(logdir / "training.png")


class CUDACallback(Callback):
    """Logs the time of every epoch, and the peak memory where the device counts it (the legacy name; any device will do)."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = time.monotonic()
        forget_peak_memory(pl_module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = time.monotonic() - getattr(self, "_start", time.monotonic())
        message = f"epoch {trainer.current_epoch}: {seconds:.1f} s"
        if peak := peak_memory(pl_module.device):
            message += f", peak memory {peak / 2**20:.0f} MiB"
        log.info(message)
