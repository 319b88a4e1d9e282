"""The patch discriminator (PatchGAN, arXiv:1611.07004) and activation normalisation (Glow, arXiv:1807.03039)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ActNorm(nn.Module):
    """Per-channel shift and scale, set by the first training batch so that its outputs have mean 0 and variance 1."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, num_features, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        self.loc.copy_(-mean)
        self.scale.copy_(1.0 / (std + 1e-6))
        self.initialized.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), shifted and scaled."""
        if self.training and not self.initialized:
            self._initialize(x)
        return self.scale * (x + self.loc)


def weights_init(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) and zero bias for batch norms; meant for `Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class NLayerDiscriminator(nn.Module):
    """Image (B, input_nc, H, W) to a map of logits (B, 1, h, w), one for each overlapping patch (70 x 70 pixels for 3 layers)."""

    def __init__(
        self,
        input_nc: int = 3,
        ndf: int = 64,  # width of the first layer
        n_layers: int = 3,  # strided layers
        use_actnorm: bool = False,  # instead of batch normalisation
    ) -> None:
        super().__init__()
        norm = ActNorm if use_actnorm else nn.BatchNorm2d
        widths = [ndf * min(2**n, 8) for n in range(n_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for n in range(1, n_layers + 1):
            stride = 2 if n < n_layers else 1
            layers += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride=stride, padding=1, bias=use_actnorm),
                norm(widths[n]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, high for real images."""
        return self.main(x)
