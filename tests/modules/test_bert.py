"""The token transformer against stored numbers and a plain formula; BERT's word pieces; and no vocabulary, no network until text comes."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import Tensor

from ldm.modules.encoders.modules import BERTEmbedder, BERTTokenizer, TransformerEmbedder
from ldm.modules.x_transformer import Decoder, Encoder, TransformerWrapper
from ldm.util import ConfigError, UserError
from tests.analytic import latent_model
from tests.reference_rule import fill

PIECES = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s", ",", "uber", "日", "本", "play", "##ing"]
PAD, UNK, CLS, SEP, A, CAT, S, COMMA = 0, 2, 3, 4, 6, 7, 8, 9
TINY = {"n_embed": 16, "n_layer": 1, "vocab_size": len(PIECES), "max_seq_len": 8}


@pytest.fixture(autouse=True)
def _no_vocabulary_and_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a fresh machine: nothing in the environment, nothing cached, and whoever opens a socket fails."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.delenv("LDM_BERT_VOCAB", raising=False)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


# -- the transformer ---------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_embedders_against_the_published_code(reference):
    ref = reference("i01_transformer_embedder")
    config = {"n_embed": 64, "n_layer": 2, "vocab_size": 100, "max_seq_len": 16}
    ids = ref.input("tok")
    transformer, bert = fill(TransformerEmbedder(device="cpu", **config)), fill(BERTEmbedder(**config, use_tokenizer=False))
    ref.check_all({"tr": transformer(ids), "bert": bert(ids), "bert_encode": bert.encode(ids), "keys": sorted(bert.state_dict())})
    torch.testing.assert_close(transformer.encode(ids), transformer(ids))


def by_formula(model: TransformerWrapper, ids: Tensor, mask: Tensor | None = None, heads: int = 8) -> Tensor:
    """Features by the formulas, with the model's weights: a token sees the others where both are tokens; padding sees all."""
    w = model.state_dict()

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    x = w["token_emb.weight"][ids] + w["pos_emb.emb.weight"][: ids.shape[1]]
    x = linear("project_emb", x) if "project_emb.weight" in w else x
    for i in range(len(model.attn_layers.layers)):
        name = f"attn_layers.layers.{i}"
        y = norm(f"{name}.0", x)
        if i % 2:
            x = x + linear(f"{name}.1.net.2", torch.nn.functional.gelu(linear(f"{name}.1.net.0.0", y)))
            continue
        q, k, v = (linear(f"{name}.1.to_{part}", y).unflatten(-1, (heads, 64)).movedim(2, 1) for part in "qkv")  # (B, N, L, 64)
        scores = q @ k.mT / 8
        if mask is not None:
            seen = mask[:, None, :, None] * mask[:, None, None, :]
            scores = torch.where(seen, scores, torch.tensor(-1e30))
        x = x + linear(f"{name}.1.to_out", (scores.softmax(-1) @ v).movedim(1, 2).flatten(2))
    return norm("norm", x)


@torch.no_grad()
def test_wrapper_follows_the_formulas():
    ids = torch.tensor([[1, 5, 99, 0, 3, 3, 7], [2, 2, 50, 51, 52, 0, 0]])
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    plain = fill(TransformerWrapper(num_tokens=100, max_seq_len=16, attn_layers=Encoder(dim=32, depth=2)))
    narrow = fill(TransformerWrapper(num_tokens=100, max_seq_len=16, emb_dim=24, attn_layers=Encoder(dim=32, depth=1, heads=4)))
    torch.testing.assert_close(plain(ids, return_embeddings=True), by_formula(plain, ids))
    torch.testing.assert_close(plain(ids, return_embeddings=True, mask=mask), by_formula(plain, ids, mask))
    torch.testing.assert_close(narrow(ids, return_embeddings=True), by_formula(narrow, ids, heads=4))
    torch.testing.assert_close(plain(ids), plain.to_logits(by_formula(plain, ids)))
    assert narrow(ids).shape == (2, 7, 100)


@torch.no_grad()
def test_masked_tokens_change_nothing():
    model = fill(TransformerWrapper(num_tokens=100, max_seq_len=16, attn_layers=Encoder(dim=32, depth=2)))
    ids, mask = torch.arange(1, 7)[None], torch.tensor([[True] * 4 + [False] * 2])
    torch.testing.assert_close(model(ids, mask=mask)[:, :4], model(ids[:, :4]))


@torch.no_grad()
def test_decoder_sees_only_the_past():
    model = fill(TransformerWrapper(num_tokens=100, max_seq_len=16, attn_layers=Decoder(dim=32, depth=2)))
    ids = torch.arange(1, 7)[None]
    torch.testing.assert_close(model(ids)[:, :4], model(ids[:, :4]))
    masked = model(ids, mask=torch.tensor([[True] * 5 + [False]]))
    torch.testing.assert_close(masked[:, :5], model(ids[:, :5]))


