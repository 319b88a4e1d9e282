"""The token transformer behind BERTEmbedder and TransformerEmbedder: embeddings, pre-norm layers, a final norm, logits.

Owns the state-dict names of the published text-to-image checkpoints of latent diffusion (`token_emb`, `pos_emb.emb`,
`attn_layers.layers.N.{0,1}`, `norm`, `to_logits`). Sources: Vaswani et al. (arXiv:1706.03762), pre-norm after Xiong et al.
(arXiv:2002.04745).

Dims: B batch, L tokens, N heads, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.attention import FeedForward, attention, merge_heads, split_heads
from ldm.util import UserError

_INIT_STD = 0.02  # of the embeddings, as in BERT


class AbsolutePositionalEmbedding(nn.Module):
    """One learnt vector a position."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=_INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors (1, L, D) of the positions of x (B, L, ...). Raises UserError if x has more positions than were learnt."""
        length, room = x.shape[1], self.emb.num_embeddings
        if length > room:
            raise UserError(f"a sequence of {length} tokens came, and the transformer has {room} positions: cut it or raise max_seq_len")
        return self.emb(torch.arange(length, device=x.device))[None]


class SelfAttention(nn.Module):
    """Multi-head self-attention; the heads need not add up to `dim`."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * dim_head
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D); `bias` is added to the scores, broadcastable to (B, N, L, L)."""
        q, k, v = (split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        bias = None if bias is None else bias.to(q.dtype)
        return self.to_out(merge_heads(attention(q, k, v, bias)))


class AttentionLayers(nn.Module):
    """`depth` times self-attention and feed-forward, each behind a LayerNorm and with a residual connection."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int = 8,
        causal: bool = False,  # a token sees only itself and those before it
        attn_dim_head: int = 64,
        ff_mult: int = 4,
        ff_glu: bool = False,
        ff_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.causal = dim, causal
        self.layers = nn.ModuleList()
        for _ in range(depth):
            for block in (
                SelfAttention(dim, heads, attn_dim_head),
                FeedForward(dim, mult=ff_mult, glu=ff_glu, dropout=ff_dropout),
            ):
                self.layers.append(nn.ModuleList([nn.LayerNorm(dim), block]))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D) -> (B, L, D), before the final norm; `mask` (B, L) is True where there is a token."""
        bias = self._bias(x, mask)
        for norm, block in self.layers:
            x = x + (block(norm(x), bias) if isinstance(block, SelfAttention) else block(norm(x)))
        return x

    def _bias(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """0 where a query sees a key, else the lowest number: a row that sees nothing, such as padding, then averages over all."""
        visible = None if mask is None else mask[:, None, :, None] & mask[:, None, None, :]  # (B, 1, L, L)
        if self.causal:
            past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            visible = past if visible is None else visible & past
        if visible is None:
            return None
        return torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, torch.finfo(x.dtype).min)


class Encoder(AttentionLayers):
    """Layers in which every token sees every other."""

    def __init__(self, dim: int, depth: int, heads: int = 8, **options: Any) -> None:
        super().__init__(dim, depth, heads, causal=False, **options)


class Decoder(AttentionLayers):
    """Layers in which a token sees only itself and those before it."""

    def __init__(self, dim: int, depth: int, heads: int = 8, **options: Any) -> None:
        super().__init__(dim, depth, heads, causal=True, **options)


class TransformerWrapper(nn.Module):
    """Token ids to features, or to logits over the vocabulary."""

    def __init__(
        self,
        *,
        num_tokens: int,  # size of the vocabulary
        max_seq_len: int,
        attn_layers: AttentionLayers,
        emb_dim: int | None = None,  # of the embeddings; None: as the layers
        emb_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim = attn_layers.dim
        emb_dim = dim if emb_dim is None else emb_dim
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, emb_dim)
        nn.init.normal_(self.token_emb.weight, std=_INIT_STD)
        self.pos_emb = AbsolutePositionalEmbedding(emb_dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.project_emb = nn.Linear(emb_dim, dim) if emb_dim != dim else nn.Identity()
        self.attn_layers = attn_layers
        self.norm = nn.LayerNorm(dim)
        self.to_logits = nn.Linear(dim, num_tokens)

    def forward(self, x: Tensor, return_embeddings: bool = False, mask: Tensor | None = None) -> Tensor:
        """Ids (B, L) -> logits (B, L, num_tokens), or features (B, L, D); `mask` (B, L) is True where there is a token."""
        x = self.emb_dropout(self.token_emb(x) + self.pos_emb(x))
        x = self.norm(self.attn_layers(self.project_emb(x), mask))
        return x if return_embeddings else self.to_logits(x)
