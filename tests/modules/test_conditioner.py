"""GeneralConditioner and its embedders: against stored numbers, open_clip and transformers, and dropping of conditions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from omegaconf import OmegaConf

from ldm.modules.encoders import text
from ldm.modules.encoders.conditioner import (
    ClassEmbedder,
    ConcatTimestepEmbedderND,
    FrozenCLIPEmbedder,
    FrozenOpenCLIPEmbedder,
    FrozenOpenCLIPEmbedder2,
    GeneralConditioner,
)
from ldm.util import ConfigError, UserError
from tests.reference_rule import fill

HERE = "sgm.modules.encoders.modules."
TINY = {"embed_dim": 16, "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3}}
TEXTS = ["a red circle", "two blue stars"]
SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")


@pytest.fixture
def tiny_openai(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(text._OPENAI_TEXT, "openai/tiny", (32, 3, 2))
    return "openai/tiny"


def sizes(outdim: int = 16, **more: object) -> list[dict]:
    target = HERE + "ConcatTimestepEmbedderND"
    return [{"is_trainable": False, "input_key": key, "target": target, "params": {"outdim": outdim}, **more} for key in SIZES]


def classes(**more: object) -> dict:
    return {"input_key": "cls", "target": HERE + "ClassEmbedder", "params": {"embed_dim": 6, "n_classes": 10}, **more}


# ----------------------------------------------------------------------------------------------------------- stored numbers
def test_sizes_are_embedded_as_stored(reference: Callable) -> None:
    ref = reference("j01_sgm_concat_timestep_embedder")
    original, crop, target, aesthetic = (ref.input(name) for name in ("o", "cr", "tg", "aes"))
    conditioner = GeneralConditioner(OmegaConf.create(sizes()))
    batch = dict(zip(SIZES, (original, crop, target), strict=True))
    c, uc = conditioner.get_unconditional_conditioning(
        batch, {**batch, "original_size_as_tuple": target}, force_uc_zero_embeddings=["target_size_as_tuple"]
    )
    ref.check_all(
        {
            "orig16": ConcatTimestepEmbedderND(16)(original),
            "orig256": ConcatTimestepEmbedderND(256)(original),
            "aes16": ConcatTimestepEmbedderND(16)(aesthetic),
            "vector": conditioner(batch)["vector"],
            "vector_zero_crop": conditioner(batch, force_zero_embeddings=["crop_coords_top_left"])["vector"],
            "c": c["vector"],
            "uc": uc["vector"],
        }
    )


# -------------------------------------------------------------------------------------------------------------- conditioner
def test_outputs_are_joined_by_rank_in_the_order_of_the_config():
    identity = HERE + "IdentityEncoder"
    keys = ("a", "b", "map", "tokens", "more")
    conditioner = GeneralConditioner([{"input_key": key, "target": identity} for key in keys])
    batch = {
        "a": torch.randn(2, 3),
        "b": torch.randn(2, 4),
        "map": torch.randn(2, 1, 5, 5),
        "tokens": torch.randn(2, 7, 8),
        "more": torch.randn(2, 7, 6),
    }
    out = conditioner(batch)
    assert set(out) == {"vector", "concat", "crossattn"}
    assert torch.equal(out["vector"], torch.cat([batch["a"], batch["b"]], 1))
    assert torch.equal(out["crossattn"], torch.cat([batch["tokens"], batch["more"]], 2))
    assert torch.equal(out["concat"], batch["map"])


def test_embedders_are_frozen_unless_trainable():
    conditioner = GeneralConditioner([classes(), classes(is_trainable=True)])
    conditioner.train()
    frozen, trained = conditioner.embedders
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    assert trained.training and all(p.requires_grad for p in trained.parameters())
    assert [e.input_key for e in conditioner.embedders] == ["cls", "cls"]
    vector = conditioner({"cls": torch.tensor([1, 2])})["vector"]
    vector.sum().backward()
    assert trained.embedding.weight.grad is not None and frozen.embedding.weight.grad is None


def test_a_share_of_the_conditions_is_dropped():
    conditioner = GeneralConditioner([classes(ucg_rate=0.25)])
    batch = {"cls": torch.randint(0, 9, (2000,))}
    torch.manual_seed(0)
    dropped = (conditioner(batch)["vector"] == 0).all(1)
    assert 0.2 < dropped.float().mean() < 0.3
    cond, uncond = conditioner.get_unconditional_conditioning(batch)
    assert not (cond["vector"] == 0).all(1).any() and torch.equal(cond["vector"], uncond["vector"])
    assert conditioner.embedders[0].ucg_rate == 0.25


def test_a_legacy_value_replaces_entries_and_leaves_the_batch_alone():
    conditioner = GeneralConditioner([classes(ucg_rate=0.5, legacy_ucg_value=9)])
    batch = {"cls": torch.zeros(400, dtype=torch.int64)}
    torch.manual_seed(0)
    vector = conditioner(batch)["vector"]
    weight = conditioner.embedders[0].embedding.weight
    nines = (vector == weight[9]).all(1)
    assert 150 < nines.sum() < 250 and ((vector == weight[0]).all(1) | nines).all()
    assert not batch["cls"].any()


def test_legacy_values_of_texts():
    class Length(torch.nn.Module):
        def forward(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[float(len(t))] for t in texts])

    conditioner = GeneralConditioner([])
    embedder = Length()
    embedder.is_trainable, embedder.ucg_rate, embedder.input_key, embedder.input_keys = False, 1.0, "txt", ()
    embedder.legacy_ucg_val = ""
    conditioner.embedders.append(embedder)
    batch = {"txt": ["abc", "d"]}
    assert conditioner(batch)["vector"].flatten().tolist() == [0.0, 0.0]
    assert batch["txt"] == ["abc", "d"]
    assert conditioner.get_unconditional_conditioning(batch)[0]["vector"].flatten().tolist() == [3.0, 1.0]


def test_no_embedders_give_no_conditioning():
    assert GeneralConditioner([])({"jpg": None}) == {}


def test_errors_say_what_is_wrong():
    conditioner = GeneralConditioner(sizes())
    with pytest.raises(UserError, match="lacks original_size_as_tuple"):
        conditioner({"txt": ["a"]})
    with pytest.raises(UserError, match=r"txt to zero: the input keys of this model are crop_coords_top_left"):
        conditioner({}, force_zero_embeddings=["txt"])
    with pytest.raises(ConfigError, match=r"emb_models\[0\].*needs input_key"):
        GeneralConditioner([{"target": HERE + "IdentityEncoder"}])
    with pytest.raises(ConfigError, match=r"ucg_rate 1\.5"):
        GeneralConditioner([classes(ucg_rate=1.5)])
    with pytest.raises(ConfigError, match="1 dimensions"):
        GeneralConditioner([{"input_key": "x", "target": HERE + "IdentityEncoder"}])({"x": torch.zeros(3)})
    with pytest.raises(UserError, match=r"\(B, N\) or \(B,\)"):
        ConcatTimestepEmbedderND(4)(torch.zeros(1, 2, 3))


# ------------------------------------------------------------------------------------------------------------------ classes
def test_class_embedder():
    embedder = fill(ClassEmbedder(6, n_classes=10))
    labels = torch.tensor([1, 4])
    assert torch.equal(embedder(labels), embedder.embedding.weight[labels])
    sequence = fill(ClassEmbedder(6, n_classes=10, add_sequence_dim=True))
    assert torch.equal(sequence(labels), embedder(labels)[:, None])
    conditioner = GeneralConditioner([classes()])
    assert conditioner.embedders[0].get_unconditional_conditioning(3)["cls"].tolist() == [9, 9, 9]


# -------------------------------------------------------------------------------------------------------------------- texts
@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_second_open_clip_encoder_is_open_clip(layer: str) -> None:
    import open_clip

    arch = {**TINY, "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}}
    ours = fill(FrozenOpenCLIPEmbedder2(arch, max_length=12, layer=layer, always_return_pooled=True, legacy=False))
    theirs = open_clip.model.CLIP(**arch)
    result = theirs.load_state_dict(ours.model.state_dict(), strict=False)
    assert not result.unexpected_keys and all(name.startswith("visual.") for name in result.missing_keys)
    ids = ours.tokenizer(TEXTS)
    with torch.no_grad():
        x = theirs.token_embedding(ids) + theirs.positional_embedding
        for block in theirs.transformer.resblocks[: 3 - (layer == "penultimate")]:
            x = block(x, attn_mask=theirs.attn_mask)
        features, pooled = ours(TEXTS)
        torch.testing.assert_close(features, x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(pooled, theirs.encode_text(ids), rtol=1e-4, atol=1e-5)


def test_second_open_clip_encoder_in_legacy_mode_is_the_first():
    first = fill(FrozenOpenCLIPEmbedder(TINY, max_length=12, layer="penultimate"))
    second = fill(FrozenOpenCLIPEmbedder2(TINY, max_length=12, layer="penultimate"))
    assert list(first.state_dict()) == list(second.state_dict())
    assert torch.equal(first(TEXTS), second(TEXTS))
    with pytest.raises(ConfigError, match="legacy: false"):
        FrozenOpenCLIPEmbedder2(TINY, max_length=12, always_return_pooled=True)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_trainable_second_encoder_gets_gradients_where_it_says(pooled: bool, layer: str, legacy: bool) -> None:
    if pooled and legacy:
        return  # refused, see above
    encoder = FrozenOpenCLIPEmbedder2(TINY, max_length=12, freeze=False, layer=layer, always_return_pooled=pooled, legacy=legacy)
    out = encoder(TEXTS)
    sum(part.sum() for part in (out if pooled else [out])).backward()
    assert {n for n, p in encoder.named_parameters() if p.requires_grad} == {n for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer", ["last", "pooled", "hidden"])
def test_clip_with_its_pooled_feature(tiny_openai: str, layer: str) -> None:
    options = {"layer": layer, "layer_idx": 2 if layer == "hidden" else None}
    plain = fill(FrozenCLIPEmbedder(tiny_openai, **options))
    both = fill(FrozenCLIPEmbedder(tiny_openai, always_return_pooled=True, **options))
    with torch.no_grad():
        features, pooled = both(TEXTS)
        assert torch.equal(features, plain(TEXTS))
        out = both.transformer(input_ids=both.tokenize(TEXTS), output_hidden_states=True)
    assert torch.equal(pooled, out.pooler_output) and pooled.shape == (2, 32)
    if layer == "hidden":
        assert torch.equal(features, out.hidden_states[2])


def test_texts_and_sizes_together_as_in_sdxl(tiny_openai: str) -> None:
    """Features of both encoders side by side, the pooled one and the sizes in one vector; the names of published files."""
    second = {"arch": {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 77}}, "layer": "penultimate", "legacy": False}
    conditioner = GeneralConditioner(
        [
            {
                "input_key": "txt",
                "target": HERE + "FrozenCLIPEmbedder",
                "params": {"version": tiny_openai, "layer": "hidden", "layer_idx": 2},
            },
            {"input_key": "txt", "target": HERE + "FrozenOpenCLIPEmbedder2", "params": {**second, "always_return_pooled": True}},
            *sizes(),
        ]
    )
    batch = {"txt": TEXTS, **{key: torch.tensor([[64.0, 48.0], [32.0, 32.0]]) for key in SIZES}}
    cond, uncond = conditioner.get_unconditional_conditioning(batch, {**batch, "txt": ["", ""]}, force_uc_zero_embeddings=["txt"])
    assert cond["crossattn"].shape == (2, 77, 64) and cond["vector"].shape == (2, 16 + 3 * 2 * 16)
    assert not uncond["crossattn"].any() and not uncond["vector"][:, :16].any() and uncond["vector"][:, 16:].any()
    names = set(conditioner.state_dict())
    assert "embedders.0.transformer.text_model.final_layer_norm.weight" in names and "embedders.1.model.text_projection" in names
