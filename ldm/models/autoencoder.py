"""First stages: the KL autoencoder, the VQ autoencoders, and the identity for diffusion in pixel space.

Owns the public classes and their state-dict names. Training is in first_stage.py, losses in ldm/modules/losses.
Sources: VQGAN (arXiv:2012.09841), LDM (arXiv:2112.10752).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.first_stage import FirstStage
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.vqvae.quantize import VectorQuantizer2 as VectorQuantizer
from ldm.util import ConfigError, plain

__all__ = ["AutoencoderKL", "IdentityFirstStage", "VQModel", "VQModelInterface", "VectorQuantizer"]


class AutoencoderKL(FirstStage):
    """Autoencoder with a Gaussian latent.

    Images (B, C, H, W) in [-1, 1]; H and W must be multiples of the factor 2^(len(ch_mult) - 1). Latents have `embed_dim` channels.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],  # arguments of Encoder and Decoder
        lossconfig: Any,  # {target, params}; torch.nn.Identity or None to use the model without training it
        embed_dim: int,  # channels of the latent
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),  # prefixes of names not to take from ckpt_path
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        ema_decay: float | None = None,  # keeps averaged weights if given
        learn_logvar: bool = False,  # also optimise the loss's log-variance
        *,
        optimizer_config: Any = None,
        scheduler_config: Any = None,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__(
            lossconfig,
            image_key=image_key,
            colorize_nlabels=colorize_nlabels,
            monitor=monitor,
            ema_decay=ema_decay,
            optimizer_config=optimizer_config,
            scheduler_config=scheduler_config,
            gradient_clip_val=gradient_clip_val,
            accumulate_grad_batches=accumulate_grad_batches,
        )
        ddconfig = plain(ddconfig)
        if not ddconfig.get("double_z", True):
            raise ConfigError("AutoencoderKL needs ddconfig.double_z=true: its encoder gives means and log-variances")
        self.embed_dim, self.learn_logvar = embed_dim, learn_logvar
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.init_ema()
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Posterior over latents (B, embed_dim, H/f, W/f), in float32 under autocast."""
        moments = self.in_tiles(lambda tile: self.quant_conv(self.encoder(tile)), x)
        if torch.is_autocast_enabled(x.device.type):
            moments = moments.float()  # exp() of the log-variance overflows or coarsens in 16 bits
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Image (B, C, f h, f w), nominally in [-1, 1] (not clamped)."""
        return self.in_tiles(lambda tile: self.decoder(self.post_quant_conv(tile)), z, latent=True)

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction of `input` from a draw (or the mode) of its posterior, and the posterior."""
        posterior = self.encode(input)
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def reconstruct(self, x: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """As `forward`, with a draw."""
        return self(x)

    def compute_loss(
        self, x: Tensor, reconstruction: Tensor, extra: DiagonalGaussianDistribution, optimizer_idx: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one player; `extra` is the posterior."""
        step, last = self.generator_steps, self.get_last_layer()
        return self.loss(x, reconstruction, extra, optimizer_idx, step, last_layer=last, split=split)

    def generator_modules(self) -> list[nn.Module]:
        """What the first optimizer trains."""
        return [self.encoder, self.decoder, self.quant_conv, self.post_quant_conv]

    def generator_parameters(self) -> list[nn.Parameter]:
        """What the first optimizer trains, with `learn_logvar` including the log-variance of the loss."""
        parameters = super().generator_parameters()
        if not self.learn_logvar:
            return parameters
        if not isinstance(getattr(self.loss, "logvar", None), nn.Parameter):
            raise ConfigError(f"learn_logvar=true, but the loss {type(self.loss).__name__} has no logvar")
        return [*parameters, self.loss.logvar]

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Tensor], only_inputs: bool = False, N: int | None = None, split: str | None = None
    ) -> dict[str, Tensor]:
        """Pictures (B, C, H, W) of the first N: inputs; and unless `only_inputs`, reconstructions and decoded draws from the prior."""
        x = self.get_input(batch, self.image_key)[:N].to(self.device)
        if only_inputs:
            return {"inputs": self._shown(x)}
        reconstruction, posterior = self(x)
        samples = self.decode(torch.randn_like(posterior.mean))
        return {"inputs": self._shown(x), "reconstructions": self._shown(reconstruction), "samples": self._shown(samples)}


