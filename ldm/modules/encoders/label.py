"""Class labels as conditioning."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.util import ConfigError


class ClassEmbedder(nn.Module):
    """One learnt vector a class: `{key: int64 (B,)} -> (B, 1, D)`.

    With `ucg_rate` > 0 that share of the labels becomes the last class, which then stands for "no class" (classifier-free guidance,
    arXiv:2207.12598); the draw happens in every mode unless `disable_dropout` is given.
    """

    def __init__(
        self,
        embed_dim: int,
        n_classes: int = 1000,  # with guidance: one more than the data has
        key: str = "class",  # batch entry with the labels
        ucg_rate: float = 0.0,  # share of labels replaced by class n_classes - 1
    ) -> None:
        super().__init__()
        if not 0.0 <= ucg_rate <= 1.0:
            raise ConfigError(f"ClassEmbedder: ucg_rate {ucg_rate} is not a share between 0 and 1")
        self.key, self.n_classes, self.ucg_rate = key, n_classes, ucg_rate
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, batch: Mapping[str, Tensor], key: str | None = None, disable_dropout: bool = False) -> Tensor:
        """Labels under `key` (default: the key of the constructor), (B,) -> (B, 1, D)."""
        label = batch[key or self.key][:, None]  # (B, 1)
        if self.ucg_rate > 0 and not disable_dropout:
            drop = torch.bernoulli(torch.full(label.shape, self.ucg_rate, device=label.device)).bool()
            # Drawn as "dropped", in float32: the same random numbers as Stability's code.
            label = label.masked_fill(drop, self.n_classes - 1)
        return self.embedding(label)

    def encode(self, batch: Mapping[str, Tensor]) -> Tensor:
        """As calling the module."""
        return self(batch)

    def get_unconditional_conditioning(self, bs: int, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """A batch entry of `bs` labels "no class"."""
        device = self.embedding.weight.device if device is None else device
        return {self.key: torch.full((bs,), self.n_classes - 1, dtype=torch.int64, device=device)}
