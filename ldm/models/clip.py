"""A CLIP trained from scratch on (image, caption) pairs (arXiv:2103.00020).

Its text tower conditions a diffusion model (`FrozenOpenCLIPEmbedder` reads the keys `model.*`), its image tower scores prompt fidelity
and drives the safety check. Knows no dataset: a batch is `image` (B, H, W, 3) in [-1, 1] and `caption`, a list of B texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.encoders.clip_towers import CLIP
from ldm.modules.encoders.tokenizers import END, ClipTokenizer
from ldm.modules.rates import with_schedule
from ldm.util import UserError

# Mean and standard deviation of RGB in [0, 1] that OpenAI's CLIP was trained with.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_LOGIT_SCALE = math.log(100)


def contrastive_targets(ids: Tensor) -> Tensor:
    """(B, L) token ids -> (B, B) float: row i spreads 1 over all captions equal to caption i.

    The same caption often comes twice in a batch; taking its double for a negative would punish a right answer.
    """
    same = (ids[:, None] == ids[None, :]).all(dim=-1).float()
    return same / same.sum(dim=1, keepdim=True)


def info_nce(image: Tensor, text: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
    """Symmetric InfoNCE of normalised features (B, D): mean KL divergence between targets and softmax, both ways.

    Without equal captions this is the cross entropy of the CLIP paper; with them its lowest value is still 0. `targets` is symmetric.
    """
    logits = scale * image @ text.T  # (B images, B texts)
    both = (F.log_softmax(logits.float(), dim=1), F.log_softmax(logits.float().T, dim=1))
    return sum(F.kl_div(log_p, targets, reduction="batchmean") for log_p in both) / 2


def retrieval_accuracy(image: Tensor, text: Tensor, targets: Tensor) -> Tensor:
    """Share of images whose nearest caption is theirs, and of captions whose nearest image is theirs, averaged."""
    similarity = image @ text.T
    rows = torch.arange(len(similarity), device=similarity.device)
    hits = [targets[rows, s.argmax(dim=1)] > 0 for s in (similarity, similarity.T)]
    return torch.cat(hits).float().mean()


class ContrastiveCLIP(pl.LightningModule):
    """CLIP with its training loop. State-dict keys are `model.` + open_clip's."""

    def __init__(
        self,
        arch: str | Mapping[str, Any],  # open_clip model config: a name, or {embed_dim, vision_cfg, text_cfg}
        image_key: str = "image",  # batch entry with pixels (B, H, W, 3) in [-1, 1]
        caption_key: str = "caption",  # batch entry with B texts
        weight_decay: float = 0.1,  # of matrices only; biases, norms, embeddings of positions and the scale get none
        betas: Sequence[float] = (0.9, 0.98),
        scheduler_config: Mapping[str, Any] | None = None,  # e.g. ldm.lr_scheduler.LambdaWarmUpCosineScheduler
        monitor: str | None = None,  # metric by which the launcher keeps the best checkpoint
    ) -> None:
        super().__init__()
        self.model = CLIP(arch)
        self.image_key, self.caption_key = image_key, caption_key
        self.weight_decay, self.betas = weight_decay, tuple(betas)
        self.scheduler_config = scheduler_config
        self.learning_rate = 5e-4  # the launcher overwrites it
        self.tokenizer = ClipTokenizer("open_clip", self.model.context_length)
        if monitor is not None:
            self.monitor = monitor

    @property
    def image_size(self) -> int:
        """Side in pixels of what the image tower sees."""
        return self.model.visual.config.image_size

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], any size -> (B, 3, S, S), resized whole (nothing is cropped away) and normalised for CLIP."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images must be (B, 3, H, W) in [-1, 1]; got the shape {tuple(images.shape)}")
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
        return ((images + 1) / 2 - mean) / std

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, E) of length 1."""
        pixels = self.preprocess(images.to(self.device)).to(self.model.visual.conv1.weight.dtype)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """B texts -> (B, E) of length 1."""
        return self._encode_ids(self.tokenizer(texts).to(self.device))

    def _encode_ids(self, ids: Tensor) -> Tensor:
        """Nothing behind the last end mark reaches the features, so it is left out: captions are much shorter than the context."""
        ids = ids[:, : int((ids == END).int().argmax(dim=1).max()) + 1]  # (B, L)
        return F.normalize(self.model.encode_text(ids).float(), dim=-1)

    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosine similarities (B images, B texts)."""
        return self.encode_image(images) @ self.encode_text(texts).T

    def _features(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Image and text features and targets; across processes, every feature of the whole step is a candidate."""
        images = batch[self.image_key].movedim(-1, 1)  # (B, H, W, 3) -> (B, 3, H, W)
        ids = self.tokenizer(batch[self.caption_key]).to(self.device)
        image, text = self.encode_image(images), self._encode_ids(ids)
        if self.trainer.world_size > 1:
            image, text = (self.all_gather(x, sync_grads=True).flatten(0, 1) for x in (image, text))
            ids = self.all_gather(ids).flatten(0, 1)
        return image, text, contrastive_targets(ids)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Contrastive loss of one batch; logs train/loss and train/logit_scale."""
        image, text, targets = self._features(batch)
        loss = info_nce(image, text, self.model.logit_scale.exp(), targets)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(image))
        self.log("train/logit_scale", self.model.logit_scale.detach().exp(), batch_size=len(image))
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        """Keep the scale of the logits between 1 and 100, as the CLIP paper does."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Logs val/loss and val/accuracy (top-1 retrieval within the batch)."""
        image, text, targets = self._features(batch)
        loss = info_nce(image, text, self.model.logit_scale.exp(), targets)
        metrics = {"val/loss": loss, "val/accuracy": retrieval_accuracy(image, text, targets)}
        self.log_dict(metrics, prog_bar=True, sync_dist=True, batch_size=len(image))

    def configure_optimizers(self) -> Any:
        """AdamW, weight decay on matrices only; the learning rate follows `scheduler_config` step by step."""
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        decays = {n for n, p in named if p.ndim >= 2 and not n.endswith("positional_embedding")}
        groups = [
            {"params": [p for n, p in named if n in decays], "weight_decay": self.weight_decay},
            {"params": [p for n, p in named if n not in decays], "weight_decay": 0.0},
        ]
        fused = self.device.type == "cpu" or None  # one pass over the large token embedding instead of ten
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=1e-6, fused=fused)
        return with_schedule(optimizer, self.scheduler_config)
