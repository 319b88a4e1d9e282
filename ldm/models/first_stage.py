"""What all trainable first stages share: input, manual optimisation of generator and discriminator, EMA, weights, pictures.

The networks and their losses are in autoencoder.py and ldm/modules/losses. Knows nothing of diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.tiling import Tiling, blend_tiles
from ldm.modules.ema import LitEma, ema_scope
from ldm.util import ConfigError, UserError, get_obj_from_str, instantiate_from_config, plain

_GENERATOR, _DISCRIMINATOR = 0, 1  # the losses' `optimizer_idx`


def psnr(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean over the batch of the peak signal-to-noise ratio in dB; images in [-1, 1] (the reconstruction is clamped)."""
    mse = (reconstruction.detach().float().clamp(-1.0, 1.0) - image.float()).square().flatten(1).mean(dim=1)
    return (10.0 * torch.log10(4.0 / mse.clamp_min(1e-10))).mean()


class FirstStage(pl.LightningModule):
    """Encoder and decoder trained on images alone. Subclasses say how to reconstruct and how to call their loss.

    Optimisation is manual (two optimizers once the loss has a discriminator), so clipping and accumulation are options of the model:
    the trainer's own must stay unset. One forward pass serves both optimizers. `generator_steps` counts the generator's updates: it is
    the clock of `disc_start` and is kept in checkpoints; Lightning's `global_step` counts the updates of both optimizers.
    """

    learning_rate: float | None = None  # set by whoever starts the training
    generator_lr_factor: float = 1.0
    tiling: Tiling | None = None  # encode and decode in tiles of this size; None: the whole at once

    def __init__(
        self,
        lossconfig: Any,
        *,
        image_key: str,
        colorize_nlabels: int | None,  # label maps with so many channels are shown in random colours
        monitor: str | None,
        ema_decay: float | None,
        optimizer_config: Any,  # {target, params}; default Adam with betas (0.5, 0.9)
        scheduler_config: Any,  # {target, params} of an object with schedule(step) -> factor
        gradient_clip_val: float | None,  # largest gradient norm
        accumulate_grad_batches: int,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if accumulate_grad_batches < 1:
            raise ConfigError(f"accumulate_grad_batches={accumulate_grad_batches} must be 1 or more")
        self.image_key, self.ema_decay = image_key, ema_decay
        self.optimizer_config, self.scheduler_config = plain(optimizer_config), plain(scheduler_config)
        self.gradient_clip_val, self.accumulate_grad_batches = gradient_clip_val, accumulate_grad_batches
        self.generator_steps = 0
        loss = instantiate_from_config(lossconfig)
        self.loss = nn.Identity() if loss is None else loss
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if monitor is not None:
            self.monitor = monitor

    # -- what a subclass gives ------------------------------------------------------------------------------------------
    def reconstruct(self, x: Tensor) -> tuple[Tensor, Any]:
        """Reconstruction (B, C, H, W) and whatever `compute_loss` needs beside it."""
        raise NotImplementedError

    def compute_loss(
        self, x: Tensor, reconstruction: Tensor, extra: Any, optimizer_idx: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the generator (`optimizer_idx` 0) or the discriminator (1), and what to log."""
        raise NotImplementedError

    def generator_modules(self) -> list[nn.Module]:
        """Modules of the first optimizer."""
        raise NotImplementedError

    def generator_parameters(self) -> list[nn.Parameter]:
        """Parameters of the first optimizer."""
        return [p for module in self.generator_modules() for p in module.parameters()]

    # -- size and tiles -------------------------------------------------------------------------------------------------
    @property
    def factor(self) -> int:
        """Image pixels to a latent pixel, along one side."""
        return self.encoder.patch_size * 2 ** (self.encoder.num_resolutions - 1)

    def in_tiles(self, run: Callable[[Tensor], Tensor], x: Tensor, latent: bool = False) -> Tensor:
        """`run(x)` for images or latents x (B, C, H, W), tile by tile if there is a `tiling`."""
        if self.tiling is None:
            return run(x)
        tiles = self.tiling.divided(self.factor)  # checked for images too
        return blend_tiles(x, tiles if latent else self.tiling, lambda window: run(x[window]))

    # -- input and pictures ---------------------------------------------------------------------------------------------
    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Images batch[k], (B, H, W, C) or (B, H, W), as float32 (B, C, H, W) in the usual memory order."""
        if k not in batch:
            raise ConfigError(f"the batch has no {k!r}; it has {', '.join(sorted(batch))}: set image_key or the dataset's key")
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        return x.permute(0, 3, 1, 2).contiguous().float()

    def get_last_layer(self) -> nn.Parameter:
        """The weight at which the adversarial gradient is balanced against the reconstruction's."""
        return self.decoder.conv_out.weight

    def to_rgb(self, x: Tensor) -> Tensor:
        """Label maps (B, L, H, W) as colours (B, 3, H, W) stretched over [-1, 1]."""
        if not hasattr(self, "colorize"):
            colors = torch.randn(3, x.shape[1], 1, 1, device=x.device)
            self.register_buffer("colorize", colors, persistent=False)  # or checkpoints would have a key that a new start lacks
        x = F.conv2d(x, self.colorize)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0

    def _shown(self, x: Tensor) -> Tensor:
        return self.to_rgb(x) if x.shape[1] > 3 else x

    # -- weights --------------------------------------------------------------------------------------------------------
    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights from `path`, leaving out names that start with one of `ignore_keys`.

        Training-only parts (`loss.*`, `model_ema.*`) may be missing, or be there in vain; any other difference is a CheckpointError.
        Averages in the file become the weights where the model keeps none. An autoencoder is also found in the file of a whole
        diffusion model, or in a diffusers folder.
        """
        from ldm.inference.checkpoint import load_weights  # lies above this layer

        load_weights(self, path, ignore=tuple(ignore_keys))

    def init_ema(self) -> None:
        """(Re)start the moving average from the present weights; does nothing without `ema_decay`."""
        if self.ema_decay is None:
            return
        self.model_ema = LitEma(self, decay=self.ema_decay)

    def ema_scope(self, context: str | None = None) -> AbstractContextManager[None]:
        """Inside, the averaged weights are in place (if there are any)."""
        return ema_scope(None if self.ema_decay is None else self.model_ema, self, context)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the clock of `disc_start`."""
        checkpoint["generator_steps"] = self.generator_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the clock of `disc_start`."""
        self.generator_steps = int(checkpoint.get("generator_steps", 0))

    # -- optimisation ---------------------------------------------------------------------------------------------------
    @property
    def discriminator(self) -> nn.Module | None:
        """The loss's discriminator, if it has one."""
        return getattr(self.loss, "discriminator", None)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[dict[str, Any]]]:
        """One optimizer for the autoencoder and one for the discriminator if there is one. Raises UserError without a learning rate."""
        if self.learning_rate is None:
            raise UserError("no learning rate: set base_learning_rate in the model's config, or model.learning_rate in code")
        optimizers = [self._optimizer(self.generator_parameters(), self.generator_lr_factor * self.learning_rate)]
        if self.discriminator is not None:
            optimizers.append(self._optimizer(self.discriminator.parameters(), self.learning_rate))
        if self.scheduler_config is None:
            return optimizers, []
        factor = self._schedule()
        schedulers = [torch.optim.lr_scheduler.LambdaLR(opt, lr_lambda=factor) for opt in optimizers]
        return optimizers, [{"scheduler": s, "interval": "step", "frequency": 1} for s in schedulers]

    def _optimizer(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        if self.optimizer_config is None:
            return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.9))
        options = {"lr": lr, **(self.optimizer_config.get("params") or {})}
        return get_obj_from_str(self.optimizer_config["target"])(parameters, **options)

    def _schedule(self) -> Callable[[int], float]:
        schedule = instantiate_from_config(self.scheduler_config)
        return getattr(schedule, "schedule", schedule)

    def on_fit_start(self) -> None:
        """Raises UserError, before any work is done, if the loss cannot train."""
        if isinstance(self.loss, nn.Identity):
            raise UserError("this autoencoder has no loss, so it can only be used, not trained: set lossconfig")
        if hasattr(self.loss, "prepare"):
            self.loss.prepare()  # finds the perceptual weights or says what to pass

    on_validation_start = on_fit_start

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Update the generator, then the discriminator on the same reconstruction."""
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        boundary = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        x = self.get_input(batch, self.image_key)
        with self._only(optimizers, _GENERATOR):
            reconstruction, extra = self.reconstruct(x)
            loss, logs = self.compute_loss(x, reconstruction, extra, _GENERATOR, "train")
            self._descend(loss, optimizers, _GENERATOR, boundary)
        logs["train/psnr"] = psnr(reconstruction, x)
        self.log("aeloss", loss.detach(), prog_bar=True)
        if self._discriminator_learns():
            with self._only(optimizers, _DISCRIMINATOR):
                loss, disc_logs = self.compute_loss(x, reconstruction.detach(), extra, _DISCRIMINATOR, "train")
                self._descend(loss, optimizers, _DISCRIMINATOR, boundary)
            self.log("discloss", loss.detach(), prog_bar=True)
            logs |= disc_logs
        self.log_dict(logs)
        if boundary:
            self.generator_steps += 1
            if self.ema_decay is not None:
                self.model_ema(self)

    def _discriminator_learns(self) -> bool:
        if self.discriminator is None:
            return False
        active = getattr(self.loss, "discriminator_active", None)
        return active is None or active(self.generator_steps)

    @contextmanager
    def _only(self, optimizers: list[Any], index: int) -> Iterator[None]:
        """Inside, only the parameters of one optimizer collect gradients."""
        if len(optimizers) == 1:
            yield
            return
        self.toggle_optimizer(optimizers[index])
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizers[index])

    def _descend(self, loss: Tensor, optimizers: list[Any], index: int, boundary: bool) -> None:
        self.manual_backward(loss / self.accumulate_grad_batches)
        if not boundary:
            return
        optimizer = optimizers[index]
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val=self.gradient_clip_val, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad()
        schedulers = self.lr_schedulers()
        if schedulers is not None:  # each follows the steps of its own optimizer
            (schedulers if isinstance(schedulers, list) else [schedulers])[index].step()

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log losses and PSNR under val/, and with EMA under val_ema/ too."""
        x = self.get_input(batch, self.image_key)
        self._validate(x, "val")
        if self.ema_decay is not None:
            with self.ema_scope():
                self._validate(x, "val_ema")

    def _validate(self, x: Tensor, split: str) -> None:
        reconstruction, extra = self.reconstruct(x)
        _, logs = self.compute_loss(x, reconstruction, extra, _GENERATOR, split)
        logs[f"{split}/psnr"] = psnr(reconstruction, x)
        if self._discriminator_learns():
            logs |= self.compute_loss(x, reconstruction, extra, _DISCRIMINATOR, split)[1]
        self.log_dict(logs, batch_size=x.shape[0], sync_dist=True)
