"""The depth model: names and shapes, that it looks at the image, refusals."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.freezing import is_frozen
from ldm.modules.midas.api import MiDaSInference
from ldm.modules.midas.dpt import Decoder, ProjectReadout
from ldm.util import ConfigError, UserError
from tests.reference_rule import fill, philox


@pytest.fixture(scope="module")
def model() -> MiDaSInference:
    return fill(MiDaSInference("dpt_hybrid"))


def test_published_names():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in MiDaSInference("dpt_hybrid").state_dict().items()}
    expected = {
        "model.pretrained.model.cls_token": (1, 1, 768),
        "model.pretrained.model.pos_embed": (1, 577, 768),
        "model.pretrained.model.patch_embed.backbone.stem.conv.weight": (64, 3, 7, 7),
        "model.pretrained.model.patch_embed.backbone.stages.2.blocks.8.conv3.weight": (1024, 256, 1, 1),
        "model.pretrained.model.patch_embed.proj.weight": (768, 1024, 1, 1),
        "model.pretrained.model.blocks.11.attn.qkv.weight": (2304, 768),
        "model.pretrained.model.head.weight": (1000, 768),
        "model.pretrained.act_postprocess3.0.project.0.weight": (768, 1536),
        "model.pretrained.act_postprocess3.3.weight": (768, 768, 1, 1),
        "model.pretrained.act_postprocess4.4.weight": (768, 768, 3, 3),
        "model.scratch.layer1_rn.weight": (256, 256, 3, 3),
        "model.scratch.layer2_rn.weight": (256, 512, 3, 3),
        "model.scratch.refinenet4.resConfUnit1.conv1.bias": (256,),
        "model.scratch.refinenet1.out_conv.weight": (256, 256, 1, 1),
        "model.scratch.output_conv.0.weight": (128, 256, 3, 3),
        "model.scratch.output_conv.2.weight": (32, 128, 3, 3),
        "model.scratch.output_conv.4.weight": (1, 32, 1, 1),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert {name.split(".")[1] for name in shapes} == {"pretrained", "scratch"}


def test_depth_of_an_image_of_any_legal_size(model):
    for size in ((64, 96), (32, 32)):
        x = philox(0, (2, 3, *size), 0.5)
        depth = model(x)
        assert depth.shape == (2, 1, *size) and torch.isfinite(depth).all() and not depth.requires_grad
        torch.testing.assert_close(model(x[1:]), depth[1:], rtol=1e-3, atol=1e-4)  # every image for itself
    assert not torch.equal(depth[0], depth[1])


@torch.no_grad()
def test_backbone_is_timms_at_its_own_size(model):
    """The last tokens are those of timm's own forward: the positions are not resized there."""
    backbone, seen = model.model.pretrained, []
    hook = backbone.model.blocks[11].register_forward_hook(lambda module, args, out: seen.append(out))
    x = philox(0, (1, 3, 384, 384), 0.5)
    levels = backbone(x)
    hook.remove()
    assert [tuple(level.shape[1:]) for level in levels] == [(256, 96, 96), (512, 48, 48), (768, 24, 24), (768, 12, 12)]
    torch.testing.assert_close(backbone.model.norm(seen[0]), backbone.model.forward_features(x), rtol=1e-3, atol=1e-4)


def test_readout_and_decoder_shapes():
    assert ProjectReadout(8)(torch.zeros(2, 1 + 5, 8)).shape == (2, 5, 8)
    levels = [torch.zeros(1, c, 32 // s, 64 // s) for c, s in ((256, 4), (512, 8), (768, 16), (768, 32))]
    assert Decoder()(levels).shape == (1, 1, 32, 64)


def test_stays_frozen(model):
    assert is_frozen(model.model) and not model.train().model.training and not any(p.requires_grad for p in model.parameters())


def test_refusals(model):
    with pytest.raises(ConfigError, match="use dpt_hybrid"):
        MiDaSInference("midas_v21_small")
    with pytest.raises(UserError, match="multiples of 32"):
        model(torch.zeros(1, 3, 40, 32))
