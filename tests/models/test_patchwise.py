"""Patch-wise network and first stage: stored numbers of the published code, its recipe written out, and truths that need no numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.patchwise import SplitParams
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import ConfigError
from tests.analytic import latent_model
from tests.reference_rule import fill, philox

SPLIT = {
    "ks": (8, 8),
    "stride": (4, 4),
    "vqf": 2,
    "patch_distributed_vq": True,
    "tie_braker": False,
    "clip_max_weight": 0.5,
    "clip_min_weight": 0.01,
    "clip_max_tie_weight": 0.5,
    "clip_min_tie_weight": 0.01,
}
UNET = {
    "image_size": 8,
    "in_channels": 7,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1, 2],
    "num_heads": 4,
}
CROSS = {"in_channels": 4, "use_spatial_transformer": True, "context_dim": 16, "legacy": False}
DD = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
NO_LOSS = {"target": "torch.nn.Identity"}
KL = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": DD, "lossconfig": NO_LOSS}}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {"embed_dim": 4, "n_embed": 64, "ddconfig": DD | {"double_z": False}, "lossconfig": NO_LOSS},
}


def unet(**changes: Any) -> dict[str, Any]:
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET | changes}


def split_model(split: dict[str, Any] | None = SPLIT, **changes: Any) -> LatentDiffusion:
    model = fill(latent_model(**changes))
    if split is not None:
        model.split_input_params = dict(split)
    return model


# -- stored numbers ----------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_network_against_the_published_code(reference):
    ref = reference("h01_split_apply_model")
    x, t, concat, context = (ref.input(name) for name in ("x", "t", "cc", "ctx"))
    model = split_model(None, unet_config=unet(), conditioning_key="concat", cond_stage_key="LR_image")
    outputs = {"unsplit": model.apply_model(x, t, concat)}
    for name, changes in {"concat": {}, "concat_tie": {"tie_braker": True}, "concat_rect": {"ks": (8, 6), "stride": (8, 5)}}.items():
        model.split_input_params = SPLIT | changes
        outputs[name] = model.apply_model(x, t, concat)
    model = split_model(unet_config=unet(**CROSS))
    outputs["crossattn"] = model.apply_model(x, t, context)
    outputs["crossattn_rect_input"] = model.apply_model(x[..., :12], t, context)
    ref.check_all(outputs)


def test_weights_against_the_published_code(reference):
    ref = reference("h03_split_weighting")
    x = ref.input("x")
    model = split_model()
    outputs = {"delta_border": model.delta_border(5, 7), "meshgrid": model.meshgrid(2, 3)}
    for tie in (False, True):
        model.split_input_params = SPLIT | {"tie_braker": tie}
        outputs[f"weighting_tie{int(tie)}"] = model.get_weighting(4, 6, 2, 3, "cpu")
        for name, factor in {"1": {}, "uf2": {"uf": 2}, "df2": {"df": 2}}.items():
            _, unfold, norm, weights = model.get_fold_unfold(x, (8, 8), (4, 4), **factor)
            outputs |= {f"norm_{name}_tie{int(tie)}": norm, f"w_{name}_tie{int(tie)}": weights}
    ref.check_all(outputs | {"unfold": unfold(x)})


# -- the published recipe, written out ---------------------------------------------------------------------------------
def by_folding(model: LatentDiffusion, x: Tensor, run: Any, **factor: int) -> Tensor:
    """Unfold, run patch by patch, weigh, fold, normalise."""
    ks, stride = model.split_input_params["ks"], model.split_input_params["stride"]
    fold, unfold, norm, weights = model.get_fold_unfold(x, ks, stride, **factor)
    patches = unfold(x).view(len(x), -1, *ks, weights.shape[-1])
    out = torch.stack([run(patch) for patch in patches.unbind(-1)], dim=-1) * weights
    return fold(out.view(len(x), -1, out.shape[-1])) / norm


@torch.no_grad()
@pytest.mark.parametrize("tie", [False, True])
def test_vq_first_stage_follows_the_recipe(tie):
    model = split_model(first_stage_config=VQ)
    z, image, first = philox(0, (1, 4, 16, 16)), philox(1, (1, 3, 32, 32), 0.5), model.first_stage_model
    model.split_input_params["tie_braker"] = tie
    for raw in (True, False):
        want = by_folding(model, z / model.scale_factor, lambda p, raw=raw: first.decode(p, force_not_quantize=raw), uf=2)
        torch.testing.assert_close(model.decode_first_stage(z, force_not_quantize=raw), want)
    model.split_input_params |= {"ks": (16, 16), "stride": (8, 8)}
    torch.testing.assert_close(model.encode_first_stage(image), by_folding(model, image, first.encode, df=2))
    assert tuple(model.split_input_params["original_image_size"]) == (32, 32)


@torch.no_grad()
def test_kl_first_stage_blends_the_moments():
    model = split_model(SPLIT | {"ks": (16, 16), "stride": (8, 8)}, first_stage_config=KL)
    image, z, first = philox(0, (2, 3, 32, 32), 0.5), philox(1, (2, 4, 32, 32)), model.first_stage_model
    posterior = model.encode_first_stage(image)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    torch.testing.assert_close(posterior.parameters, by_folding(model, image, lambda p: first.encode(p).parameters, df=2))
    assert model.get_first_stage_encoding(posterior).shape == (2, 4, 16, 16)
    torch.testing.assert_close(model.decode_first_stage(z), by_folding(model, z / model.scale_factor, first.decode, uf=2))


# -- truths ------------------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("ks, stride", [((8, 8), (4, 4)), ((8, 8), (5, 7)), ((3, 16), (2, 16)), ((40, 40), (40, 8)), ((1, 1), (1, 1))])
def test_a_network_of_single_pixels_gives_the_same_in_patches(ks, stride, tie):
    """Whatever the patches: they cover the whole, also where the step does not divide it, and their weights add up to one."""
    model = split_model(None)
    x, t, c = philox(0, (2, 4, 13, 16)), torch.tensor([3, 981]), philox(1, (2, 1, 4))
    whole = model.apply_model(x, t, c)
    model.split_input_params = {"ks": ks, "stride": stride, "tie_braker": tie}
    torch.testing.assert_close(model.apply_model(x, t, c), whole)


@torch.no_grad()
def test_one_patch_is_the_whole_and_removal_ends_it():
    model = split_model(first_stage_config=VQ)
    z = philox(0, (1, 4, 16, 16))
    model.split_input_params |= {"ks": (32, 32), "stride": (32, 32)}
    one = model.decode_first_stage(z, force_not_quantize=True)
    model.split_input_params |= SPLIT | {"patch_distributed_vq": False}
    off = model.decode_first_stage(z, force_not_quantize=True)
    assert hasattr(model, "split_input_params")
    del model.split_input_params
    whole = model.decode_first_stage(z, force_not_quantize=True)
    torch.testing.assert_close(one, whole)
    assert torch.equal(off, whole) and not hasattr(model, "split_input_params")


@torch.no_grad()
def test_hybrid_conditioning_is_cut_where_it_has_a_place():
    model = split_model(None, conditioning_key="hybrid")
    x, t = philox(0, (1, 4, 16, 16)), torch.tensor([500])
    cond = {"c_concat": [philox(1, (1, 2, 16, 16))], "c_crossattn": [philox(2, (1, 3, 4))]}
    whole = model.apply_model(x, t, cond)
    model.split_input_params = dict(SPLIT)
    torch.testing.assert_close(model.apply_model(x, t, cond), whole)


@torch.no_grad()
def test_samplers_work_in_patches():
    model = split_model(None)
    sampling = {"S": 4, "batch_size": 1, "shape": (4, 16, 16), "conditioning": philox(1, (1, 1, 4)), "verbose": False}
    sampling |= {"x_T": philox(0, (1, 4, 16, 16)), "unconditional_guidance_scale": 3.0, "unconditional_conditioning": torch.zeros(1, 1, 4)}
    whole = DDIMSampler(model).sample(**sampling)[0]
    model.split_input_params = dict(SPLIT)
    torch.testing.assert_close(DDIMSampler(model).sample(**sampling)[0], whole, rtol=1e-4, atol=1e-4)


def test_gradients_pass_through_the_blending():
    model = split_model(first_stage_config=KL)
    z = philox(0, (1, 4, 16, 16)).requires_grad_()
    model.differentiable_decode_first_stage(z).square().mean().backward()
    assert torch.isfinite(z.grad).all() and (z.grad.abs().sum(1) > 0).all()


def test_trains_in_patches():
    model = split_model(SPLIT | {"vqf": 1}, unet_config=unet(in_channels=8), conditioning_key="concat", cond_stage_key="LR_image").train()
    loss, _ = model.shared_step({"image": torch.randn(2, 16, 16, 4), "LR_image": torch.randn(2, 16, 16, 4)})
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.trainable_parameters())


def test_weights_are_highest_in_the_middle_and_finite_everywhere():
    distance = LatentDiffusion.delta_border(5, 5)
    assert distance[2, 2] == distance.max() == 0.5 and distance[0].max() == 0
    assert np.isfinite(LatentDiffusion.delta_border(1, 4).numpy()).all()


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kernel": 3}, "does not know kernel; it takes ks, stride"),
        ({"ks": 8}, "ks 8 must be two positive whole numbers"),
        ({"stride": (9, 4)}, "leaves gaps between patches"),
        ({"clip_min_weight": 0.0}, "must be above 0"),
    ],
)
def test_wrong_parameters(changes, message):
    with pytest.raises(ConfigError, match=message):
        SplitParams.read(SPLIT | changes)


def test_missing_parameters():
    with pytest.raises(ConfigError, match="lacks stride, vqf"):
        SplitParams.read({"ks": (8, 8), "patch_distributed_vq": True})
    with pytest.raises(ConfigError, match="need split_input_params on the model"):
        split_model(None).get_weighting(4, 4, 1, 1, "cpu")


@torch.no_grad()
def test_what_cannot_be_cut():
    x, t, c = philox(0, (1, 4, 16, 16)), torch.tensor([1]), philox(1, (1, 1, 4))
    with pytest.raises(ConfigError, match="codebook indices cannot be blended"):
        split_model().apply_model(x, t, c, return_ids=True)
    with pytest.raises(ConfigError, match="bounding boxes"):
        split_model(cond_stage_key="coordinates_bbox").apply_model(x, t, c)
    with pytest.raises(ConfigError, match=r"c_concat of \(32, 32\)"):
        split_model(conditioning_key="concat").apply_model(x, t, philox(1, (1, 2, 32, 32)))
    with pytest.raises(ConfigError, match="all of these must be multiples of vqf"):
        split_model(SPLIT | {"ks": (9, 9)}, first_stage_config=VQ).encode_first_stage(philox(2, (1, 3, 32, 32)))
    with pytest.raises(ConfigError, match="a patch of 8x8 became 16x16, not 32x32: vqf"):
        split_model(SPLIT | {"vqf": 4}, first_stage_config=KL).decode_first_stage(philox(3, (1, 4, 16, 16)))
    with pytest.raises(ConfigError, match="either enlarged or shrunk"):
        split_model().get_fold_unfold(x, (8, 8), (4, 4), uf=2, df=2)