def test_too_many_tokens_are_refused():
    with pytest.raises(UserError, match=r"9 tokens came, and the transformer has 8 positions"):
        TransformerEmbedder(**TINY)(torch.zeros(1, 9, dtype=torch.int64))


def test_every_trainable_parameter_gets_a_gradient():
    model = BERTEmbedder(**TINY, use_tokenizer=False)
    model(torch.tensor([[CLS, A, CAT, SEP]])).sum().backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any("to_logits" in name for name in trainable)


# -- word pieces -------------------------------------------------------------------------------------------------------
def test_texts_become_word_pieces(vocab):
    ids = BERTTokenizer(vq_interface=False, max_length=8, vocab=str(vocab))(["A cats,Cat", "Über 日本", "xyz playing", ""])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [
        [CLS, A, CAT, S, COMMA, CAT, SEP, PAD],
        [CLS, 10, 11, 12, SEP, PAD, PAD, PAD],  # without accents, Chinese characters apart
        [CLS, UNK, 13, 14, SEP, PAD, PAD, PAD],
        [CLS, SEP, PAD, PAD, PAD, PAD, PAD, PAD],
    ]


def test_long_texts_are_cut_and_reported(vocab, caplog):
    tokenizer = BERTTokenizer(vq_interface=False, max_length=5, vocab=str(vocab))
    with caplog.at_level(logging.WARNING):
        assert tokenizer("a cat a cats").tolist() == [[CLS, A, CAT, A, SEP]]
    assert "longer than 3 tokens; cut off: 'cats'" in caplog.text


def test_tokenizer_in_the_form_of_a_quantiser(vocab):
    tokenizer = BERTTokenizer(vocab=str(vocab), max_length=4)
    first, second, (third, fourth, ids) = tokenizer.encode(["a cat"])
    assert (first, second, third, fourth) == (None,) * 4 and ids.tolist() == [[CLS, A, CAT, SEP]]
    assert tokenizer.decode(ids) is ids


@torch.no_grad()
@pytest.mark.parametrize("how", ["file", "folder", "environment", "cache"])
def test_places_of_the_vocabulary(vocab, how, monkeypatch):
    given = {"file": str(vocab), "folder": str(vocab.parent)}.get(how)
    if how == "environment":
        monkeypatch.setenv("LDM_BERT_VOCAB", str(vocab))
    if how == "cache":
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: str(vocab))
    model = fill(BERTEmbedder(**TINY, vocab=given))
    ids = torch.tensor([[CLS, A, CAT, SEP, PAD, PAD, PAD, PAD]])
    torch.testing.assert_close(model(["a cat"]), fill(BERTEmbedder(**TINY, use_tokenizer=False))(ids))


def test_construction_needs_no_vocabulary_and_text_says_so():
    model = BERTEmbedder(**TINY)
    with pytest.raises(UserError, match=r"vocabulary of bert-base-uncased, which is not on this machine: give its vocab\.txt") as refusal:
        model.encode(["a cat"])
    assert "\n" not in str(refusal.value) and "LDM_BERT_VOCAB" in str(refusal.value)


def test_wrong_vocabularies_are_refused(vocab, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"has 15 entries, and the model was made for 30522"):
        BERTEmbedder(n_embed=8, n_layer=1, vocab=str(vocab))("a cat")
    with pytest.raises(UserError, match=r"no vocabulary at .*nowhere, which `vocab` names"):
        BERTTokenizer(vocab=str(tmp_path / "nowhere"))("a cat")
    (tmp_path / "words.txt").write_text("a\ncat\n")
    monkeypatch.setenv("LDM_BERT_VOCAB", str(tmp_path / "words.txt"))
    with pytest.raises(UserError, match=r"words.txt is not a vocabulary of BERT: it has no \[PAD\], \[UNK\], \[CLS\], \[SEP\]"):
        BERTTokenizer()("a cat")


def test_other_refusals(vocab):
    with pytest.raises(UserError, match="a prompt must be text, not int"):
        BERTTokenizer(vocab=str(vocab))([3])
    with pytest.raises(ConfigError, match="max_length 2 leaves no room"):
        BERTTokenizer(max_length=2)


def test_trains_with_the_diffusion_model(vocab):
    encoder = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": TINY | {"vocab": str(vocab), "n_embed": 4}}
    model = latent_model(cond_stage_config=encoder, cond_stage_trainable=True)
    loss, _ = model.shared_step({"image": torch.randn(2, 8, 8, 4), "caption": ["a cat", "cats"]})
    loss.backward()
    gradient = model.cond_stage_model.transformer.token_emb.weight.grad
    assert gradient[[CLS, A, CAT, S, SEP]].abs().sum(1).all() and not gradient[[UNK, COMMA]].any()
    assert model.get_unconditional_conditioning(3).shape == (3, 8, 4)
