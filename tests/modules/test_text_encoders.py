"""Tokenisers against stored ids, text encoders against open_clip and transformers, published names, and no network anywhere."""

from __future__ import annotations

import logging
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ldm.inference.checkpoint import load_weights, read_state_dict, save_weights
from ldm.modules.encoders import conditioner, text, tokenizers
from ldm.modules.encoders.clip_towers import TextTower, read_arch
from ldm.modules.encoders.modules import (
    AbstractEncoder,
    ClassEmbedder,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    IdentityEncoder,
)
from ldm.modules.encoders.tokenizers import ClipTokenizer, hf_ids, open_clip_ids
from ldm.util import CheckpointError, ConfigError, UserError
from tests.reference_rule import fill

TINY = {"embed_dim": 16, "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}}
TINY_OPENAI = "openai/tiny"
ROWS = [0, 1, 4, 9, 10, 40, 76]  # of the 77 positions, as stored
PROMPTS = [
    "a photograph of an astronaut riding a horse",
    "",
    "A painting of a virus monster playing guitar",
    "it's a dog's life -- isn't it? (50% off!!), #1 @home",
    "Ein Mädchen im Café, façade à la carte, naïve coöperation",
    "1girl, 4k, 8K, trending on ArtStation, f/2.8, 35mm, (masterpiece:1.2)",
    "  multiple   spaces\tand\nnewlines   everywhere ",
    "a cat 🐱 and 日本語のテキスト in one prompt",
    "Tom &amp; Jerry &lt;3 &quot;cheese&quot;",
    "word " * 90,
    "supercalifragilisticexpialidocious hippopotomonstrosesquippedaliophobia",
    "<|endoftext|> literal special <|startoftext|> tokens",
    "I'VE SEEN THINGS YOU'LL never believe, we're they'd don't",
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a socket fails."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def tiny_openai(monkeypatch: pytest.MonkeyPatch) -> str:
    """A small architecture under a name of its own."""
    monkeypatch.setitem(text._OPENAI_TEXT, TINY_OPENAI, (32, 3, 2))
    return TINY_OPENAI


# ---------------------------------------------------------------------------------------------------------- tokenisers
def test_ids_are_the_stored_ones(reference: Callable, offline: None) -> None:
    stored = reference("g01_tokens")
    stored.check_all({"hf_ids": hf_ids(PROMPTS), "open_clip_ids": open_clip_ids(PROMPTS)})


def test_padding_differs_between_the_dialects() -> None:
    assert hf_ids("a cat")[0, :6].tolist() == [49406, 320, 2368, 49407, 49407, 49407]
    assert open_clip_ids("a cat")[0, :6].tolist() == [49406, 320, 2368, 49407, 0, 0]


def test_open_clip_dialect_is_open_clips_for_any_text() -> None:
    import open_clip

    rng = random.Random(0)
    letters = "aAbB zé日🐱'&;<>|_ \t\n1２ßİ.#!`\u0301\x00\xa0"
    texts = ["".join(rng.choices(letters, k=rng.randrange(60))) for _ in range(300)]
    texts += [t + s for t, s in zip(texts, ["<start_of_text>", "<END_of_text>x", "&amp;lt;", "&quot;"], strict=False)]
    assert torch.equal(open_clip_ids(texts), open_clip.tokenize(texts))


def test_ids_stay_on_the_cpu_below_the_meta_device() -> None:
    with torch.device("meta"):
        assert open_clip_ids(["a"]).device.type == "cpu"


def test_tokeniser_errors_and_edges() -> None:
    assert ClipTokenizer("open_clip", 8)([]).shape == (0, 8)
    assert ClipTokenizer("open_clip", 6).cut("a red café 🐱 on a white background") == "on a white background"
    assert ClipTokenizer("hf", 77).cut("short") == ""
    with pytest.raises(ConfigError, match="'hf' or 'open_clip'"):
        ClipTokenizer("bert")
    with pytest.raises(ConfigError, match="3 or more"):
        ClipTokenizer("hf", 2)
    with pytest.raises(UserError, match="must be text, not int"):
        hf_ids([3])


# ---------------------------------------------------------------------------------------------------------------- SD 2.x
@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize(("layer", "skip"), [("last", 0), ("penultimate", 1)])
def test_open_clip_encoder_is_open_clip(quick_gelu: bool, layer: str, skip: int) -> None:
    import open_clip

    arch = {**TINY, "quick_gelu": quick_gelu, "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}}
    ours = fill(FrozenOpenCLIPEmbedder(arch, max_length=12, layer=layer))
    theirs = open_clip.model.CLIP(**arch)
    missing = theirs.load_state_dict(ours.model.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(n.startswith("visual.") for n in missing.missing_keys)
    ids = ours.tokenizer(["a red circle", "two blue stars"])
    with torch.no_grad():
        x = theirs.token_embedding(ids) + theirs.positional_embedding
        for block in theirs.transformer.resblocks[: 3 - skip]:
            x = block(x, attn_mask=theirs.attn_mask)
        torch.testing.assert_close(ours.encode(["a red circle", "two blue stars"]), theirs.ln_final(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.model.encode_text(ids), theirs.encode_text(ids), rtol=1e-4, atol=1e-5)
    assert ours.layer_idx == skip


def test_sd2_keys() -> None:
    with torch.device("meta"):
        encoder = FrozenOpenCLIPEmbedder(arch="ViT-H-14", layer="penultimate", device="cuda")
    shapes = {n: tuple(v.shape) for n, v in encoder.state_dict().items()}
    assert len(shapes) == 6 + 24 * 12
    assert shapes["model.positional_embedding"] == (77, 1024)
    assert shapes["model.text_projection"] == (1024, 1024)
    assert shapes["model.logit_scale"] == ()
    assert shapes["model.token_embedding.weight"] == (49408, 1024)
    assert shapes["model.transformer.resblocks.23.attn.in_proj_weight"] == (3072, 1024)
    assert shapes["model.transformer.resblocks.0.mlp.c_fc.weight"] == (4096, 1024)


def test_a_trainable_encoder_gets_gradients_everywhere_it_says() -> None:
    encoder = FrozenOpenCLIPEmbedder(TINY, max_length=12, freeze=False, layer="penultimate")
    encoder.train()
    assert encoder.training
    encoder.encode(["a red circle"]).sum().backward()
    wanting = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert {n for n, p in encoder.named_parameters() if p.grad is not None} == wanting
    assert not any("resblocks.2" in n for n in wanting), "the last block is not used"


def test_weights_from_a_local_file(tmp_path: Path) -> None:
    source = fill(TextTower(TINY))
    content = {"model." + n: v for n, v in source.state_dict().items()} | {"model.visual.proj": torch.zeros(3, 3)}
    path = save_weights(content, tmp_path / "clip.safetensors")
    encoder = FrozenOpenCLIPEmbedder(TINY, version=str(path), max_length=12)
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in encoder.model.state_dict().items())
    save_weights({"model.visual.proj": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this model: it lacks"):
        FrozenOpenCLIPEmbedder(TINY, version=str(tmp_path / "other.safetensors"), max_length=12)
    with pytest.raises(ConfigError, match="is no file of weights: name the"):  # and not random weights without a word
        FrozenOpenCLIPEmbedder(TINY, version=str(tmp_path), max_length=12)


def test_cut_words_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    encoder = FrozenOpenCLIPEmbedder(TINY, max_length=6)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            encoder.encode(["a red circle on white ground"])
        encoder.encode(["a red circle"])
    assert [r.getMessage() for r in caplog.records] == ["a prompt is longer than 4 tokens; cut off: 'white ground'"]


def test_after_many_cuts_it_is_said_that_no_more_are_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_MAX_CUT_WARNINGS", 2)
    encoder = FrozenOpenCLIPEmbedder(TINY, max_length=3)
    with caplog.at_level(logging.WARNING):
        encoder.encode([f"red {word}" for word in ("circle", "star", "ring", "heart")])
    assert [r.getMessage().rpartition(": ")[2] for r in caplog.records] == [
        "'circle'",
        "'star'",
        "further prompts that are cut are not named",
    ]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layer": "first"}, "last, penultimate"),
        ({"max_length": 99}, "context_length 12"),
        ({"arch": "ViT-H-41"}, "did you mean .*ViT-H-14"),
        ({"arch": "../secret"}, "unknown"),
        ({"arch": {"embed_dim": 3}}, "needs embed_dim and text_cfg"),
        ({"arch": {**TINY, "text_cfg": {**TINY["text_cfg"], "no_causal_mask": True}}}, "no_causal_mask not supported"),
        ({"arch": "roberta-ViT-B-32"}, "hf_model_name"),
        ({"arch": {**TINY, "text_cfg": {**TINY["text_cfg"], "heads": 5}}}, "not a multiple of its 5 heads"),
    ],
)
def test_open_clip_config_errors(kwargs: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message):
        FrozenOpenCLIPEmbedder(**{"arch": TINY, "max_length": 12, **kwargs})


def test_arch_from_omegaconf() -> None:
    from omegaconf import OmegaConf

    assert read_arch(OmegaConf.create(TINY))[1] == TINY


# ---------------------------------------------------------------------------------------------------------------- SD 1.x
def test_sd1_state_dict_has_the_published_names() -> None:
    with torch.device("meta"):
        encoder = FrozenCLIPEmbedder(device="cuda")
    shapes = {n: tuple(v.shape) for n, v in encoder.state_dict().items()}
    assert len(shapes) == 2 + 12 * 16 + 2
    assert all(n.startswith("transformer.text_model.") for n in shapes)
    assert shapes["transformer.text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert shapes["transformer.text_model.encoder.layers.11.mlp.fc1.weight"] == (3072, 768)
    assert not any(b.is_meta for b in encoder.buffers()), "position numbers are in no checkpoint"


@pytest.mark.parametrize("spelling", ["published", "flat"])
@pytest.mark.parametrize("how", ["load_state_dict", "load_weights"])
def test_both_spellings_load(tmp_path: Path, tiny_openai: str, spelling: str, how: str) -> None:
    source, target = nn.Module(), nn.Module()
    source.cond_stage_model, target.cond_stage_model = FrozenCLIPEmbedder(tiny_openai), FrozenCLIPEmbedder(tiny_openai)
    fill(source)
    content = dict(source.state_dict())
    content["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if spelling == "flat":
        content = {n.replace("text_model.", ""): v for n, v in content.items()}
    if how == "load_state_dict":
        target.load_state_dict(content)
    else:
        torch.save({"state_dict": content}, tmp_path / "m.ckpt")
        load_weights(target, tmp_path / "m.ckpt")
    for (name, a), b in zip(source.named_parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_saved_weights_have_the_published_names(tmp_path: Path, tiny_openai: str) -> None:
    path = save_weights(FrozenCLIPEmbedder(tiny_openai), tmp_path / "m.safetensors")
    assert all(n.startswith("transformer.text_model.") for n in read_state_dict(path))


def test_layers_of_the_clip_encoder(tiny_openai: str) -> None:
    texts = ["a red circle", "two blue stars on a white background"]
    last = fill(FrozenCLIPEmbedder(tiny_openai))
    with torch.no_grad():
        want = last.encode(texts)
        out = last.transformer(input_ids=hf_ids(texts), output_hidden_states=True)
    assert want.shape == (2, 77, 32) and torch.equal(want, out.last_hidden_state)

    def encode(**kwargs: object) -> torch.Tensor:
        with torch.no_grad():
            return fill(FrozenCLIPEmbedder(tiny_openai, **kwargs)).encode(texts)

    end = (hf_ids(texts) == 49407).int().argmax(dim=1)
    assert torch.equal(encode(layer="pooled"), want[torch.arange(2), end][:, None])
    assert torch.equal(encode(layer="hidden", layer_idx=2), out.hidden_states[2])
    for kwargs, message in (
        ({"layer": "first"}, "last, pooled, hidden"),
        ({"layer": "hidden"}, "needs layer_idx"),
        ({"layer": "hidden", "layer_idx": 9}, "outside -4 to 3"),
        ({"version": "openai/none"}, "neither a folder nor known"),
        ({"max_length": 100}, "77 positions"),
    ):
        with pytest.raises(ConfigError, match=message):
            FrozenCLIPEmbedder(**{"version": tiny_openai, **kwargs})


def test_a_local_folder_brings_its_own_architecture_and_weights(tmp_path: Path, tiny_openai: str, offline: None) -> None:
    source = fill(FrozenCLIPEmbedder(tiny_openai))
    source.transformer.save_pretrained(tmp_path / "text_encoder")
    encoder = FrozenCLIPEmbedder(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), encoder.parameters(), strict=True))
    with torch.device("meta"):
        assert FrozenCLIPEmbedder(str(tmp_path)).device.type == "meta"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        FrozenCLIPEmbedder(str(tmp_path / "empty"))


def test_a_folders_tokeniser_cuts_text_into_words_as_ours_does(tmp_path: Path, tiny_openai: str) -> None:
    """Weights and chunks go by words; a word learnt by textual inversion is one."""
    from transformers import CLIPTokenizer

    tokens = [*tokenizers.clip_bpe().tokens, "<|startoftext|>", "<|endoftext|>"]
    merges = tokenizers.clip_bpe().merges
    CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges).save_pretrained(tmp_path / "tokenizer")
    FrozenCLIPEmbedder(tiny_openai).transformer.save_pretrained(tmp_path / "text_encoder")
    theirs, ours = FrozenCLIPEmbedder(str(tmp_path), max_length=12).tokenizer, ClipTokenizer("hf", 12)
    assert type(theirs) is text._FolderTokenizer
    for prompt in ("a zyzzyva's red-hot circle", "", "one", PROMPTS[0], PROMPTS[6]):
        assert theirs.words(prompt) == ours.words(prompt)
        assert theirs.row(ours.encode(prompt)) == ours([prompt])[0].tolist() == theirs([prompt])[0].tolist()
        assert theirs.cut(prompt).split() == ours.cut(prompt).split()
    theirs.inner.add_tokens("<my-toy>")
    learnt = theirs.inner.convert_tokens_to_ids("<my-toy>")
    assert theirs.words("a <my-toy> zyzzyva") == [*ours.words("a"), [learnt], *ours.words("zyzzyva")]


@pytest.mark.slow
def test_clip_l_numbers(reference: Callable) -> None:
    stored = reference("k01_clip_l_text")
    encoder = fill(FrozenCLIPEmbedder(), rename=lambda n: n.replace("transformer.", "transformer.text_model.", 1))
    with torch.no_grad():
        out = encoder.transformer(input_ids=hf_ids([PROMPTS[0], ""]), output_hidden_states=True)
    outputs = {"last": out.last_hidden_state[:, ROWS], "hidden_11": out.hidden_states[11][:, ROWS], "pooled": out.pooler_output}
    stored.check_all(outputs)


# ---------------------------------------------------------------------------------------------------------------- shared
def test_frozen_stays_in_evaluation_mode(tiny_openai: str) -> None:
    for encoder in (FrozenCLIPEmbedder(tiny_openai), FrozenOpenCLIPEmbedder(TINY, max_length=12)):
        assert encoder.train() is encoder and encoder.eval() is encoder
        encoder.train()
        assert not any(m.training for m in encoder.modules())
        assert not any(p.requires_grad for p in encoder.parameters())


def test_no_construction_opens_a_connection(offline: None) -> None:
    with torch.device("meta"):
        FrozenCLIPEmbedder()
        FrozenOpenCLIPEmbedder()
    assert FrozenOpenCLIPEmbedder(TINY, max_length=12).encode(["a"]).shape == (1, 12, 32)


def test_imports_are_lean() -> None:
    code = (
        "import sys; from ldm.modules.encoders.modules import *; "
        "e = FrozenOpenCLIPEmbedder({'embed_dim': 8, 'text_cfg': {'width': 8, 'heads': 1, 'layers': 1}}); e.encode(['a']); "
        "print([m for m in ('open_clip', 'transformers', 'torchvision', 'pytorch_lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_abstract_and_identity() -> None:
    with pytest.raises(NotImplementedError):
        AbstractEncoder().encode(1)
    assert IdentityEncoder().encode([1]) == [1] and IdentityEncoder()([1]) == [1]
    assert conditioner.IdentityEncoder is IdentityEncoder


# ---------------------------------------------------------------------------------------------------------------- labels
def test_class_embedder_numbers(reference: Callable) -> None:
    stored = reference("i03_class_embedder")
    label = torch.tensor([3, 8])
    embedder = fill(ClassEmbedder(6, n_classes=10, key="class_label"))
    stored.check_all({"c": embedder({"class_label": label}), "c_key": embedder({"other": label}, key="other")})


def test_class_dropout_draws_like_the_original() -> None:
    embedder = fill(ClassEmbedder(6, n_classes=11, key="cls", ucg_rate=0.4))
    label = torch.arange(10).repeat(4)
    torch.manual_seed(17)
    got = embedder({"cls": label})
    torch.manual_seed(17)
    dropped = torch.bernoulli(torch.ones(40, 1) * 0.4).bool()
    want = torch.where(dropped, 10, label[:, None])
    assert 5 < int(dropped.sum()) < 30
    assert torch.equal(got, embedder.embedding(want)) and got.shape == (40, 1, 6)
    assert torch.equal(embedder({"cls": label}, disable_dropout=True), embedder.embedding(label[:, None]))
    empty = embedder.get_unconditional_conditioning(3)["cls"]
    assert empty.tolist() == [10, 10, 10]
    assert torch.equal(embedder({"cls": empty}, disable_dropout=True)[:, 0], embedder.embedding.weight[10].expand(3, 6))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        ClassEmbedder(6, ucg_rate=2)


def test_class_embedder_is_plain_by_default() -> None:
    embedder = ClassEmbedder(4, n_classes=5)
    label = torch.tensor(np.arange(5))
    assert torch.equal(embedder.encode({"class": label})[:, 0], embedder.embedding.weight)
