"""Encoder, Decoder and Model: stored numbers, agreement with diffusers, sizes, names and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules import model as M
from ldm.util import ConfigError
from tests.reference_rule import fill

DD = dict(
    double_z=True,
    z_channels=4,
    resolution=32,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1, 2, 2],
    num_res_blocks=1,
    attn_resolutions=[16, 8],
    dropout=0.0,
)
SMALL = DD | dict(ch=8, num_groups=4)


@torch.no_grad()
def test_encoder_and_decoder_reference_numbers(reference):
    ref = reference("b07_encoder_decoder_vanilla")
    x, z = ref.input("x"), ref.input("z")
    without = fill(M.Encoder(**DD | dict(attn_type="none")))
    ref.check_all(dict(enc=fill(M.Encoder(**DD))(x), dec=fill(M.Decoder(**DD))(z), enc_none=without(x)))


def test_timestep_embedding_reference_numbers(reference):
    ref = reference("b09_autoencoder_misc")
    t = ref.input("t")
    ref.check_all(dict(e32=M.get_timestep_embedding(t, 32), e33=M.get_timestep_embedding(t, 33)))


@torch.no_grad()
def test_norm_eps_reference_numbers(reference):
    ref = reference("e11_norm_eps_small_inputs")
    x = ref.input("x")
    block = fill(M.ResnetBlock(in_channels=32, dropout=0.0, temb_channels=0))
    ref.check(model_normalize=fill(M.Normalize(32))(x), ae_attn=fill(M.AttnBlock(32))(x), ae_res=block(x, None))


def diffusers_name(name: str, levels: int) -> str:
    """Name of one of our parameters in diffusers' AutoencoderKL."""
    head, _, rest = name.partition(".")
    parts = rest.split(".")
    if parts[0] in ("down", "up"):
        level = int(parts[1]) if parts[0] == "down" else levels - 1 - int(parts[1])
        if parts[2] == "block":
            middle = [f"{parts[0]}_blocks", str(level), "resnets", parts[3], *parts[4:]]
        else:
            middle = [f"{parts[0]}_blocks", str(level), f"{parts[2]}rs", "0", *parts[3:]]
    elif parts[0] == "mid" and parts[1] == "attn_1":
        layer = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}[parts[2]]
        middle = ["mid_block", "attentions", "0", layer, parts[3]]
    elif parts[0] == "mid":
        middle = ["mid_block", "resnets", str(int(parts[1][-1]) - 1), *parts[2:]]
    else:
        middle = [{"norm_out": "conv_norm_out"}.get(parts[0], parts[0]), *parts[1:]]
    return ".".join([head, *middle]).replace("nin_shortcut", "conv_shortcut")


