"""Attention layers: reference numbers, the formula in float64, masks, precision and checkpointing."""

from __future__ import annotations

import pytest
import torch

from ldm.modules import attention as A
from ldm.modules.diffusionmodules import openaimodel as O
from ldm.modules.diffusionmodules.util import normalization
from ldm.util import ConfigError
from tests.reference_rule import compare, fill


@torch.no_grad()
def test_cross_attention_matches_the_reference(reference):
    ref = reference("e01_cross_attention")
    x, ctx = ref.input("x"), ref.input("ctx")
    cross = fill(A.CrossAttention(32, context_dim=24, heads=4, dim_head=8))
    alone = fill(A.CrossAttention(32, heads=2, dim_head=16))
    ref.check_all({"cross": cross(x, context=ctx), "self_": alone(x), "masked": cross(x, context=ctx, mask=ref.input("mask"))})


@torch.no_grad()
def test_transformer_block_matches_the_reference(reference):
    ref = reference("e02_basic_transformer_block")
    x, ctx = ref.input("x"), ref.input("ctx")
    gated = fill(A.BasicTransformerBlock(32, 4, 8, context_dim=24))
    plain = fill(A.BasicTransformerBlock(32, 4, 8, context_dim=24, gated_ff=False))
    alone = fill(A.BasicTransformerBlock(32, 4, 8))
    ref.check_all({"geglu": gated(x, context=ctx), "gelu": plain(x, context=ctx), "noctx": alone(x)})


@torch.no_grad()
def test_spatial_transformer_matches_the_reference(reference):
    ref = reference("e03_spatial_transformer")
    x, ctx = ref.input("x"), ref.input("ctx")
    out = {name: fill(A.SpatialTransformer(32, heads, 8, depth=1, context_dim=24))(x, ctx) for name, heads in (("out", 4), ("inner16", 2))}
    ref.check_all(out)


@torch.no_grad()
def test_linear_spatial_transformer_matches_the_reference(reference):
    ref = reference("e05_spatial_transformer_linear")
    x, ctx = ref.input("x"), ref.input("ctx")
    linear = fill(A.SpatialTransformer(32, 4, 8, depth=1, context_dim=24, use_linear=True))
    no_self = fill(A.SpatialTransformer(32, 4, 8, depth=1, context_dim=24, disable_self_attn=True))
    deep = fill(A.SpatialTransformer(32, 4, 8, depth=2, context_dim=[24, 24]))
    ref.check_all({"linear": linear(x, ctx), "disable_self": no_self(x, ctx), "depth2_list": deep(x, [ctx, ctx * 0.5])})


@torch.no_grad()
def test_epsilons_match_the_reference(reference):
    """Inputs of size 1e-3, where a wrong eps of a norm shows."""
    ref = reference("e11_norm_eps_small_inputs")
    x, emb, tok, ctx = (ref.input(name) for name in ("x", "emb", "tok", "ctx"))
    ref.check(
        attn_normalize=fill(A.Normalize(32))(x),
        groupnorm32=fill(normalization(32))(x),
        spatial_transformer=fill(A.SpatialTransformer(32, 4, 8, depth=1, context_dim=24))(x, ctx),
        transformer_block=fill(A.BasicTransformerBlock(32, 4, 8, context_dim=24))(tok, context=ctx),
        attention_block=fill(O.AttentionBlock(32, num_heads=4))(x),
        res_block=fill(O.ResBlock(32, 64, 0.0))(x, emb),
    )


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return (scores if mask is None else scores.masked_fill(~mask, float("-inf"))).softmax(-1) @ v


def test_attention_is_the_formula():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) > 0.4
    mask[..., 0] = True
    compare(A.attention(q, k, v), formula(q, k, v), atol=1e-6)
    compare(A.attention(q, k, v, mask), formula(q, k, v, mask), atol=1e-6)


def test_upcast_survives_what_overflows_float16():
    q, k = (torch.full((1, 1, 2, 64), 60.0, dtype=torch.float16) for _ in range(2))
    v = torch.randn(1, 1, 2, 64).half()
    got = A.attention(q, k, v, upcast=True)
    assert got.dtype == torch.float16
    compare(got, formula(q, k, v), atol=1e-3)


