"""Files of textual inversion: read as A1111, diffusers and the original write them, put into a model, written as .safetensors.

    A1111, original   .pt: {"string_to_param": {"*": (n, D)}, "name": ..., ...}; .safetensors: {"emb_params": (n, D)}
    diffusers         .bin, .safetensors: {"<word>": (n, D) or (D,)}
    SDXL              {"clip_l": (n, 768), "clip_g": (n, 1280)}

The word is the one that was asked for, else the one in the file, else the file's name. Pickles are read by PyTorch's restricted
unpickler only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.inference.checkpoint import read_metadata, save_weights
from ldm.inference.weights.files import check_tensors, file_kind, read_pickle, read_tensors
from ldm.modules.textual_inversion import add_word, text_encoders, token_table
from ldm.util import CheckpointError, UserError

log = logging.getLogger(__name__)

_GENERIC = ("*", "emb_params", "clip_l", "clip_g")  # names that are no words
WORD = "word"  # in the header of what we write


@dataclass(frozen=True)
class Embedding:
    """A learnt word."""

    word: str
    vectors: tuple[Tensor, ...]  # (n, D) for each text encoder, in their order

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each."""
        return tuple(one.shape[1] for one in self.vectors)


def read_embedding(path: str | Path, word: str | None = None) -> Embedding:
    """The word in a file, under the name `word` if one is given. Raises CheckpointError, one line, for a file of another kind."""
    path = Path(path)
    if file_kind(path) == "safetensors":
        found, said = read_tensors(path), read_metadata(path).get(WORD)
    else:
        found, said = _read_pickle(path), None
    known = set(found) == {"clip_l", "clip_g"} or len(found) == 1
    vectors = tuple(torch.atleast_2d(found[key]) for key in sorted(found, key=lambda key: key == "clip_g"))
    if not known or any(one.ndim != 2 or not one.is_floating_point() for one in vectors):
        shown = ", ".join(f"{key} {list(value.shape)}" for key, value in list(found.items())[:3])
        raise CheckpointError(f"{path} is no embedding of a word: it holds {len(found)} tensors ({shown}); name a LoRA by --lora")
    own = next((key for key in found if key not in _GENERIC), said)
    return Embedding(word or own or path.stem, vectors)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    content: Any = read_pickle(path, allowed=(torch.nn.ParameterDict,))
    content = content.get("string_to_param", content)
    if isinstance(content, torch.nn.ParameterDict):
        content = vars(content)["_parameters"]
    tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{path} is no embedding of a word: it holds no vectors")
    check_tensors(path, tensors)
    return tensors


def add_embeddings(model: Any, specs: Sequence[tuple[str | Path, str | None]]) -> list[str]:
    """Teach a model the words in files, (file, word or None) each; gives the words. Raises CheckpointError for one that does not fit."""
    encoders = text_encoders(model) if specs else []
    words = []
    for path, word in specs:
        embedding = read_embedding(path, word)
        widths = tuple(token_table(encoder).embedding_dim for encoder in encoders)
        if widths == embedding.widths[1:] == (1280,):  # SDXL's refiner has the second text encoder only
            embedding = Embedding(embedding.word, embedding.vectors[1:])
        if embedding.widths != widths:
            made, reads = (" and ".join(map(str, sizes)) for sizes in (embedding.widths, widths))
            raise CheckpointError(
                f"{path} has vectors of width {made}, and this model's text encoder reads {reads} (768 is Stable Diffusion 1, 1024 is 2, "
                "768 and 1280 is XL): draw with the kind of model that it was made for"
            )
        for encoder, vectors in zip(encoders, embedding.vectors, strict=True):
            try:
                add_word(encoder, embedding.word, vectors)
            except UserError as error:
                raise CheckpointError(f"{path}: {error}") from None
        log.info("%s: the word %r, %d vectors", path, embedding.word, len(embedding.vectors[0]))
        words.append(embedding.word)
    return words


def write_embedding(path: str | Path, embedding: Embedding, metadata: Mapping[str, Any] | None = None, overwrite: bool = False) -> Path:
    """A .safetensors file that A1111, ComfyUI and diffusers read too: the word's vectors under the word, or SDXL's two under theirs."""
    names = (embedding.word,) if len(embedding.vectors) == 1 else ("clip_l", "clip_g")
    tensors = dict(zip(names, embedding.vectors, strict=True))
    return save_weights(tensors, path, metadata={WORD: embedding.word, **(metadata or {})}, overwrite=overwrite)
