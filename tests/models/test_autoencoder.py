"""First stages as a whole: stored numbers, names, weights, pictures, and two-step fits with and without a discriminator."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from ldm.models import autoencoder as A
from ldm.models.autoencoder_sgm import AutoencoderKL as SampledAutoencoderKL
from ldm.models.first_stage import psnr
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import CheckpointError, ConfigError, UserError
from tests.reference_rule import fill

DD = dict(
    double_z=True,
    z_channels=4,
    resolution=32,
    in_channels=3,
    out_ch=3,
    ch=32,
    ch_mult=[1, 2],
    num_res_blocks=1,
    attn_resolutions=[],
    dropout=0.0,
)
SMALL = DD | dict(ch=8, num_groups=4, resolution=16)
NO_LOSS = dict(target="torch.nn.Identity")
PLAIN = dict(target="ldm.modules.losses.ReconstructionKL", params=dict(pixel_loss="l1", kl_weight=1e-6))


def gan(start: int = 0, **params):
    params = dict(disc_start=start, perceptual_weight=0.0, disc_num_layers=1, kl_weight=1e-6) | params
    return dict(target="ldm.modules.losses.LPIPSWithDiscriminator", params=params)


def vq_gan(start: int = 0):
    target = "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    return dict(target=target, params=dict(disc_start=start, perceptual_weight=0.0, disc_num_layers=1))


def kl_model(loss=PLAIN, **options) -> A.AutoencoderKL:
    torch.manual_seed(0)
    model = A.AutoencoderKL(SMALL, loss, embed_dim=4, **options)
    model.learning_rate = 1e-3
    return model


def vq_model(loss, cls=A.VQModel, **options) -> A.VQModel:
    torch.manual_seed(0)
    model = cls(ddconfig=SMALL | dict(double_z=False), lossconfig=loss, n_embed=32, embed_dim=4, **options)
    model.learning_rate = 1e-3
    return model


def images(n: int = 8) -> list[dict]:
    g = torch.Generator().manual_seed(5)
    return [{"image": torch.rand(16, 16, 3, generator=g) * 2 - 1, "caption": "noise"} for _ in range(n)]


def fit(model: pl.LightningModule, tmp_path, steps: int = 2, ckpt_path=None, **options) -> pl.Trainer:
    loader = DataLoader(images(), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=steps,
        limit_train_batches=options.pop("batches", 1),
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(model, loader, loader, ckpt_path=ckpt_path)
    return trainer


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(v, before[k]) for k, v in module.named_parameters())


# -- numbers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_kl_reference_numbers(reference):
    ref = reference("b01_kl_f2")
    model = fill(A.AutoencoderKL(DD, NO_LOSS, embed_dim=4, monitor="val/rec_loss"))
    x, p = ref.input("x"), model.encode(ref.input("x"))
    outputs = dict(moments=p.parameters, mean=p.mean, logvar=p.logvar, mode=p.mode(), std=p.std, var=p.var, kl=p.kl())
    outputs |= dict(nll=p.nll(ref.input("z_like")), dec_mode=model.decode(p.mode()), dec_z=model.decode(ref.input("z")))
    torch.manual_seed(77)
    outputs["sample_seed77"] = p.sample()
    torch.manual_seed(78)
    outputs["forward_seed78"] = model(x)[0]
    ref.check_all(outputs | dict(forward_mode=model(x, sample_posterior=False)[0]))


@torch.no_grad()
def test_vq_interface_reference_numbers(reference):
    ref = reference("b04_vq_interface_f2")
    config = DD | dict(double_z=False, z_channels=3)
    model = fill(A.VQModelInterface(embed_dim=3, n_embed=64, ddconfig=config, lossconfig=NO_LOSS))
    h = model.encode(ref.input("x"))
    zq, loss, (_, _, indices) = model.quantize(h)
    ids, entry = ref.input("ids"), model.quantize.get_codebook_entry
    distances = torch.cdist(h.permute(0, 2, 3, 1).reshape(-1, 3).double(), model.quantize.embedding.weight.double()) ** 2
    nearest = distances.sort(dim=1).values
    ref.check_all(
        dict(
            h=h,
            zq=zq,
            qloss=loss,
            indices=indices,
            margin_min=(nearest[:, 1] - nearest[:, 0]).min(),
            dec_quant=model.decode(h),
            dec_noquant=model.decode(h, force_not_quantize=True),
            codebook_entry=entry(ids, (1, 4, 4, 3)),
            codebook_entry_flat=entry(ids, None),
        )
    )


@torch.no_grad()
def test_sampled_autoencoder_has_the_same_decoder_and_draws_in_encode(reference):
    ref = reference("b01_kl_f2")
    model = fill(SampledAutoencoderKL(DD, NO_LOSS, embed_dim=4))
    ref.check(dec_z=model.decode(ref.input("z")))
    torch.manual_seed(77)
    z, logs = model.encode(ref.input("x"), return_reg_log=True)
    ref.check(sample_seed77=z)
    assert logs["kl_loss"].item() == pytest.approx(ref["kl"].mean(), rel=1e-4)
    assert model(ref.input("x"))[0].shape == (2, 3, 32, 32)


def test_psnr_closed_form():
    x = torch.zeros(2, 3, 4, 4)
    assert psnr(x + 0.2, x).item() == pytest.approx(20.0, abs=1e-4)  # mse 0.04 against a range of 2
    assert psnr(x + 5.0, x).item() == pytest.approx(10 * torch.log10(torch.tensor(4.0)).item(), abs=1e-4)  # clamped to 1


# -- shapes, input, pictures -------------------------------------------------------------------------------------------


def test_encode_decode_shapes_for_any_legal_size():
    model = kl_model()
    posterior = model.encode(torch.randn(2, 3, 12, 20))
    assert isinstance(posterior, DiagonalGaussianDistribution) and posterior.mean.shape == (2, 4, 6, 10)
    assert model.decode(posterior.mode()).shape == (2, 3, 12, 20)
    assert model.get_last_layer() is model.decoder.conv_out.weight


def test_get_input_is_float_channels_first_and_contiguous():
    model = kl_model()
    x = model.get_input({"image": torch.zeros(2, 16, 12, 3, dtype=torch.float64)}, "image")
    assert x.shape == (2, 3, 16, 12) and x.dtype == torch.float32 and x.is_contiguous()
    assert model.get_input({"mask": torch.zeros(2, 16, 12)}, "mask").shape == (2, 1, 16, 12)


def test_pictures_leave_no_trace_in_checkpoints():
    """Colours for label maps are made when they are first shown: a resumed training knows no such key."""
    model = A.AutoencoderKL(SMALL | dict(in_channels=5, out_ch=5), NO_LOSS, embed_dim=4)
    keys = set(model.state_dict())
    assert model.log_images({"image": torch.rand(1, 16, 16, 5)})["inputs"].shape == (1, 3, 16, 16)
    assert set(model.state_dict()) == keys


def test_log_images_of_the_first_pictures():
    batch = {"image": torch.rand(3, 16, 16, 3)}
    for model in (kl_model(), vq_model(NO_LOSS)):
        assert all(len(picture) == 2 for picture in model.log_images(batch, N=2).values())
    with pytest.raises(ConfigError, match="plot_ema needs an average"):
        vq_model(NO_LOSS).log_images(batch, plot_ema=True)
    with pytest.raises(ConfigError, match="no 'image'; it has jpg: set image_key"):
        kl_model().log_images({"jpg": batch["image"]})


def test_log_images():
    batch = {"image": torch.rand(2, 16, 16, 3)}
    pictures = kl_model().log_images(batch)
    assert set(pictures) == {"inputs", "reconstructions", "samples"} and all(v.shape == (2, 3, 16, 16) for v in pictures.values())
    assert set(kl_model().log_images(batch, only_inputs=True)) == {"inputs"}
    assert set(vq_model(NO_LOSS).log_images(batch)) == {"inputs", "reconstructions"}


def test_label_maps_are_shown_in_colours():
    model = A.AutoencoderKL(SMALL | dict(in_channels=5, out_ch=5), NO_LOSS, embed_dim=4, colorize_nlabels=5)
    shown = model.log_images({"image": torch.rand(1, 16, 16, 5)})["inputs"]
    assert shown.shape == (1, 3, 16, 16) and shown.min() == -1 and shown.max() == 1


def test_vq_codes_round_trip():
    model = vq_model(NO_LOSS, sane_index_shape=True)
    quant, _, (_, _, codes) = model.encode(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(model.decode_code(codes), model.decode(quant), rtol=1e-4, atol=1e-5)


def test_batch_resize_range_only_in_training():
    model = vq_model(NO_LOSS, batch_resize_range=[16, 48])
    batch = {"image": torch.rand(1, 16, 16, 3)}
    assert model.get_input(batch, "image").shape[-1] == 48  # the first steps take the largest
    model.generator_steps = 100
    assert {model.get_input(batch, "image").shape[-1] for _ in range(30)} == {16, 32, 48}
    assert model.eval().get_input(batch, "image").shape[-1] == 16


def test_identity_first_stage():
    x = torch.randn(1, 3, 4, 4)
    identity = A.IdentityFirstStage("ignored", embed_dim=3)
    assert identity.encode(x) is x and identity.decode(x) is x and identity(x) is x and identity.quantize(x) is x
    assert A.IdentityFirstStage(vq_interface=True).quantize(x)[0] is x


# -- training ----------------------------------------------------------------------------------------------------------


def test_fit_without_discriminator(tmp_path):
    model = kl_model(monitor="val/rec_loss")
    before = snapshot(model)
    trainer = fit(model, tmp_path)
    assert changed(model.encoder, {k.removeprefix("encoder."): v for k, v in before.items() if k.startswith("encoder.")})
    assert len(trainer.optimizers) == 1 and model.generator_steps == trainer.global_step == 2
    metrics = trainer.callback_metrics
    assert {"train/rec_loss", "train/kl_loss", "train/total_loss", "train/psnr", "val/rec_loss", "val/psnr"} <= set(metrics)


def test_fit_with_discriminator(tmp_path):
    model = kl_model(gan(), learn_logvar=True)
    before = snapshot(model.loss)
    trainer = fit(model, tmp_path)
    assert len(trainer.optimizers) == 2 and model.generator_steps == 2 and trainer.global_step == 4
    assert changed(model.loss.discriminator, {k.removeprefix("discriminator."): v for k, v in before.items()})
    assert not torch.equal(model.loss.logvar, before["logvar"])
    assert {"train/disc_loss", "train/g_loss", "aeloss", "discloss"} <= set(trainer.callback_metrics)
    assert all(p.requires_grad for p in model.parameters())


def test_discriminator_waits_for_disc_start(tmp_path):
    model = kl_model(gan(start=2))
    before = snapshot(model.loss.discriminator)
    fit(model, tmp_path, steps=2)
    assert not changed(model.loss.discriminator, before)
    fit(model, tmp_path, steps=1)  # the counter is the model's: this is the third step
    assert changed(model.loss.discriminator, before)


@pytest.mark.parametrize("off", [dict(disc_factor=0.0), dict(disc_weight=0.0)])
def test_no_second_optimizer_without_adversarial_term(tmp_path, off):
    assert len(fit(kl_model(gan(**off)), tmp_path, steps=1).optimizers) == 1


@pytest.mark.parametrize("cls", [A.VQModel, A.VQModelInterface])
def test_vq_fit(tmp_path, cls):
    model = vq_model(vq_gan(), cls, lr_g_factor=2.0)
    codes = model.quantize.embedding.weight.detach().clone()
    trainer = fit(model, tmp_path)
    assert not torch.equal(model.quantize.embedding.weight, codes) and "train/quant_loss" in trainer.callback_metrics
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [2e-3, 1e-3]


def test_accumulation_equals_one_large_batch(tmp_path):
    weights = []
    for batch_size, k in ((4, 1), (2, 2)):
        model = kl_model(accumulate_grad_batches=k, optimizer_config=dict(target="torch.optim.SGD"))
        model.encode = lambda x, encode=model.encode: DiagonalGaussianDistribution(encode(x).parameters, deterministic=True)
        trainer = pl.Trainer(
            max_epochs=1,
            limit_train_batches=k,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, DataLoader(images(), batch_size=batch_size))
        assert trainer.global_step == 1
        weights.append(snapshot(model.decoder))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_gradient_clipping_bounds_the_step(tmp_path):
    model = kl_model(gradient_clip_val=1e-3, optimizer_config=dict(target="torch.optim.SGD", params=dict(lr=1.0)))
    before = snapshot(model)
    fit(model, tmp_path, steps=1)
    step = sum((p.detach() - before[k]).square().sum() for k, p in model.named_parameters()).sqrt()
    assert 0 < step.item() <= 1.01e-3


def test_schedule_steps_with_the_optimizer(tmp_path):
    schedule = dict(
        target="ldm.lr_scheduler.LambdaLinearScheduler",
        params=dict(warm_up_steps=[10], cycle_lengths=[1000], f_start=[0.1], f_max=[1.0], f_min=[1.0]),
    )
    model = kl_model(scheduler_config=schedule)
    trainer = fit(model, tmp_path, steps=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * (0.1 + 3 * 0.09))


def test_default_optimizer_and_optimizer_config():
    adam = kl_model().configure_optimizers()[0][0]
    assert isinstance(adam, torch.optim.Adam) and adam.defaults["betas"] == (0.5, 0.9) and adam.defaults["lr"] == 1e-3
    config = dict(target="torch.optim.AdamW", params=dict(weight_decay=0.1))
    adamw = kl_model(optimizer_config=config).configure_optimizers()[0][0]
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["weight_decay"] == 0.1 and adamw.defaults["lr"] == 1e-3


def test_bf16_autocast_training(tmp_path):
    trainer = fit(kl_model(gan()), tmp_path, steps=1, precision="bf16-mixed")
    assert trainer.callback_metrics["train/total_loss"].isfinite()


def test_ema_follows_and_is_restored_after_validation(tmp_path):
    model = kl_model(ema_decay=0.5)
    trainer = fit(model, tmp_path)
    assert {"val/rec_loss", "val_ema/rec_loss"} <= set(trainer.callback_metrics)
    live = model.decoder.conv_out.weight.detach().clone()
    with model.ema_scope():
        assert not torch.equal(model.decoder.conv_out.weight, live)
    assert torch.equal(model.decoder.conv_out.weight, live)
    assert "model_ema.decoderconv_outweight" in model.state_dict()


def test_resume_keeps_the_generator_clock(tmp_path):
    first = kl_model(gan(start=100))
    fit(first, tmp_path, steps=2).save_checkpoint(tmp_path / "last.ckpt")
    second = kl_model(gan(start=100))
    fit(second, tmp_path, steps=3, ckpt_path=tmp_path / "last.ckpt")
    assert second.generator_steps == 3


# -- what users get wrong ----------------------------------------------------------------------------------------------


def test_training_errors_say_what_to_do(tmp_path, monkeypatch):
    from ldm.modules.losses import lpips

    monkeypatch.setattr(lpips, "find_weights", lambda path: {})
    with pytest.raises(UserError, match="perceptual_weights"):
        fit(kl_model(gan(perceptual_weight=1.0)), tmp_path)
    with pytest.raises(UserError, match="lossconfig"):
        fit(kl_model(NO_LOSS), tmp_path)
    model = kl_model()
    model.learning_rate = None
    with pytest.raises(UserError, match="base_learning_rate"):
        model.configure_optimizers()


def test_config_errors():
    with pytest.raises(ConfigError, match="double_z"):
        A.AutoencoderKL(SMALL | dict(double_z=False), NO_LOSS, embed_dim=4)
    with pytest.raises(ConfigError, match="logvar"):
        kl_model(learn_logvar=True).configure_optimizers()
    with pytest.raises(ConfigError, match="accumulate_grad_batches"):
        kl_model(accumulate_grad_batches=0)


def test_omegaconf_configs_are_taken():
    from omegaconf import OmegaConf

    config = OmegaConf.create(dict(ddconfig=SMALL, lossconfig=PLAIN, embed_dim=4))
    assert A.AutoencoderKL(**config)(torch.randn(1, 3, 16, 16))[0].shape == (1, 3, 16, 16)


# -- weights -----------------------------------------------------------------------------------------------------------


def test_init_from_checkpoint(tmp_path):
    source = fill(kl_model(gan()))
    torch.save({"state_dict": source.state_dict()}, tmp_path / "kl.ckpt")
    loaded = kl_model(NO_LOSS, ckpt_path=str(tmp_path / "kl.ckpt"))  # the loss's own tensors are not needed
    assert torch.equal(loaded.decoder.conv_out.weight, source.decoder.conv_out.weight)
    fresh = kl_model(gan(), ckpt_path=str(tmp_path / "kl.ckpt"), ignore_keys=["decoder.", "loss."])
    assert torch.equal(fresh.encoder.conv_in.weight, source.encoder.conv_in.weight)
    assert not torch.equal(fresh.decoder.conv_out.weight, source.decoder.conv_out.weight)


def test_checkpoint_that_does_not_fit_is_refused(tmp_path):
    state = kl_model(NO_LOSS).state_dict()
    renamed = {("encoder.stem.weight" if k == "encoder.conv_in.weight" else k): v for k, v in state.items()}
    missing = {k: v for k, v in state.items() if k != "quant_conv.bias"}
    reshaped = state | {"quant_conv.bias": torch.zeros(3)}
    cases = ((renamed, r"encoder\.conv_in\.weight"), (missing, r"quant_conv\.bias"), (reshaped, "other shapes"))
    for i, (tensors, match) in enumerate(cases):
        torch.save({"state_dict": tensors}, tmp_path / f"{i}.ckpt")
        with pytest.raises(CheckpointError, match=match):
            kl_model(NO_LOSS, ckpt_path=str(tmp_path / f"{i}.ckpt"))