class VQModel(FirstStage):
    """Autoencoder whose latent vectors are taken from a codebook of `n_embed` entries (VQGAN)."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],  # arguments of Encoder and Decoder
        lossconfig: Any,  # {target, params}; torch.nn.Identity or None to use the model without training it
        n_embed: int,  # codebook entries
        embed_dim: int,  # channels of the latent
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),  # prefixes of names not to take from ckpt_path
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: Sequence[int] | None = None,  # (smallest, largest) side in pixels: training batches get random sizes
        scheduler_config: Any = None,
        lr_g_factor: float = 1.0,  # the generator's learning rate in multiples of the discriminator's
        remap: str | None = None,  # .npy file with the indices in use
        sane_index_shape: bool = False,  # indices as (B, h, w) rather than flat
        use_ema: bool = False,
        *,
        ema_decay: float = 0.9999,
        optimizer_config: Any = None,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__(
            lossconfig,
            image_key=image_key,
            colorize_nlabels=colorize_nlabels,
            monitor=monitor,
            ema_decay=ema_decay if use_ema else None,
            optimizer_config=optimizer_config,
            scheduler_config=scheduler_config,
            gradient_clip_val=gradient_clip_val,
            accumulate_grad_batches=accumulate_grad_batches,
        )
        ddconfig = plain(ddconfig)
        self.embed_dim, self.n_embed = embed_dim, n_embed
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.quantize = VectorQuantizer(n_embed, embed_dim, beta=0.25, remap=remap, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        self.batch_resize_range = plain(batch_resize_range)
        self.generator_lr_factor = self.lr_g_factor = lr_g_factor
        self.init_ema()
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Latent (B, embed_dim, H/f, W/f) before quantisation."""
        return self.in_tiles(lambda tile: self.quant_conv(self.encoder(tile)), x)

    def encode(self, x: Tensor) -> Any:
        """Quantised latent, codebook loss, and (perplexity, encodings, indices) of which only the indices are computed."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Image (B, C, f h, f w) from a quantised latent."""
        return self.in_tiles(lambda tile: self.decoder(self.post_quant_conv(tile)), quant, latent=True)

    def decode_code(self, code_b: Tensor) -> Tensor:
        """Image from codebook indices (B, h, w)."""
        return self.decode(self.quantize.get_codebook_entry(code_b.reshape(-1), (*code_b.shape, self.embed_dim)))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Reconstruction and codebook loss, on request also the indices."""
        quant, loss, (_, _, indices) = VQModel.encode(self, input)
        reconstruction = VQModel.decode(self, quant)
        return (reconstruction, loss, indices) if return_pred_indices else (reconstruction, loss)

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """As for every first stage; with `batch_resize_range`, training batches are resized to a random square."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None or not self.training:
            return x
        low, high = self.batch_resize_range
        # The largest size comes first, so that a machine too small for it fails at once.
        side = high if self.generator_steps <= 4 else low + 16 * int(torch.randint((high - low) // 16 + 1, ()))
        return x if side == x.shape[2] else F.interpolate(x, size=side, mode="bicubic")

    def reconstruct(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Reconstruction, and (codebook loss, indices)."""
        reconstruction, loss, indices = self(x, return_pred_indices=True)
        return reconstruction, (loss, indices)

    def compute_loss(
        self, x: Tensor, reconstruction: Tensor, extra: tuple[Tensor, Tensor], optimizer_idx: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one player; `extra` is (codebook loss, indices)."""
        codebook_loss, indices = extra
        step, last = self.generator_steps, self.get_last_layer()
        return self.loss(codebook_loss, x, reconstruction, optimizer_idx, step, last_layer=last, split=split, predicted_indices=indices)

    def generator_modules(self) -> list[nn.Module]:
        """What the first optimizer trains."""
        return [self.encoder, self.decoder, self.quantize, self.quant_conv, self.post_quant_conv]

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Tensor],
        only_inputs: bool = False,
        plot_ema: bool = False,
        N: int | None = None,
        split: str | None = None,
    ) -> dict[str, Tensor]:
        """Pictures (B, C, H, W) of the first N: inputs; and unless `only_inputs`, reconstructions (with `plot_ema` also of the average)."""
        if plot_ema and self.ema_decay is None:
            raise ConfigError("log_images: plot_ema needs an average of the weights: set use_ema: true")
        x = self.get_input(batch, self.image_key)[:N].to(self.device)
        if only_inputs:
            return {"inputs": self._shown(x)}
        pictures = {"inputs": self._shown(x), "reconstructions": self._shown(self(x)[0])}
        if plot_ema:
            with self.ema_scope():
                pictures["reconstructions_ema"] = self._shown(self(x)[0])
        return pictures


class VQModelInterface(VQModel):
    """A VQModel as the diffusion model sees it: latents are left unquantised, and quantised on decoding."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, embed_dim=embed_dim, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """Latent before quantisation."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Image from a latent, which is quantised first unless `force_not_quantize`."""
        quant = h if force_not_quantize else self.quantize(h)[0]
        return super().decode(quant)


class IdentityFirstStage(nn.Module):
    """The first stage of diffusion in pixel space: latents are the images themselves."""

    factor = 1
    tiling: Any = None  # of no consequence: every pixel is on its own

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The image itself."""
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The image itself."""
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The image itself, with `vq_interface` in the form a quantiser answers in."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The image itself."""
        return x
