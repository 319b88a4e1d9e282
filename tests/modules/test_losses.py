"""First-stage losses: closed forms, adversarial balance, vector quantiser, and LPIPS weights that are or are not at hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator, ReconstructionKL
from ldm.modules.losses import lpips as lpips_module
from ldm.modules.losses.adversarial import adopt_weight, hinge_d_loss, vanilla_d_loss
from ldm.modules.losses.discriminator import ActNorm, NLayerDiscriminator
from ldm.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, measure_perplexity
from ldm.modules.vqvae.quantize import VectorQuantizer2
from ldm.util import ConfigError, UserError
from tests.reference_rule import W, fill

PLAIN = dict(disc_start=0, perceptual_weight=0.0, disc_num_layers=1)


def posterior(value: float = 0.5) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.full((2, 4, 2, 2), value))


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 16, 16, generator=g) * 2 - 1, torch.rand(2, 3, 16, 16, generator=g) * 2 - 1


@pytest.mark.parametrize("pixel_loss", ["l1", "l2", "huber"])
def test_reconstruction_kl_closed_form(pixel_loss):
    x, y = pictures()
    d = (x - y).abs()
    pixel = {"l1": d, "l2": d**2, "huber": torch.where(d < 1, 0.5 * d**2, d - 0.5)}[pixel_loss].mean()
    kl = 8 * 0.5 * (0.25 + math.exp(0.5) - 1 - 0.5)  # eight latent elements with mean 0.5 and log-variance 0.5
    loss, logs = ReconstructionKL(pixel_loss, kl_weight=0.1)(x, y, posterior(), split="val")
    assert loss.item() == pytest.approx(pixel.item() + 0.1 * kl, rel=1e-5)
    assert set(logs) == {"val/total_loss", "val/rec_loss", "val/kl_loss"} and logs["val/kl_loss"].item() == pytest.approx(kl, rel=1e-5)


def test_reconstruction_kl_has_no_state_and_one_player():
    loss = ReconstructionKL()
    assert loss.state_dict() == {}
    with pytest.raises(ValueError, match="optimizer_idx"):
        loss(*pictures(), posterior(), 1)
    with pytest.raises(ConfigError, match="l1, l2, huber"):
        ReconstructionKL("l3")


def test_kl_loss_without_adversary_is_the_summed_likelihood():
    x, y = pictures()
    criterion = LPIPSWithDiscriminator(**PLAIN, disc_factor=0.0, logvar_init=0.3, kl_weight=0.01)
    loss, logs = criterion(x, y, posterior(), 0, 0)
    nll = ((x - y).abs() / math.exp(0.3) + 0.3).sum() / 2
    assert loss.item() == pytest.approx((nll + 0.01 * posterior().kl().mean()).item(), rel=1e-5)
    assert set(criterion.state_dict()) == {"logvar"} and logs["train/g_loss"] == 0


def test_elementwise_weights():
    x, y = pictures()
    criterion = LPIPSWithDiscriminator(**PLAIN, disc_factor=0.0, kl_weight=0.0)
    half, full = (criterion(x, y, posterior(), 0, 0, weights=torch.full((1,), w))[0] for w in (0.5, 1.0))
    torch.testing.assert_close(half, 0.5 * full)


def adversarial_setup() -> tuple[LPIPSWithDiscriminator, nn.Conv2d, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 3, 3, padding=1)
    x, y = pictures()
    return LPIPSWithDiscriminator(**PLAIN, disc_weight=0.5, kl_weight=0.0), layer, x, layer(y)


def test_adversarial_gradient_is_balanced_at_the_last_layer():
    criterion, layer, x, reconstruction = adversarial_setup()
    loss, logs = criterion(x, reconstruction, posterior(), 0, 0, last_layer=layer.weight)
    nll = (x - reconstruction).abs().sum() / 2
    g_loss = -criterion.discriminator(reconstruction).mean()
    nll_grad, g_grad = (torch.autograd.grad(v, layer.weight, retain_graph=True)[0] for v in (nll, g_loss))
    weight = (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0, 1e4) * 0.5
    assert logs["train/d_weight"].item() == pytest.approx(weight.item(), rel=1e-3)
    assert loss.item() == pytest.approx((nll + weight * g_loss).item(), rel=1e-3)


def test_discriminator_sleeps_until_disc_start():
    criterion, layer, x, reconstruction = adversarial_setup()
    criterion.discriminator_iter_start = 10
    loss, logs = criterion(x, reconstruction, posterior(), 0, 9, last_layer=layer.weight)
    assert logs["train/disc_factor"] == 0 and loss.item() == pytest.approx((x - reconstruction).abs().sum().item() / 2, rel=1e-5)
    assert not criterion.discriminator_active(9) and criterion.discriminator_active(10)
    assert criterion(x, reconstruction, posterior(), 1, 9)[0] == 0 and criterion(x, reconstruction, posterior(), 1, 10)[0] > 0


def test_discriminator_loss_leaves_the_generator_alone():
    criterion, layer, x, reconstruction = adversarial_setup()
    loss, logs = criterion(x, reconstruction, posterior(), 1, 0)
    loss.backward()
    assert layer.weight.grad is None and criterion.discriminator.main[0].weight.grad.abs().sum() > 0
    assert set(logs) == {"train/disc_loss", "train/logits_real", "train/logits_fake"}


def test_validation_without_gradients_has_no_adversarial_term():
    criterion, _, x, reconstruction = adversarial_setup()
    with torch.no_grad():
        loss, _ = criterion(x, reconstruction, posterior(), 0, 0, split="val")
    assert loss.item() == pytest.approx((x - reconstruction).abs().sum().item() / 2, rel=1e-5)


def test_conditional_discriminator_needs_its_condition():
    criterion = LPIPSWithDiscriminator(**PLAIN, disc_conditional=True, disc_in_channels=4)
    x, y = pictures()
    assert criterion(x, y, posterior(), 1, 0, cond=torch.zeros(2, 1, 16, 16))[0].isfinite()
    with pytest.raises(ValueError, match="pass cond"):
        criterion(x, y, posterior(), 1, 0)


def test_discriminator_losses_closed_forms():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    expected = 0.5 * (-torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean())
    assert vanilla_d_loss(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)
    assert adopt_weight(0.7, 4, threshold=5) == 0.0 and adopt_weight(0.7, 5, threshold=5) == 0.7
    with pytest.raises(ConfigError, match="hinge, vanilla"):
        LPIPSWithDiscriminator(**PLAIN, disc_loss="wasserstein")


def test_patch_discriminator_shapes_and_names():
    network = NLayerDiscriminator(3, 64, 3)
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 1, 6, 6)
    shapes = {k: tuple(v.shape) for k, v in network.named_parameters()}
    assert shapes["main.8.weight"] == (512, 256, 4, 4) and shapes["main.11.weight"] == (1, 512, 4, 4)
    assert "main.2.bias" not in shapes and "main.2.bias" in dict(NLayerDiscriminator(3, 8, 2, use_actnorm=True).named_parameters())


def test_actnorm_normalises_its_first_batch():
    layer, x = ActNorm(4), 3 + 2 * torch.randn(8, 4, 10, 10)
    out = layer(x)
    assert out.mean((0, 2, 3)).abs().max() < 1e-4 and (out.std((0, 2, 3)) - 1).abs().max() < 1e-3 and layer.initialized == 1
    torch.testing.assert_close(layer(x), out)


# -- vector quantisation -----------------------------------------------------------------------------------------------


def test_quantizer_reference_numbers(reference):
    ref = reference("b08_vector_quantizer")
    legacy, sane = fill(VectorQuantizer2(16, 4, 0.25)), fill(VectorQuantizer2(16, 4, 0.25, sane_index_shape=True, legacy=False))
    z = ref.input("z").requires_grad_(True)
    zq, loss, (_, _, idx) = legacy(z)
    (zq.sum() + loss).backward()
    _, loss_new, (_, _, idx_sane) = sane(z)
    outputs = dict(zq=zq, loss_legacy=loss, idx=idx, loss_new=loss_new, idx_sane=idx_sane)
    ref.check_all(outputs | dict(grad_z=z.grad, grad_codebook=legacy.embedding.weight.grad))


def test_quantizer_picks_the_nearest_entry_and_gives_it_back():
    quantizer = fill(VectorQuantizer2(16, 4, 0.25, sane_index_shape=True))
    z = torch.randn(2, 4, 3, 5)
    zq, _, (_, _, idx) = quantizer(z)
    vectors = z.permute(0, 2, 3, 1)
    expected = (vectors[..., None, :] - quantizer.embedding.weight).norm(dim=-1).argmin(dim=-1)
    assert torch.equal(idx, expected)
    torch.testing.assert_close(quantizer.get_codebook_entry(idx.reshape(-1), (2, 3, 5, 4)), zq)
    assert torch.equal(quantizer(zq)[2][2], idx)
    with pytest.raises(ValueError, match="logits"):
        quantizer(z, temp=0.5)


@pytest.mark.parametrize("unknown, allowed", [("extra", {0, 1, 2, 3}), ("random", {0, 1, 2}), (1, {0, 1, 2})])
def test_quantizer_remap(tmp_path, unknown, allowed):
    import numpy as np

    np.save(tmp_path / "used.npy", np.array([2, 5, 7]))
    quantizer = VectorQuantizer2(8, 4, 0.25, remap=str(tmp_path / "used.npy"), unknown_index=unknown)
    mapped = quantizer.remap_to_used(torch.tensor([[2, 5, 7, 0]]))
    assert mapped[0, :3].tolist() == [0, 1, 2] and mapped[0, 3].item() in allowed
    assert quantizer.unmap_to_all(mapped[:, :3]).tolist() == [[2, 5, 7]]
    assert quantizer(torch.randn(1, 4, 2, 2))[2][2].shape == (4, 1)


def test_vq_loss_closed_form_and_codebook_use():
    x, y = pictures()
    criterion = VQLPIPSWithDiscriminator(**PLAIN, disc_factor=0.0, codebook_weight=2.0, n_classes=8, pixel_loss="l2")
    loss, logs = criterion(torch.tensor(0.25), x, y, 0, 0, predicted_indices=torch.tensor([0, 1, 2, 3]))
    assert loss.item() == pytest.approx((x - y).square().mean().item() + 0.5, rel=1e-5)
    assert logs["train/perplexity"].item() == pytest.approx(4.0, rel=1e-4) and logs["train/cluster_usage"] == 4
    assert measure_perplexity(torch.zeros(5, dtype=torch.long), 8)[0].item() == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(ConfigError, match="l1 or l2"):
        VQLPIPSWithDiscriminator(**PLAIN, pixel_loss="l7")


# -- LPIPS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights_around(monkeypatch, tmp_path):
    monkeypatch.delenv(lpips_module.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(lpips_module, "_LINEAR_FILES", ())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def lpips_folder(tmp_path_factory):
    """Random VGG16 under torchvision's names and non-negative lin layers, as two files."""
    folder = tmp_path_factory.mktemp("lpips")
    numbers = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    vgg = {}
    for n, c_in, c_out in zip(numbers, widths[:-1], widths[1:], strict=True):
        vgg[f"features.{n}.weight"] = torch.from_numpy(W(f"{n}.weight", (c_out, c_in, 3, 3))) * 1.4
        vgg[f"features.{n}.bias"] = torch.from_numpy(W(f"{n}.bias", (c_out,)))
    vgg["classifier.0.weight"] = torch.zeros(1)
    lin = {f"lin{i}.model.1.weight": torch.full((1, c, 1, 1), 1.0 + i) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg, folder / "vgg16.pth")
    torch.save(lin, folder / "vgg.pth")
    return folder


