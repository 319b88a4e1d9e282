"""UNetModel: reference numbers, an independent implementation, and its promises on dtype, sizes and errors."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel
from ldm.modules.diffusionmodules.util import GroupNorm32, HybridConditioner, mean_flat, normalization, scale_module, timestep_embedding
from ldm.util import ConfigError, instantiate_from_config
from tests.reference_rule import compare, fill

TINY = {
    "image_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 1],
    "channel_mult": [1, 2],
}
CROSS = {"use_spatial_transformer": True, "context_dim": 48, "legacy": False}
SD2 = {
    "model_channels": 64,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "transformer_depth": 1,
    "context_dim": 40,
    "legacy": False,
}
REFERENCE_CASES = {
    "a01_unet_sd1": {
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4],
        "attention_resolutions": [4, 2, 1],
        "num_heads": 8,
        "transformer_depth": 1,
        "use_checkpoint": True,
        **CROSS,
    },
    "a02_unet_sd2": {**SD2, "use_checkpoint": True, "use_fp16": True},
    "a04_unet_class_int": {"num_classes": 10, "num_heads": 4},
    "a06_unet_unclip_sequential_adm": {"num_classes": "sequential", "adm_in_channels": 96, **SD2},
    "a08_unet_attnblock_ffhq": {
        "in_channels": 3,
        "out_channels": 3,
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 3, 4],
        "attention_resolutions": [8, 4, 2],
        "num_head_channels": 32,
    },
    "a09_unet_churches": {
        "image_size": 32,
        "channel_mult": [1, 2, 2, 4, 4],
        "attention_resolutions": [1, 2, 4, 8],
        "num_heads": 8,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
    },
    "a12_unet_cin_v2": {
        "in_channels": 3,
        "out_channels": 3,
        "channel_mult": [1, 2, 3],
        "attention_resolutions": [4, 2, 1],
        "num_heads": 1,
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": 24,
    },
    "a30_sgm_unet_sdxl_base": {
        "image_size": None,
        "adm_in_channels": 96,
        "num_classes": "sequential",
        "model_channels": 64,
        "attention_resolutions": [4, 2],
        "channel_mult": [1, 2, 4],
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "transformer_depth": [1, 2, 3],
        "context_dim": 48,
        "spatial_transformer_attn_type": "softmax-xformers",
    },
}


def tiny(**changes: Any) -> UNetModel:
    return fill(UNetModel(**{**TINY, **changes}))


def inputs(size: tuple[int, ...] = (16, 16), channels: int = 4, context: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *size, generator=g)
    return x, torch.tensor([3, 981]), torch.randn(2, 7, context, generator=g)


@pytest.mark.parametrize("case_id", REFERENCE_CASES)
@torch.no_grad()
def test_matches_the_reference(case_id, reference):
    ref = reference(case_id)
    given = {name: ref.input(name) for name in ("context", "y") if "in__" + name in ref._arrays}
    ref.check(out=tiny(**REFERENCE_CASES[case_id])(ref.input("x"), ref.input("t"), **given))


@torch.no_grad()
def test_blocks_match_the_reference(reference):
    ref, o = reference("a25_unet_blocks"), openaimodel
    x, emb = ref.input("x"), ref.input("emb")
    res = {
        "res": {},
        "res_out64": {"out_channels": 64},
        "res_useconv": {"out_channels": 64, "use_conv": True},
        "res_ssn": {"use_scale_shift_norm": True},
        "res_up": {"up": True},
        "res_down": {"down": True},
    }
    out = {name: fill(o.ResBlock(32, 64, 0.0, **options))(x, emb) for name, options in res.items()}
    out["attn_legacy_order"] = fill(o.AttentionBlock(32, num_heads=4))(x)
    out["attn_new_order"] = fill(o.AttentionBlock(32, num_heads=4, use_new_attention_order=True))(x)
    out["attn_head_ch"] = fill(o.AttentionBlock(32, num_heads=1, num_head_channels=16))(x)
    out["up"] = fill(o.Upsample(32, True))(x)
    out["down"] = fill(o.Downsample(32, True))(x)
    out["down_pool"] = fill(o.Downsample(32, False))(x)
    ref.check_all(out)


@torch.no_grad()
def test_timestep_embedding_matches_the_reference(reference):
    ref = reference("e08_timestep_embedding")
    ti = ref.input("ti")
    out = {f"d{d}": timestep_embedding(ti, d) for d in (2, 7, 32, 128, 320)}
    out["frac_64"] = timestep_embedding(ref.input("tf"), 64)
    out["period_100"] = timestep_embedding(ti, 32, max_period=100)
    out["repeat_only"] = timestep_embedding(ti, 8, repeat_only=True)
    ref.check_all(out)


# ------------------------------------------------------------------------------------------------- published layouts
_SD = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "legacy": False,
}
_SD2 = {**_SD, "num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024}
_LDM = {
    "image_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "attention_resolutions": [8, 4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 3, 4],
}
# name: (arguments, number of keys, digest of all keys and shapes of the published checkpoint)
PUBLISHED = {
    "celebahq": ({**_LDM, "model_channels": 224, "num_head_channels": 32}, 368, "01bfe51c266c8ccb"),
    "cin256": (
        {
            **_LDM,
            "model_channels": 192,
            "channel_mult": [1, 2, 3, 5],
            "num_heads": 1,
            "use_spatial_transformer": True,
            "context_dim": 512,
        },
        688,
        "152bf2765dafb038",
    ),
    "txt2img-1p4B": ({**_SD, "num_heads": 8, "context_dim": 1280}, 686, "cdd43a2f61d022aa"),
    "inpainting_big": (
        {**_LDM, "in_channels": 7, "model_channels": 256, "num_heads": 8, "resblock_updown": True},
        416,
        "8753a4efdbccaa15",
    ),
    "churches": (
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 192,
            "attention_resolutions": [1, 2, 4, 8],
            "num_res_blocks": 2,
            "channel_mult": [1, 2, 2, 4, 4],
            "num_heads": 8,
            "use_scale_shift_norm": True,
            "resblock_updown": True,
        },
        520,
        "ca37572b35cbade9",
    ),
    "sd1": ({**_SD, "num_heads": 8, "context_dim": 768}, 686, "2489855b740ba326"),
    "sd2": ({**_SD2, "use_fp16": True}, 686, "50e424db2fb788a2"),
    "sd2-inpainting": ({**_SD2, "in_channels": 9}, 686, "85f82990076e92f3"),
    "sd2-unclip": ({**_SD2, "num_classes": "sequential", "adm_in_channels": 2048}, 690, "eb4e4d5d050d0c0c"),
    "sdxl-base": (
        {
            "adm_in_channels": 2816,
            "num_classes": "sequential",
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "attention_resolutions": [4, 2],
            "num_res_blocks": 2,
            "channel_mult": [1, 2, 4],
            "num_head_channels": 64,
            "use_linear_in_transformer": True,
            "transformer_depth": [1, 2, 10],
            "context_dim": 2048,
            "spatial_transformer_attn_type": "softmax-xformers",
        },
        1680,
        "d8427731b1d2b4b6",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_is_that_of_the_published_checkpoint(name):
    arguments, count, digest = PUBLISHED[name]
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in UNetModel(**arguments).state_dict().items()}
    lines = sorted(f"{key} {shape}" for key, shape in shapes.items())
    assert len(lines) == count
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


@torch.no_grad()
def test_sdxl_style_config_without_a_context_has_transformers_too():
    model = tiny(image_size=None, attention_resolutions=[], num_head_channels=32)
    assert model.middle_block[1].transformer_blocks[0].attn2.to_k.in_features == 64
    x, t, _ = inputs()
    assert model(x, t).shape == x.shape
    assert isinstance(tiny(image_size=None, num_heads=4, use_spatial_transformer=False).middle_block[1], openaimodel.AttentionBlock)


# ---------------------------------------------------------------------------------------- an independent implementation
_RES_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_BLOCK_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.1.1": "down_blocks.0.attentions.0",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.3.0": "down_blocks.1.resnets.0",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.1.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.2.0": "up_blocks.1.resnets.0",
    "output_blocks.2.1": "up_blocks.1.attentions.0",
    "output_blocks.3.0": "up_blocks.1.resnets.1",
    "output_blocks.3.1": "up_blocks.1.attentions.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def diffusers_name(key: str) -> str:
    block = next(b for b in sorted(_BLOCK_NAMES, key=len, reverse=True) if key.startswith(b + "."))
    rest = key[len(block) + 1 :]
    part = rest.rpartition(".")[0]
    return f"{_BLOCK_NAMES[block]}.{rest.replace(part, _RES_NAMES[part]) if part in _RES_NAMES else rest}"


@pytest.mark.parametrize("size", [(16, 16), (7, 5), (9, 12)])
@torch.no_grad()
def test_agrees_with_diffusers_at_even_and_odd_sizes(size):
    from diffusers import UNet2DConditionModel

    ours = tiny(num_heads=4, attention_resolutions=[1], **CROSS)
    theirs = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=48,
        attention_head_dim=4,  # means the number of heads
    ).eval()
    theirs.load_state_dict({diffusers_name(k): v for k, v in ours.state_dict().items()})
    x, t, context = inputs(size)
    compare(ours(x, t, context), theirs(x, t, context).sample, rtol=1e-4, atol=2e-5)


# ------------------------------------------------------------------------------------------------------------ promises
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (13, 16)])
@pytest.mark.parametrize("options", [{}, {"conv_resample": False}, {"resblock_updown": True}], ids=["conv", "pool", "res"])
@torch.no_grad()
def test_any_size_works(size, options):
    if options:
        size = tuple(max(n, 4) for n in size)  # pooling cannot halve a single pixel, twice
    x, t, context = inputs(size)
    assert tiny(num_heads=4, channel_mult=[1, 1, 2], **CROSS, **options)(x, t, context).shape == x.shape


@pytest.mark.parametrize("dims", [1, 3])
@torch.no_grad()
def test_other_numbers_of_dims(dims):
    x, t, _ = inputs((8,) if dims == 1 else (3, 8, 8))
    assert tiny(dims=dims, num_heads=4)(x, t).shape == x.shape


@pytest.mark.parametrize("updown", [False, True])
def test_checkpointing_changes_no_gradient(updown):
    x, t, context = inputs()
    options = {"num_heads": 4, "resblock_updown": updown, **CROSS}

    def gradients(flag: bool) -> dict[str, Tensor]:
        model = tiny(use_checkpoint=flag, **options).train()
        model(x, t, context).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, saved = gradients(False), gradients(True)
    assert all(g is not None and g.abs().sum() > 0 for g in plain.values())
    for name, g in plain.items():
        torch.testing.assert_close(saved[name], g, rtol=1e-5, atol=1e-7, msg=name)


def test_checkpoint_flag_is_obeyed(monkeypatch):
    from ldm.modules.diffusionmodules import util

    calls = []
    monkeypatch.setattr(util, "torch_checkpoint", lambda f, *a, use_reentrant: calls.append(use_reentrant) or f(*a))
    x, t, context = inputs()
    for options in (CROSS, {}):
        given = (context,) if options else ()
        tiny(num_heads=4, use_checkpoint=False, **options)(x, t, *given)
        with torch.no_grad():
            tiny(num_heads=4, use_checkpoint=True, **options)(x, t, *given)
        assert calls == []
    tiny(num_heads=4, use_checkpoint=True)(x, t)
    assert calls and not any(calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_dtype_is_that_of_the_weights(dtype):
    x, t, context = inputs()
    model = tiny(num_heads=4, num_classes=3, **CROSS)
    y = torch.tensor([0, 2])
    want = model(x, t, context, y)
    assert model.dtype == torch.float32
    got = model.to(dtype)(x, t, context, y)
    assert model.dtype == dtype
    assert got.dtype == torch.float32  # that of x
    error = 1e-5 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=error)
    assert model(x.to(dtype), t, context, y).dtype == dtype


@torch.no_grad()
def test_use_fp16_leaves_float32_weights_alone():
    x, t, context = inputs()
    torch.testing.assert_close(tiny(num_heads=4, use_fp16=True, **CROSS)(x, t, context), tiny(num_heads=4, **CROSS)(x, t, context))


def test_trains_under_autocast():
    x, t, context = inputs()
    model = tiny(num_heads=4, use_checkpoint=True, **CROSS).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, t, context)
    assert out.dtype == torch.float32
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@torch.no_grad()
def test_upcast_attention_reaches_every_attention():
    from ldm.modules.attention import CrossAttention
    from ldm.modules.diffusionmodules.unet_blocks import QKVAttentionLegacy

    for options, kind in ((CROSS, CrossAttention), ({}, QKVAttentionLegacy)):
        model = tiny(num_heads=4, upcast_attention=True, **options)
        flags = [m.upcast for m in model.modules() if isinstance(m, kind)]
        assert flags and all(flags)


def test_new_model_predicts_zero():
    x, t, context = inputs()
    assert UNetModel(**TINY, num_heads=4, **CROSS)(x, t, context).abs().max() == 0


def test_num_groups_reaches_every_norm():
    model = tiny(model_channels=24, num_heads=4, num_groups=8, **CROSS)
    assert {m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)} == {8}


@torch.no_grad()
def test_configuration_variants_run():
    x, t, context = inputs()
    y = torch.tensor([20, 350])
    assert tiny(num_heads=4, n_embed=24)(x, t).shape == (2, 24, 16, 16)
    tiny(num_heads=4, num_classes="continuous")(x, t, y=torch.rand(2, 1))
    tiny(num_heads=4, num_classes="timestep", context_dim=48)(x, t, context, y)
    model = tiny(num_res_blocks=[1, 2], num_attention_blocks=[0, 1], num_heads=4, **CROSS)
    assert [len(b) for b in model.input_blocks] == [1, 1, 1, 2, 1]
    assert [len(b) for b in model.output_blocks] == [2, 1, 2, 1, 1]
    model(x, t, context)
    model = tiny(num_heads=4, disable_self_attentions=[True, False], disable_middle_self_attn=True, **CROSS)
    assert model.input_blocks[1][1].transformer_blocks[0].disable_self_attn
    assert not model.input_blocks[3][1].transformer_blocks[0].disable_self_attn
    assert model.middle_block[1].transformer_blocks[0].disable_self_attn
    model(x, t, context)
    up = tiny(num_heads=4, num_heads_upsample=2)
    assert (up.input_blocks[1][1].num_heads, up.output_blocks[0][1].num_heads) == (4, 2)
    legacy = {"model_channels": 64, "num_head_channels": 32, "use_spatial_transformer": True, "context_dim": 48}
    assert tiny(**legacy).input_blocks[1][1].transformer_blocks[0].attn1.heads == 2


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@torch.no_grad()
def test_encoder_pools(pool):
    model = fill(EncoderUNetModel(**{**TINY, "out_channels": 10, "attention_resolutions": [2]}, num_head_channels=32, pool=pool))
    x, t, _ = inputs()
    out = model(x, t)
    assert out.shape == (2, 10)
    assert not torch.allclose(out, model(x, torch.tensor([500, 500])))
    assert model.bfloat16()(x, t).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "num_heads .* or num_head_channels"),
        ({"num_heads": 5}, r"channels \[32, 64\] do not divide into num_heads=5"),
        ({"num_head_channels": 48}, "num_head_channels=48"),
        ({"num_heads": 4, "model_channels": 40}, r"\[40, 80\] do not divide into num_groups=32"),
        ({"num_heads": 4, "use_spatial_transformer": True}, "needs context_dim"),
        ({"num_heads": 4, "use_spatial_transformer": False, "context_dim": 8}, "needs use_spatial_transformer"),
        ({"num_heads": 4, "num_res_blocks": [1, 2, 3]}, "num_res_blocks has 3 entries for the 2 levels"),
        ({"num_heads": 4, "num_classes": "sequential"}, "needs adm_in_channels"),
        ({"num_heads": 4, "num_classes": "many"}, "continuous, timestep, sequential"),
        ({"num_heads": 4, "dims": 4}, "dims=4 must be 1, 2 or 3"),
        ({"num_heads": 4, "in_channels": None}, "needs in_channels"),
        ({"num_heads": 4, "spatial_transformer_attn_type": "linear"}, "softmax"),
        ({"num_heads": 4, "dims": 5, "num_classes": "many"}, "dims=5.*num_classes"),  # all faults at once
        ({"num_heads": 4, "context_dim": [8, 16], "transformer_depth": 3}, "2 entries for 3 transformer blocks"),
    ],
)
def test_bad_configurations_say_what_is_wrong(changes, words):
    with pytest.raises(ConfigError, match=words):
        UNetModel(**{**TINY, **changes})


def test_bad_encoder_configurations():
    with pytest.raises(ConfigError, match="pool='max' is unknown"):
        EncoderUNetModel(**TINY, num_heads=4, pool="max")
    with pytest.raises(ConfigError, match="num_head_channels"):
        EncoderUNetModel(**TINY, num_heads=4, pool="attention")


def test_class_labels_must_fit_the_model():
    x, t, _ = inputs()
    with pytest.raises(ValueError, match="needs y"):
        tiny(num_heads=4, num_classes=10)(x, t)
    with pytest.raises(ValueError, match="takes no y"):
        tiny(num_heads=4)(x, t, y=torch.tensor([1, 2]))


def test_builds_from_a_config_with_yaml_lists():
    from omegaconf import OmegaConf

    params = {**TINY, "num_heads": 4, "transformer_depth": [1, 2], **CROSS}
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    model = instantiate_from_config(OmegaConf.create({"target": target, "params": params}))
    assert len(model.input_blocks[3][1].transformer_blocks) == 2


# --------------------------------------------------------------------------------------------------------- small parts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["float32", "half"])
@torch.no_grad()
def test_group_norm_of_half_inputs_is_computed_in_float32(dtype, weights):
    norm = fill(normalization(64))
    x = (torch.randn(2, 64, 6, 5, generator=torch.Generator().manual_seed(0)) + 5).to(dtype)
    if weights == "half":
        norm.to(dtype)
    want = nn.functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    got = norm(x)
    assert isinstance(norm, GroupNorm32) and got.dtype == dtype
    compare(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_scale_and_mean():
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    compare(scale_module(layer, 0.5).weight, before * 0.5)
    compare(mean_flat(torch.arange(12.0).reshape(2, 2, 3)), [2.5, 8.5])


def test_hybrid_conditioner():
    both = HybridConditioner({"target": "torch.nn.Identity"}, {"target": "torch.nn.Identity"})
    out = both(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 4))
    assert {name: [c.shape for c in conditions] for name, conditions in out.items()} == {
        "c_concat": [(1, 3, 8, 8)],
        "c_crossattn": [(1, 3, 4)],
    }
