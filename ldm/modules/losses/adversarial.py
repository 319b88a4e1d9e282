"""What the losses with a discriminator share: perceptual term, balance of gradients, the discriminator's own loss.

Source: VQGAN (arXiv:2012.09841), Eq. 6 and 7.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.losses.discriminator import NLayerDiscriminator, weights_init
from ldm.modules.losses.lpips import LPIPS
from ldm.util import ConfigError

Logs = dict[str, Tensor]


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """`weight` from step `threshold` on, `value` before."""
    return weight if global_step >= threshold else value


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of a discriminator (arXiv:1705.02894)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Cross-entropy of a discriminator (arXiv:1406.2661)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


_DISC_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


class DummyLoss(nn.Identity):
    """No loss, under the name that some published configs give it: the first stage can be used, not trained."""


class AdversarialLoss(nn.Module):
    """Base of the losses with LPIPS and a discriminator. A part whose weight is 0 is neither built nor run.

    The discriminator sleeps before step `disc_start`: it is not run, neither for the generator nor for itself.
    """

    def __init__(
        self,
        disc_start: int,  # generator steps before the adversarial terms set in
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,  # with `disc_conditional`: those of image and condition together
        disc_factor: float = 1.0,  # switch (0) or overall factor of both adversarial terms
        disc_weight: float = 1.0,  # strength of the generator's adversarial term after balancing
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,  # the discriminator also sees `cond`
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        perceptual_weights: str | None = None,  # file or folder with the weights of LPIPS, see LPIPS
    ) -> None:
        super().__init__()
        if disc_loss not in _DISC_LOSSES:
            raise ConfigError(f"disc_loss={disc_loss!r} is not known: use one of {', '.join(_DISC_LOSSES)}")
        self.pixel_weight, self.perceptual_weight = pixelloss_weight, perceptual_weight
        self.disc_factor, self.discriminator_weight, self.discriminator_iter_start = disc_factor, disc_weight, disc_start
        self.disc_conditional, self.disc_loss = disc_conditional, _DISC_LOSSES[disc_loss]
        if perceptual_weight > 0:
            self.perceptual_loss = LPIPS(weights=perceptual_weights)
        if disc_factor > 0 and disc_weight > 0:
            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers, use_actnorm).apply(weights_init)

    def prepare(self) -> None:
        """Load the perceptual weights if need be. Raises UserError if there are none at hand."""
        if self.perceptual_weight > 0:
            self.perceptual_loss.prepare()

    def discriminator_active(self, global_step: int) -> bool:
        """Whether the adversarial terms take part at this step."""
        return hasattr(self, "discriminator") and global_step >= self.discriminator_iter_start

    def pixel_and_perceptual(self, inputs: Tensor, reconstructions: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted error per element (B, C, H, W), and the perceptual part alone (B, 1, 1, 1)."""
        error = self.pixel_weight * pixel
        if self.perceptual_weight > 0:
            p_loss = self.perceptual_loss(inputs, reconstructions)
            return error + self.perceptual_weight * p_loss, p_loss
        return error, error.new_zeros(1)

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor) -> Tensor:
        """Ratio of the two gradients' norms at `last_layer`, within [0, 1e4], times the discriminator weight (VQGAN, Eq. 7)."""
        nll_grad = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)[0]
        g_grad = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
        ratio = nll_grad.norm() / (g_grad.norm() + 1e-4)
        return ratio.clamp(0.0, 1e4).detach() * self.discriminator_weight

    def _logits(self, image: Tensor, cond: Tensor | None) -> Tensor:
        if not self.disc_conditional:
            if cond is not None:
                raise ValueError("cond was given, but this loss was built with disc_conditional=False")
            return self.discriminator(image)
        if cond is None:
            raise ValueError("disc_conditional=True: pass cond, of the images' size (B, C, H, W)")
        return self.discriminator(torch.cat((image, cond), dim=1))

    def generator_term(
        self, nll_loss: Tensor, reconstructions: Tensor, global_step: int, last_layer: Tensor | None, cond: Tensor | None
    ) -> tuple[Tensor, Logs]:
        """Adversarial term to add to the generator's loss. Without gradients (validation) its balanced weight is 0."""
        zero = nll_loss.new_zeros(())
        if not self.discriminator_active(global_step):
            return zero, {"d_weight": zero, "disc_factor": zero, "g_loss": zero}
        g_loss = -self._logits(reconstructions, cond).mean()
        d_weight = zero
        if torch.is_grad_enabled() and g_loss.requires_grad:
            if last_layer is None:
                raise ValueError("the adversarial term is balanced at the decoder's last layer: pass last_layer")
            d_weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        term = d_weight * self.disc_factor * g_loss
        return term, {"d_weight": d_weight, "disc_factor": zero + self.disc_factor, "g_loss": g_loss.detach().mean()}

    def discriminator_term(self, inputs: Tensor, reconstructions: Tensor, global_step: int, cond: Tensor | None) -> tuple[Tensor, Logs]:
        """The discriminator's loss; gradients reach neither image."""
        if not hasattr(self, "discriminator"):
            raise ValueError("this loss has no discriminator (disc_factor or disc_weight is 0): optimizer_idx must be 0")
        real = self._logits(inputs.detach(), cond)
        fake = self._logits(reconstructions.detach(), cond)
        d_loss = adopt_weight(self.disc_factor, global_step, self.discriminator_iter_start) * self.disc_loss(real, fake)
        return d_loss, {"disc_loss": d_loss, "logits_real": real.mean(), "logits_fake": fake.mean()}


def tagged(split: str, logs: Logs) -> Logs:
    """Log entries detached and named `split`/name."""
    return {f"{split}/{name}": value.detach() for name, value in logs.items()}
