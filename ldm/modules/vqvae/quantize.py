"""Vector quantisation against a learnt codebook, with a straight-through gradient.

Sources: VQ-VAE (arXiv:1711.00937), VQGAN (arXiv:2012.09841).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import ConfigError


class VectorQuantizer2(nn.Module):
    """Replaces every vector of a feature map by its nearest codebook entry.

    `remap` is a .npy file with the indices in use: indices are then given among these, and one that is not in use becomes
    `unknown_index` ("random", "extra" for one class more, or a number).
    """

    def __init__(
        self,
        n_e: int,  # codebook entries
        e_dim: int,  # their dimension
        beta: float,  # weight of one of the two loss terms, see `legacy`
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,  # indices as (B, H, W) rather than flat
        legacy: bool = True,  # beta weighs the codebook term, as in published training runs; the papers' beta weighs the commitment
    ) -> None:
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.sane_index_shape, self.unknown_index = sane_index_shape, unknown_index
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.remap, self.re_embed = remap, n_e
        if remap is not None:
            self._read_remap(remap)

    def _read_remap(self, path: str) -> None:
        import numpy as np

        self.register_buffer("used", torch.from_numpy(np.load(path, allow_pickle=False)))
        self.re_embed = self.used.shape[0]
        if self.unknown_index == "extra":
            self.unknown_index, self.re_embed = self.re_embed, self.re_embed + 1
        elif self.unknown_index != "random" and not isinstance(self.unknown_index, int):
            raise ConfigError(f"unknown_index={self.unknown_index!r}: use random, extra or a number")

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Codebook indices (B, ...) as positions among the used ones."""
        used = self.used.to(inds)
        match = inds[..., None] == used  # (B, ..., U)
        new, unknown = match.int().argmax(dim=-1), ~match.any(dim=-1)
        if self.unknown_index == "random":
            return torch.where(unknown, torch.randint_like(new, self.re_embed), new)
        return new.masked_fill(unknown, self.unknown_index)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Inverse of `remap_to_used`; the extra class becomes the first used entry."""
        used = self.used.to(inds)
        return used[torch.where(inds >= used.shape[0], 0, inds)]

    def _nearest(self, vectors: Tensor) -> Tensor:
        """Index of the codebook entry closest to each row, by |z|^2 + |e|^2 - 2 z e; ties go to the first."""
        codes = self.embedding.weight
        distances = vectors.square().sum(dim=1, keepdim=True) + codes.square().sum(dim=1) - 2.0 * vectors @ codes.t()
        return distances.argmin(dim=1)

    def forward(
        self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False
    ) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """z (B, C, H, W) -> quantised z, loss (scalar), (None, None, indices). The other arguments exist for the Gumbel interface."""
        if temp not in (None, 1.0) or rescale_logits or return_logits:
            raise ValueError("VectorQuantizer2 has no logits: temp, rescale_logits and return_logits must stay at their defaults")
        channels_last = z.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
        with torch.no_grad():
            indices = self._nearest(channels_last.view(-1, self.e_dim))
        quantized = self.embedding(indices).view(channels_last.shape)
        commitment = F.mse_loss(channels_last, quantized.detach())
        codebook = F.mse_loss(quantized, channels_last.detach())
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        straight_through = channels_last + (quantized - channels_last).detach()
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(z.shape[0], -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(z.shape[0], *z.shape[2:])
        return straight_through.permute(0, 3, 1, 2).contiguous(), loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: Sequence[int] | None) -> Any:
        """Entries of flat `indices`: (N, C), or with shape (B, H, W, C) as a feature map (B, C, H, W)."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices).reshape(-1)
        entries = self.embedding(indices)
        return entries if shape is None else entries.view(tuple(shape)).permute(0, 3, 1, 2).contiguous()
