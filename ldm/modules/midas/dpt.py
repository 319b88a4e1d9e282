"""DPT-hybrid (arXiv:2103.13413): a ResNet-50 with a vision transformer on top, decoded to a dense map.

Owns the network under the names of published MiDaS 3 weights (`pretrained.*`, `scratch.*`). The backbone is timm's. Knows no file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = 256  # channels of the decoder
STAGES = (256, 512, 768, 768)  # channels of the four levels, at 1/4, 1/8, 1/16 and 1/32 of the image
WIDTH = 768  # of the transformer
TAPS = (8, 11)  # blocks of the transformer that are levels 3 and 4
STRIDE = 16  # pixels a token


class ProjectReadout(nn.Module):
    """Mixes the class token into every other token: (B, 1 + N, D) -> (B, N, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(2 * width, width), nn.GELU())

    def forward(self, tokens: Tensor) -> Tensor:
        """Concatenate the class token and project back."""
        rest = tokens[:, 1:]
        return self.project(torch.cat([rest, tokens[:, :1].expand_as(rest)], dim=-1))


class HybridBackbone(nn.Module):
    """Image (B, 3, H, W) -> the four levels; H and W are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        import timm

        self.model = timm.create_model("vit_base_r50_s16_384", pretrained=False)
        # The second and third places have no weights: they number the others as published weights do.
        self.act_postprocess3 = nn.Sequential(ProjectReadout(WIDTH), nn.Identity(), nn.Identity(), nn.Conv2d(WIDTH, STAGES[2], 1))
        self.act_postprocess4 = nn.Sequential(
            ProjectReadout(WIDTH),
            nn.Identity(),
            nn.Identity(),
            nn.Conv2d(WIDTH, STAGES[3], 1),
            nn.Conv2d(STAGES[3], STAGES[3], 3, stride=2, padding=1),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Levels of `STAGES` channels, finest first."""
        vit, grid = self.model, (x.shape[-2] // STRIDE, x.shape[-1] // STRIDE)
        levels = []
        resnet = vit.patch_embed.backbone
        x = resnet.stem(x)
        for stage in resnet.stages:
            x = stage(x)
            levels.append(x)
        tokens = vit.patch_embed.proj(resnet.norm(x)).flatten(2).transpose(1, 2)  # (B, N, D)
        tokens = torch.cat([vit.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self._positions(grid)
        taps = []
        for i, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if i in TAPS:
                taps.append(tokens)
        posts = (self.act_postprocess3, self.act_postprocess4)
        return levels[:2] + [self._map(post, tap, grid) for post, tap in zip(posts, taps, strict=True)]

    @staticmethod
    def _map(post: nn.Sequential, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        x = post[0](tokens).transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        for layer in post[3:]:
            x = layer(x)
        return x

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings (1, 1 + h w, D), resized to the grid."""
        positions = self.model.pos_embed
        side = round((positions.shape[1] - 1) ** 0.5)
        rest = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, D, side, side)
        rest = F.interpolate(rest, size=grid, mode="bilinear")
        return torch.cat([positions[:, :1], rest.flatten(2).transpose(1, 2)], dim=1)


class ResidualConvUnit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class FeatureFusionBlock(nn.Module):
    """Adds a level to the path from the coarser ones, and doubles its size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(channels, channels, 1)
        self.resConfUnit1 = ResidualConvUnit(channels)  # not used by the coarsest block, but part of its weights
        self.resConfUnit2 = ResidualConvUnit(channels)

    def forward(self, path: Tensor, level: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        if level is not None:
            path = path + self.resConfUnit1(level)
        path = F.interpolate(self.resConfUnit2(path), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(path)


class Decoder(nn.Module):
    """The four levels -> inverse depth (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        for i, channels in enumerate(STAGES, start=1):
            self.add_module(f"layer{i}_rn", nn.Conv2d(channels, FEATURES, 3, padding=1, bias=False))
            self.add_module(f"refinenet{i}", FeatureFusionBlock(FEATURES))
        self.output_conv = nn.Sequential(
            nn.Conv2d(FEATURES, FEATURES // 2, 3, padding=1),
            nn.UpsamplingBilinear2d(scale_factor=2),  # its corners are aligned
            nn.Conv2d(FEATURES // 2, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, 1),
            nn.ReLU(),
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Coarsest level first into the path."""
        narrow = [getattr(self, f"layer{i}_rn")(level) for i, level in enumerate(levels, start=1)]
        path = self.refinenet4(narrow[3])
        for i in (3, 2, 1):
            path = getattr(self, f"refinenet{i}")(path, narrow[i - 1])
        return self.output_conv(path)


class DPTHybrid(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> relative inverse depth (B, 1, H, W), 0 and above; H and W are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained = HybridBackbone()
        self.scratch = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        """One value a pixel, larger is nearer."""
        return self.scratch(self.pretrained(x))
