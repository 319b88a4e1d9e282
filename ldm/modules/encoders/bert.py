"""The trainable text encoders of latent diffusion: a transformer over BERT's word pieces, or over any token ids.

Owns: architectures and word-piece tokenisation; no weights and no vocabulary. The weights come with the checkpoint of the whole model.
The vocabulary (bert-base-uncased's) is read when the first text is: from `vocab`, from the environment variable LDM_BERT_VOCAB,
or from the local cache of huggingface_hub. Nothing is downloaded. Source: BERT (arXiv:1810.04805).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.modules.encoders.text import AbstractEncoder
from ldm.modules.x_transformer import Encoder, TransformerWrapper
from ldm.util import ConfigError, UserError

if TYPE_CHECKING:
    from tokenizers.implementations import BertWordPieceTokenizer

log = logging.getLogger(__name__)

VOCAB_VARIABLE = "LDM_BERT_VOCAB"
VOCAB_SIZE = 30522  # of bert-base-uncased
_CACHED_AS = ("google-bert/bert-base-uncased", "bert-base-uncased")
_HOW = f"give its vocab.txt, or the folder it is in, as the parameter `vocab` or in the environment variable {VOCAB_VARIABLE}"
_MAX_CUT_WARNINGS = 50  # then a training on long captions stays readable


class TransformerEmbedder(AbstractEncoder):
    """Token ids (B, L) -> features (B, L, n_embed)."""

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int,
        max_seq_len: int = 77,
        device: str | None = None,  # accepted for old configs; the ids follow the weights
    ) -> None:
        super().__init__()
        self.transformer = _transformer(n_embed, n_layer, vocab_size, max_seq_len)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (B, L) -> features (B, L, n_embed)."""
        return self.transformer(tokens.to(self.transformer.norm.weight.device), return_embeddings=True)

    def encode(self, x: Tensor) -> Tensor:
        """As calling the module."""
        return self(x)