def test_upcast_also_under_autocast():
    layer = fill(A.CrossAttention(32, heads=2, dim_head=16, upcast=True))
    x = torch.randn(1, 6, 32)
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        patch.setattr(A.F, "scaled_dot_product_attention", lambda q, *a, **k: seen.append(q.dtype) or real(q, *a, **k))
        assert layer(x).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_masked_context_has_no_influence():
    layer = fill(A.CrossAttention(32, context_dim=24, heads=4, dim_head=8))
    x, context = torch.randn(2, 6, 32), torch.randn(2, 5, 24)
    mask = torch.tensor([[True, True, False, False, True]] * 2)
    other = torch.where(mask[..., None], context, torch.randn_like(context))
    compare(layer(x, context, mask=mask), layer(x, other, mask=mask), atol=1e-6)
    compare(layer(x, context, mask=mask), layer(x, context[:, mask[0]]), atol=1e-6)


def test_heads_are_views():
    x = torch.randn(2, 5, 12)
    heads = A.split_heads(x, 3)
    assert heads.shape == (2, 3, 5, 4) and heads.data_ptr() == x.data_ptr()
    compare(A.merge_heads(heads), x)


@torch.no_grad()
def test_single_context_serves_all_blocks():
    deep = fill(A.SpatialTransformer(32, 4, 8, depth=3, context_dim=24))
    x, context = torch.randn(1, 32, 4, 3), torch.randn(1, 5, 24)
    compare(deep(x, context), deep(x, [context] * 3))
    with pytest.raises(ValueError, match="zip"):
        deep(x, [context] * 2)


@torch.no_grad()
def test_memory_format_does_not_matter():
    layer = fill(A.SpatialTransformer(32, 4, 8, depth=1, context_dim=24))
    x, context = torch.randn(2, 32, 4, 6), torch.randn(2, 5, 24)
    want = layer(x, context)
    fast = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), context)
    compare(fast, want, atol=1e-5)


def test_checkpointing_changes_no_gradient():
    x, context = torch.randn(1, 6, 32), torch.randn(1, 5, 24)

    def gradients(flag: bool) -> list[torch.Tensor]:
        block = fill(A.BasicTransformerBlock(32, 4, 8, context_dim=24, checkpoint=flag))
        block(x, context).square().mean().backward()
        return [p.grad for p in block.parameters()]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        compare(one, other, atol=1e-7)


def test_transformers_start_as_the_identity():
    x, context = torch.randn(1, 32, 4, 4), torch.randn(1, 5, 24)
    for use_linear in (False, True):
        assert torch.equal(A.SpatialTransformer(32, 4, 8, context_dim=24, use_linear=use_linear)(x, context), x)
    assert torch.equal(O.AttentionBlock(32, num_heads=4)(x), x)


@torch.no_grad()
def test_linear_attention_is_its_formula():
    layer = fill(A.LinearAttention(32, heads=4, dim_head=8))
    x = torch.randn(2, 32, 6, 4)
    q, k, v = layer.to_qkv(x).reshape(2, 3, 4, 8, 24).unbind(1)  # (B, N, D, HW)
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(dim=-1), v)
    out = torch.einsum("bhde,bhdn->bhen", context, q).reshape(2, 32, 6, 4)
    compare(layer(x), layer.to_out(out), atol=1e-5)


@torch.no_grad()
def test_spatial_self_attention_is_its_formula():
    layer = fill(A.SpatialSelfAttention(32))
    x = torch.randn(2, 32, 6, 4)
    q, k, v = (f(layer.norm(x)).flatten(2).mT for f in (layer.q, layer.k, layer.v))
    out = formula(q, k, v).float().mT.reshape(x.shape)
    compare(layer(x), x + layer.proj_out(out), atol=1e-5)


@torch.no_grad()
def test_packed_orders_of_attention_block():
    """The two orders are the same attention over differently packed channels."""
    heads, width, length = 4, 8, 5
    q, k, v = (torch.randn(2, heads, width, length) for _ in range(3))
    by_head = torch.stack([q, k, v], dim=2).reshape(2, -1, length)
    by_kind = torch.stack([q, k, v], dim=1).reshape(2, -1, length)
    want = formula(q.mT, k.mT, v.mT).mT.reshape(2, -1, length)
    compare(O.QKVAttentionLegacy(heads)(by_head), want, atol=1e-6)
    compare(O.QKVAttention(heads)(by_kind), want, atol=1e-6)


def test_errors_name_the_fault():
    with pytest.raises(ConfigError, match="2 entries for 3"):
        A.SpatialTransformer(32, 4, 8, depth=3, context_dim=[24, 16])
    with pytest.raises(ConfigError, match="softmax"):
        A.SpatialTransformer(32, 4, 8, context_dim=24, attn_type="flash")
    with pytest.raises(ConfigError, match="num_head_channels=12"):
        O.AttentionBlock(32, num_head_channels=12)
    with pytest.raises(ConfigError, match="num_heads=5"):
        O.AttentionBlock(32, num_heads=5)