@torch.no_grad()
def test_same_numbers_as_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is needed for the parity test")
    config = DD | dict(ch=16, ch_mult=[1, 2, 2], attn_resolutions=[], num_res_blocks=2, num_groups=8)
    ours = nn.ModuleDict({"encoder": fill(M.Encoder(**config)), "decoder": fill(M.Decoder(**config))}).eval()
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    wanted = theirs.state_dict()
    mapped = {diffusers_name(k, 3): v for k, v in ours.state_dict().items()}
    assert set(mapped) == set(wanted)
    theirs.load_state_dict({k: v.reshape(wanted[k].shape) for k, v in mapped.items()})
    x, z = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 4, 6)
    torch.testing.assert_close(ours["encoder"](x), theirs.encoder(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["decoder"](z), theirs.decoder(z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (20, 12), (32, 64)])
def test_every_size_that_the_factor_divides(size):
    x = torch.randn(1, 3, *size)
    z = M.Encoder(**SMALL)(x)
    assert z.shape == (1, 8, size[0] // 4, size[1] // 4)
    assert M.Decoder(**SMALL)(z[:, :4]).shape == x.shape


def test_published_names():
    names = set(M.Encoder(**SMALL).state_dict())
    assert {"down.0.block.0.norm1.weight", "down.0.downsample.conv.bias", "mid.attn_1.q.weight", "down.1.attn.0.proj_out.bias"} <= names
    assert "down.0.attn.0.q.weight" not in names and "down.2.downsample.conv.weight" not in names
    names = M.Decoder(**SMALL).state_dict()
    assert {"up.2.upsample.conv.weight", "up.0.block.1.conv1.weight", "up.0.block.0.nin_shortcut.weight"} <= set(names)
    assert "up.0.upsample.conv.weight" not in names and names["mid.attn_1.q.weight"].shape == (16, 16, 1, 1)


def test_num_groups_reaches_every_norm():
    for network in (M.Encoder(**SMALL), M.Decoder(**SMALL)):
        norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
        assert norms and {n.num_groups for n in norms} == {4} and {n.eps for n in norms} == {1e-6}


@pytest.mark.parametrize("attn_type", ["vanilla", "linear", "none", "vanilla-xformers"])
@pytest.mark.parametrize("resamp_with_conv", [True, False])
def test_options_build_and_run(attn_type, resamp_with_conv):
    config = SMALL | dict(attn_type=attn_type, resamp_with_conv=resamp_with_conv)
    assert M.Decoder(**config)(M.Encoder(**config)(torch.randn(1, 3, 16, 16))[:, :4]).shape == (1, 3, 16, 16)


def test_use_linear_attn_is_attn_type_linear():
    assert isinstance(M.Encoder(**SMALL | dict(use_linear_attn=True)).mid.attn_1, M.LinAttnBlock)


@torch.no_grad()
def test_decoder_endings():
    z = torch.randn(1, 4, 4, 4)
    plain, tanh = fill(M.Decoder(**SMALL)), fill(M.Decoder(**SMALL, tanh_out=True))
    torch.testing.assert_close(tanh(z), plain(z).tanh())
    features = fill(M.Decoder(**SMALL, give_pre_end=True))(z)
    torch.testing.assert_close(plain.conv_out(M.nonlinearity(plain.norm_out(features))), plain(z))


@torch.no_grad()
def test_attention_is_softmax_attention():
    block, x = fill(M.AttnBlock(8, num_groups=4)), torch.randn(2, 8, 3, 5)
    h = block.norm(x)
    q, k, v = (layer(h).flatten(2) for layer in (block.q, block.k, block.v))
    weights = (q.transpose(1, 2) @ k / 8**0.5).softmax(dim=-1)  # (B, HW, HW)
    expected = x + block.proj_out((v @ weights.transpose(1, 2)).view_as(x))
    torch.testing.assert_close(block(x), expected)


@torch.no_grad()
def test_channels_last_gives_the_same_numbers():
    encoder, x = fill(M.Encoder(**SMALL)), torch.randn(2, 3, 16, 16)
    expected = encoder(x)
    got = encoder.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_refusals_name_what_is_wrong():
    with pytest.raises(ConfigError, match="ch_multt"):
        M.Encoder(**SMALL, ch_multt=[1])
    with pytest.raises(ConfigError, match="num_groups"):
        M.Decoder(**DD | dict(ch=8))
    with pytest.raises(ConfigError, match="vanilla, linear, none"):
        M.make_attn(32, "flash")


UNET = dict(ch=8, out_ch=3, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[8], resolution=16, num_groups=4)


def test_ddpm_unet_with_timesteps_and_with_context():
    x = torch.randn(2, 3, 16, 16)
    unet = fill(M.Model(in_channels=3, **UNET))
    early, late = (unet(x, torch.tensor([t, t])) for t in (3, 900))
    assert early.shape == x.shape and not torch.allclose(early, late)
    with pytest.raises(ValueError, match="pass t"):
        unet(x)
    timeless = M.Model(in_channels=4, use_timestep=False, **UNET)
    assert timeless(x, context=torch.randn(2, 1, 16, 16)).shape == x.shape
    assert timeless.get_last_layer() is timeless.conv_out.weight


def test_gradients_reach_every_parameter():
    encoder, decoder = M.Encoder(**SMALL), M.Decoder(**SMALL)
    decoder(encoder(torch.randn(2, 3, 16, 16))[:, :4]).square().mean().backward()
    # Half of the last convolution (log-variances) is not used here, but belongs to the same tensors.
    assert all(p.grad is not None and p.grad.isfinite().all() for m in (encoder, decoder) for p in m.parameters())


def test_networks_build_on_the_meta_device():
    with torch.device("meta"):
        decoder = M.Decoder(**DD | dict(ch=128, ch_mult=[1, 2, 4, 4]))
        assert decoder(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 64, 64)
    assert all(p.is_meta for p in decoder.parameters())
