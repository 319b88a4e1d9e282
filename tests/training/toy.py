"""A model and a data set that are small but use everything that can break a resume: dropout, EMA, random timesteps, global randomness."""

from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class NoisyData(Dataset):
    """Items with draws from all three global generators, as augmentations have them, and with the epoch."""

    def __init__(self, size: int = 30, dies_at: int | None = None) -> None:
        self.size, self.epoch = size, 0
        self.dies_at = dies_at  # the item that kills its process

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, i: int) -> dict:
        if i == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        image = np.full((4, 4, 3), i / self.size + 0.1 * noise + self.epoch, dtype=np.float32)
        return {"image": image, "caption": f"item {i} epoch {self.epoch}", "index": i}


class ToyModel(pl.LightningModule):
    """Denoises with one hidden layer."""

    def __init__(
        self,
        width: int = 8,
        monitor: str | None = None,
        manual: bool = False,
        signals: dict | None = None,
        bad: tuple = (),
        val_signal: int | None = None,
    ) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.3), nn.SiLU(), nn.Linear(width, 3))
        self.register_buffer("ema", torch.zeros(width, 3))
        self.monitor = monitor
        self.signals = signals or {}  # batches seen -> name of a signal that this process then gets
        self.val_signal = val_signal  # validation batch, counted from one, that gets SIGTERM
        self.validated = 0
        self.bad = bad  # batches, counted from one, that give a NaN
        self.automatic_optimization = not manual
        self.seen: list[list[int]] = []
        self.captions: list[str] = []
        self.learning_rate = 0.0

    def _loss(self, batch: dict) -> Tensor:
        x0 = batch["image"].reshape(-1, 16, 3)
        t = torch.rand(len(x0), 1, 1)
        eps = torch.randn_like(x0)
        loss = ((self.net((1 - t) * x0 + t * eps) - eps) ** 2).mean()
        return loss * float("nan") if self.training and len(self.seen) in self.bad else loss

    def training_step(self, batch: dict, batch_idx: int) -> Tensor | None:
        self.seen.append(batch["index"].tolist())
        self.captions += batch["caption"]
        if len(self.seen) in self.signals:
            os.kill(os.getpid(), getattr(signal, self.signals[len(self.seen)]))
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self._loss(batch))
            optimizer.step()
        return None

    def on_train_batch_end(self, *args: object) -> None:
        self.ema.lerp_(self.net[0].weight.detach(), 0.1)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        self.validated += 1
        if self.validated == self.val_signal:
            os.kill(os.getpid(), signal.SIGTERM)
        self.log("val/loss", self._loss(batch))

    def log_images(self, batch: dict, N: int = 4, split: str = "train") -> dict[str, Tensor]:
        images = batch["image"][:N].movedim(-1, 1)
        return {"inputs": images, "samples": torch.randn_like(images), "note": "no picture"}

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=self.learning_rate)
        if not self.automatic_optimization:
            return [optimizer, torch.optim.SGD(self.net.parameters(), lr=1e-4)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
