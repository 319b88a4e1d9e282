"""Teaches a text tower where the things of a caption are, before a diffusion model is trained on it.

A diffusion model learns late what "left of" means: while a picture is still noise, a caption's colours and shapes tell much about
every place alike, and its order of words tells nothing until places ask for different words. Predicting the blurred picture from the
caption alone, place by place, takes the noise away and costs a sixth of what the small UNet of the shapes model does. Knows no data set: a
batch has `caption`, a list of B texts, and `z` (B, C, h, w) or else `image` (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.rates import with_schedule
from ldm.util import ConfigError, instantiate_from_config


class LayoutBlock(nn.Module):
    """Every place reads the text, then thinks about it. Pre-norm; places do not see each other."""

    def __init__(self, width: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, places, width), text features (B, L, D) -> (B, places, width)."""
        x = x + self.attn(self.norm1(x), context, context, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class LayoutDecoder(nn.Module):
    """Text features (B, L, D) -> a picture (B, channels, grid, grid); one learnt query a place."""

    def __init__(self, channels: int, grid: int, context_dim: int, width: int = 128, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.grid = grid
        self.places = nn.Parameter(0.5 * torch.randn(grid * grid, width))
        self.blocks = nn.ModuleList(LayoutBlock(width, heads, context_dim) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, channels))

    def forward(self, context: Tensor) -> Tensor:
        """See the class."""
        x = self.places.expand(len(context), -1, -1)
        for block in self.blocks:
            x = block(x, context)
        return self.out(x).movedim(1, -1).unflatten(-1, (self.grid, self.grid))


class TextLayout(pl.LightningModule):
    """Trains a text encoder, with a `LayoutDecoder` that is thrown away afterwards, to predict the picture on a coarse grid.

    The loss is the mean square error as a share of the target's variance in the batch: about 1 for a tower that knows nothing. The
    text encoder stands under `cond_stage_model.`, as in a diffusion model, so a checkpoint can be named as the `version` of a
    `FrozenOpenCLIPEmbedder`.
    """

    def __init__(
        self,
        cond_stage_config: Any,  # {target, params} of a trainable text encoder: list of B texts -> (B, L, D)
        context_dim: int,  # D
        channels: int,  # C: of the latents, or 3
        grid: int = 8,  # places along a side; must divide the picture's
        width: int = 128,
        heads: int = 2,
        depth: int = 2,
        caption_key: str = "caption",
        latent_key: str = "z",
        image_key: str = "image",
        weight_decay: float = 0.01,
        betas: Sequence[float] = (0.9, 0.99),
        scheduler_config: Mapping[str, Any] | None = None,
        monitor: str | None = None,  # metric by which the launcher keeps the best checkpoint
    ) -> None:
        super().__init__()
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        if not any(p.requires_grad for p in self.cond_stage_model.parameters()):
            raise ConfigError("TextLayout: the text encoder is frozen, so there is nothing to teach: give it freeze: false")
        self.decoder = LayoutDecoder(channels, grid, context_dim, width, heads, depth)
        self.caption_key, self.latent_key, self.image_key = caption_key, latent_key, image_key
        self.weight_decay, self.betas, self.scheduler_config = weight_decay, tuple(betas), scheduler_config
        self.learning_rate = 5e-4  # the launcher overwrites it
        if monitor is not None:
            self.monitor = monitor

    def target(self, batch: Mapping[str, Any]) -> Tensor:
        """What is to be predicted: the batch's latents, or its images, averaged over the cells of the grid: (B, C, grid, grid)."""
        if self.latent_key in batch:
            picture = batch[self.latent_key]
        elif self.image_key in batch:
            picture = batch[self.image_key].movedim(-1, 1)
        else:
            raise ConfigError(f"TextLayout: a batch has neither {self.latent_key!r} nor {self.image_key!r}, but {', '.join(sorted(batch))}")
        channels, grid = self.decoder.out[-1].out_features, self.decoder.grid
        if picture.shape[1] != channels or picture.shape[2] % grid or picture.shape[3] % grid:
            raise ConfigError(
                f"TextLayout: pictures of shape {tuple(picture.shape[1:])} (C, H, W) fit neither channels: {channels} nor grid: {grid}: "
                "channels must be equal, and grid divide the sides"
            )
        return F.adaptive_avg_pool2d(picture.float(), grid)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """B texts -> (B, C, grid, grid), in units of the targets' standard deviation."""
        return self.decoder(self.cond_stage_model.encode(list(captions)))

    def _loss(self, batch: Mapping[str, Any]) -> Tensor:
        target = self.target(batch)
        return F.mse_loss(self(batch[self.caption_key]).float(), target / target.std())

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch; logs train/loss."""
        loss = self._loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch[self.caption_key]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Logs val/loss."""
        self.log("val/loss", self._loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch[self.caption_key]))

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate follows `scheduler_config` step by step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        fused = self.device.type == "cpu" or None  # one pass over the large token embedding instead of ten
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay, fused=fused)
        return with_schedule(optimizer, self.scheduler_config)