def test_missing_perceptual_weights_are_told_at_the_start_not_at_construction(no_weights_around):
    criterion = LPIPSWithDiscriminator(disc_start=0, disc_factor=0.0)
    with pytest.raises(UserError, match=r"perceptual_weights.*LDM_LPIPS_WEIGHTS.*perceptual_weight: 0"):
        criterion.prepare()
    with pytest.raises(UserError, match="VGG16"):
        criterion(*pictures(), posterior(), 0, 0)
    with pytest.raises(UserError, match="do not exist"):
        LPIPSWithDiscriminator(disc_start=0, perceptual_weights="/nowhere").prepare()


def test_damaged_perceptual_weights(no_weights_around, tmp_path):
    (tmp_path / "vgg16.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        LPIPSWithDiscriminator(disc_start=0, perceptual_weights=str(tmp_path)).prepare()


def test_lpips_against_its_definition(no_weights_around, lpips_folder, monkeypatch):
    torchvision = pytest.importorskip("torchvision", reason="torchvision's VGG16 is the independent witness")
    monkeypatch.setenv(lpips_module.ENVIRONMENT_VARIABLE, str(lpips_folder))
    network = lpips_module.LPIPS()
    assert not network.ready
    network.prepare()
    assert network.ready and not network.train().training and not any(p.requires_grad for p in network.parameters())
    vgg = torchvision.models.vgg16().features.eval()
    stored = torch.load(lpips_folder / "vgg16.pth", weights_only=True)
    vgg.load_state_dict({k.removeprefix("features."): v for k, v in stored.items() if k.startswith("features.")})
    x, y = (torch.rand(2, 3, 32, 32) * 2 - 1 for _ in range(2))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = torch.zeros(2)
    a, b = ((v - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for v in (x, y))
    with torch.no_grad():
        for n, layer in enumerate(vgg):
            a, b = layer(a), layer(b)
            if n in (3, 8, 15, 22, 29):
                i = (3, 8, 15, 22, 29).index(n)
                unit = (nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)) ** 2
                expected += (1.0 + i) * unit.sum(1).mean((1, 2))
        got = network(x, y)
        assert got.shape == (2, 1, 1, 1) and network(x, x).abs().max() == 0
    torch.testing.assert_close(got.flatten(), expected, rtol=1e-3, atol=1e-5)


def test_perceptual_gradient_and_weights_from_an_autoencoder_checkpoint(no_weights_around, lpips_folder, tmp_path):
    source = LPIPSWithDiscriminator(disc_start=0, disc_factor=0.0, perceptual_weights=str(lpips_folder))
    source.prepare()
    torch.save({"state_dict": {f"loss.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "kl.ckpt")
    criterion = LPIPSWithDiscriminator(disc_start=0, disc_factor=0.0, perceptual_weights=str(tmp_path / "kl.ckpt"))
    x, y = pictures()
    y.requires_grad_(True)
    loss, _ = criterion(x, y, posterior(), 0, 0)
    torch.testing.assert_close(loss, source(x, y, posterior(), 0, 0)[0])
    loss.backward()
    assert y.grad.isfinite().all()
    loaded = LPIPSWithDiscriminator(disc_start=0, disc_factor=0.0)
    loaded.load_state_dict(source.state_dict())
    loaded.prepare()  # nothing to find: the checkpoint brought the weights