class BERTTokenizer(AbstractEncoder):
    """Texts to ids (B, max_length) of word pieces: [CLS], the text in lower case, [SEP], padding.

    With `vq_interface`, `encode` answers in the form of a quantiser, with the ids in the place of the indices.
    """

    def __init__(
        self,
        device: str | None = None,  # of the ids; None: the CPU
        vq_interface: bool = True,
        max_length: int = 77,  # ids a text, [CLS] and [SEP] included
        *,
        vocab: str | None = None,  # vocab.txt of bert-base-uncased, or its folder; see the head of this file
        vocab_size: int | None = None,  # entries it must have; None: any number
    ) -> None:
        super().__init__()
        if max_length < 3:
            raise ConfigError(f"max_length {max_length} leaves no room for a word between [CLS] and [SEP]: use 3 or more")
        self.ids_device, self.vq_interface, self.max_length = device or "cpu", vq_interface, max_length
        self.vocab, self.vocab_size = vocab, vocab_size
        self._pieces: BertWordPieceTokenizer | None = None
        self._cut_reported = 0

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """B texts -> ids (B, max_length); raises UserError when no vocabulary is found."""
        rows = [self._row(one) for one in ([text] if isinstance(text, str) else text)]
        return torch.tensor(rows, dtype=torch.int64, device=self.ids_device).reshape(len(rows), self.max_length)

    @torch.no_grad()
    def encode(self, text: str | Sequence[str]) -> Any:
        """Ids (B, max_length), with `vq_interface` inside (None, None, [None, None, ids])."""
        ids = self(text)
        return (None, None, [None, None, ids]) if self.vq_interface else ids

    def decode(self, text: Any) -> Any:
        """`text` itself: there is nothing to undo."""
        return text

    def _row(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise UserError(f"a prompt must be text, not {type(text).__name__}")
        if self._pieces is None:
            self._pieces = _read_vocabulary(_find_vocabulary(self.vocab), self.vocab_size)
        ids = self._pieces.encode(text).ids
        if len(ids) > self.max_length:
            self._report_cut(text, ids[self.max_length - 1 : -1])
            ids = [*ids[: self.max_length - 1], ids[-1]]  # [SEP] stays
        return ids + [self._pieces.token_to_id("[PAD]")] * (self.max_length - len(ids))

    def _report_cut(self, text: str, lost: list[int]) -> None:
        if self._cut_reported < _MAX_CUT_WARNINGS:
            self._cut_reported += 1
            log.warning("a prompt is longer than %d tokens; cut off: %r", self.max_length - 2, self._pieces.decode(lost))


class BERTEmbedder(AbstractEncoder):
    """Texts (or, without the tokeniser, ids) -> features (B, L, n_embed); trained with the diffusion model."""

    def __init__(
        self,
        n_embed: int,
        n_layer: int,
        vocab_size: int = VOCAB_SIZE,
        max_seq_len: int = 77,
        device: str | None = None,  # accepted for old configs; the ids follow the weights
        use_tokenizer: bool = True,  # False: the input is ids already
        embedding_dropout: float = 0.0,
        *,
        vocab: str | None = None,  # as for BERTTokenizer
    ) -> None:
        super().__init__()
        self.use_tknz_fn = use_tokenizer
        if use_tokenizer:
            self.tknz_fn = BERTTokenizer(vq_interface=False, max_length=max_seq_len, vocab=vocab, vocab_size=vocab_size)
        self.transformer = _transformer(n_embed, n_layer, vocab_size, max_seq_len, embedding_dropout)

    def forward(self, text: Any) -> Tensor:
        """B texts, or ids (B, L) -> features (B, L, n_embed)."""
        tokens = self.tknz_fn(text) if self.use_tknz_fn else text
        return self.transformer(tokens.to(self.transformer.norm.weight.device), return_embeddings=True)

    def encode(self, text: Any) -> Tensor:
        """As calling the module."""
        return self(text)


def _transformer(dim: int, depth: int, vocab_size: int, max_seq_len: int, dropout: float = 0.0) -> TransformerWrapper:
    layers = Encoder(dim=dim, depth=depth)
    transformer = TransformerWrapper(num_tokens=vocab_size, max_seq_len=max_seq_len, attn_layers=layers, emb_dropout=dropout)
    # The features do not depend on it, and distributed training stops at parameters that never get a gradient.
    transformer.to_logits.requires_grad_(False)
    return transformer


def _find_vocabulary(given: str | None) -> Path:
    """The file `vocab.txt` to read; UserError when there is none."""
    place = given or os.environ.get(VOCAB_VARIABLE)
    if place:
        path = Path(place).expanduser()
        path = path / "vocab.txt" if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"there is no vocabulary at {path}, which {'`vocab`' if given else VOCAB_VARIABLE} names: {_HOW}")
        return path
    from huggingface_hub import try_to_load_from_cache

    for name in _CACHED_AS:
        cached = try_to_load_from_cache(name, "vocab.txt")
        if isinstance(cached, str):
            return Path(cached)
    raise UserError(f"this model reads text with the vocabulary of bert-base-uncased, which is not on this machine: {_HOW}")


def _read_vocabulary(path: Path, size: int | None) -> BertWordPieceTokenizer:
    """The tokeniser of a `vocab.txt`: one piece a line."""
    from tokenizers.implementations import BertWordPieceTokenizer

    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the vocabulary {path}: {error}; {_HOW}") from error
    missing = [mark for mark in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if mark not in pieces]
    if missing:
        raise UserError(f"{path} is not a vocabulary of BERT: it has no {', '.join(missing)}; {_HOW}")
    if size is not None and len(pieces) != size:
        raise UserError(f"{path} has {len(pieces)} entries, and the model was made for {size}; {_HOW}")
    return BertWordPieceTokenizer(vocab=str(path), lowercase=True)
