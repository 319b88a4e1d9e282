"""Files of learnt words as A1111, diffusers and the original write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.inference.weights.embedding_files import Embedding, add_embeddings, read_embedding, write_embedding
from ldm.modules.encoders.conditioner import FrozenOpenCLIPEmbedder2
from ldm.modules.encoders.text import FrozenOpenCLIPEmbedder
from ldm.modules.textual_inversion import token_table
from ldm.util import CheckpointError

VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


def tower(width: int) -> dict[str, Any]:
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 2, "layers": 1}
    return {"embed_dim": 16, "text_cfg": text}


def a1111(parameters: Any) -> dict[str, Any]:
    """With what that program keeps beside the vectors."""
    return {
        "string_to_token": {"*": 265},
        "string_to_param": parameters,
        "name": "other",
        "step": 500,
        "sd_checkpoint": "ab12",
        "sd_checkpoint_name": "v1",
    }


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("own-name.pt", a1111({"*": VECTORS}), "own-name"),
        ("old.pt", a1111(torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTORS)})), "old"),
        ("emb.safetensors", {"emb_params": VECTORS}, "emb"),
        ("learned_embeds.bin", {"<cat-toy>": VECTORS}, "<cat-toy>"),
        ("learned_embeds.safetensors", {"<cat-toy>": VECTORS}, "<cat-toy>"),
        ("one.bin", {"<cat-toy>": VECTORS[0]}, "<cat-toy>"),
    ],
)
def test_every_form_is_read(tmp_path, name, content, word):
    file = tmp_path / name
    save_file(content, file) if name.endswith(".safetensors") else torch.save(content, file)
    found = read_embedding(file)
    assert found.word == word and torch.equal(found.vectors[0], VECTORS[:1] if name == "one.bin" else VECTORS)
    assert read_embedding(file, "<mine>").word == "<mine>"


class Harmful:
    def __reduce__(self) -> tuple:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "bad.pt",
            {"string_to_param": Harmful()},
            r"is refused: it asks to run \w+.system, which weights never need; nothing of it was run",
        ),
        ("empty.pt", {"step": 3}, "holds no vectors"),
        ("many.bin", {"a": VECTORS, "b": VECTORS, "c": VECTORS}, r"is no embedding of a word: it holds 3 tensors \(a \[3, 32\]"),
        ("lora.safetensors", {"x.lora_up.weight": VECTORS, "x.lora_down.weight": VECTORS + 1}, "name a LoRA by --lora"),
        ("numbers.bin", {"<a>": torch.ones(3, 32, dtype=torch.int64)}, "is no embedding of a word"),
        ("list.bin", [VECTORS], "holds list, not a dictionary"),
        ("huge.bin", {"<a>": torch.zeros(1).expand(10**6, 32)}, "claim 128,000,000 bytes"),
        ("empty.bin", {"<a>": torch.empty(3, 32, device="meta")}, "without values"),
    ],
)
def test_what_is_no_embedding(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    save_file(content, name) if name.endswith(".safetensors") else torch.save(content, name)
    with pytest.raises(CheckpointError, match=message):
        read_embedding(name)
    assert not Path("harmed").exists()


def test_a_file_that_is_cut_short(tmp_path):
    torch.save({"<a>": VECTORS}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:400])
    with pytest.raises(CheckpointError, match="is cut short"):
        read_embedding(tmp_path / "a.pt")


def test_what_is_written_comes_back(tmp_path):
    one = write_embedding(tmp_path / "one.safetensors", Embedding("<mine>", (VECTORS,)))
    assert set(load_file(one)) == {"<mine>"}, "the form that A1111 and diffusers read"
    found = read_embedding(one)
    assert found.word == "<mine>" and torch.equal(found.vectors[0], VECTORS)
    two = write_embedding(tmp_path / "two.safetensors", Embedding("<mine>", (VECTORS, torch.ones(3, 48))))
    assert set(load_file(two)) == {"clip_l", "clip_g"}
    assert read_embedding(two).word == "<mine>" and read_embedding(two).widths == (32, 48)


class Model(torch.nn.Module):
    """As much of SDXL as a word needs."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.conditioner = torch.nn.ModuleList(
            FrozenOpenCLIPEmbedder(tower(width)) if i == 0 else FrozenOpenCLIPEmbedder2(tower(width)) for i, width in enumerate(widths)
        )


def test_a_word_of_two_text_encoders(tmp_path):
    file = write_embedding(tmp_path / "two.safetensors", Embedding("<mine>", (VECTORS, torch.ones(3, 48))))
    model = Model(32, 48)
    assert add_embeddings(model, [(file, None), (file, "<other>")]) == ["<mine>", "<other>"]
    assert [tuple(one.learnt[1].shape) for one in map(token_table, model.conditioner)] == [(3, 32), (3, 48)]
    with pytest.raises(CheckpointError, match="is learnt already"):
        add_embeddings(model, [(file, "<mine>")])
    with pytest.raises(CheckpointError, match="vectors of width 32 and 48, and this model's text encoder reads 32 "):
        add_embeddings(Model(32), [(file, None)])
    assert add_embeddings(Model(), []) == []
