"""The Inception network of FID, and what pictures become before it (arXiv:1512.00567; arXiv:1706.08500 for its use in FID).

It is TensorFlow's network of 2015-12-05, as its weights were published for PyTorch: names as in `pt_inception-2015-12-05-6726825d.pth` (the
same file as `weights-inception-2015-12-05-6726825d.pth`). It differs from torchvision's Inception v3 in the pooling of its blocks. Other
networks and other ways to resize move FID by several points, so nothing else counts as FID.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.util import CheckpointError, UserError

FEATURES = 2048
SIZE = 299  # pixels, square
CLASSES = 1008
RESIZES = ("tensorflow", "pytorch")

Layer = tuple[str, int, tuple[int, int], int]  # name, channels it gives, kernel, stride
Branch = tuple[Layer, ...]


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, out, H', W')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, joined along the channels, and a pooled branch last; a layer named in `fork` is followed by two."""

    def __init__(self, channels: int, branches: Sequence[Branch], pooled: int | None, pool: str = "average") -> None:
        super().__init__()
        self.chains: list[list[str]] = []
        self.pool, self.pooled = pool, pooled is not None
        for branch in branches:
            width, chain = channels, []
            for name, out, kernel, stride in branch:
                setattr(self, name, ConvNorm(width, out, kernel, stride))
                chain.append(name)
                width = width if name.endswith("a") else out  # its twin, which follows, takes the same input
            self.chains.append(chain)
        if pooled is not None:
            self.branch_pool = ConvNorm(channels, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, sum of the branches, H', W')."""
        outputs = []
        for chain in self.chains:
            h = x
            for name in (n for n in chain if n[-1] not in "ab"):
                h = getattr(self, name)(h)
            twins = [n for n in chain if n[-1] in "ab"]
            outputs += [getattr(self, name)(h) for name in twins] or [h]
        return torch.cat([*outputs, self._pooled(x)], dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if not self.pooled:
            return F.max_pool2d(x, 3, 2)
        if self.pool == "max":  # in the last block, as in TensorFlow's graph
            return self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        return self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def _chain(name: str, *layers: tuple[int, tuple[int, int]], stride: int = 1) -> Branch:
    """A branch of numbered layers; the last one has the stride."""
    last = len(layers) - 1
    return tuple((f"{name}_{i + 1}", out, kernel, stride if i == last else 1) for i, (out, kernel) in enumerate(layers))


_ONE, _THREE, _FIVE, _ROW, _COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _block_a(channels: int, pooled: int) -> Mixed:
    five = _chain("branch5x5", (48, _ONE), (64, _FIVE))
    double = _chain("branch3x3dbl", (64, _ONE), (96, _THREE), (96, _THREE))
    return Mixed(channels, [(("branch1x1", 64, _ONE, 1),), five, double], pooled)


def _block_b(channels: int) -> Mixed:
    double = _chain("branch3x3dbl", (64, _ONE), (96, _THREE), (96, _THREE), stride=2)
    return Mixed(channels, [(("branch3x3", 384, _THREE, 2),), double], None)


def _block_c(channels: int, inner: int) -> Mixed:
    seven = _chain("branch7x7", (inner, _ONE), (inner, _ROW), (192, _COLUMN))
    double = _chain("branch7x7dbl", (inner, _ONE), (inner, _COLUMN), (inner, _ROW), (inner, _COLUMN), (192, _ROW))
    return Mixed(channels, [(("branch1x1", 192, _ONE, 1),), seven, double], 192)


def _block_d(channels: int) -> Mixed:
    three = _chain("branch3x3", (192, _ONE), (320, _THREE), stride=2)
    seven = _chain("branch7x7x3", (192, _ONE), (192, _ROW), (192, _COLUMN), (192, _THREE), stride=2)
    return Mixed(channels, [three, seven], None)


def _block_e(channels: int, pool: str) -> Mixed:
    def twins(name: str) -> Branch:
        return ((f"{name}a", 384, (1, 3), 1), (f"{name}b", 384, (3, 1), 1))

    three = (("branch3x3_1", 384, _ONE, 1), *twins("branch3x3_2"))
    double = (("branch3x3dbl_1", 448, _ONE, 1), ("branch3x3dbl_2", 384, _THREE, 1), *twins("branch3x3dbl_3"))
    return Mixed(channels, [(("branch1x1", 320, _ONE, 1),), three, double], 192, pool)


class FIDInception(nn.Module):
    """Pictures (B, 3, 299, 299) in [-1, 1] -> pool3 features (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, _THREE, 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, _THREE, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, _THREE)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, _ONE)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, _THREE, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_block_c(768, inner) for inner in (128, 160, 160, 192))
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, "average"), _block_e(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)  # of the published file; FID does not use it

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


def load_inception(path: str | Path) -> FIDInception:
    """The network with the published weights, a file of the user's. Raises CheckpointError unless it fits tensor by tensor."""
    from ldm.inference.checkpoint import read_state_dict

    with torch.device("meta"):
        network = FIDInception()
    given, own = read_state_dict(path), network.state_dict()
    counters = {name: torch.zeros((), dtype=torch.long) for name in own if name.endswith("num_batches_tracked")}  # some files lack them
    weights = {**counters, **{name: value for name, value in given.items() if name in own}}
    wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    if wrong or set(given) - set(own):
        first = (wrong or sorted(set(given) - set(own)))[0]
        raise CheckpointError(
            f"{path} is not the Inception of FID ({first} is missing, unknown or of another shape): "
            "pt_inception-2015-12-05-6726825d.pth is, torchvision's network is not"
        )
    network.load_state_dict(weights, assign=True)
    return network.float().eval().requires_grad_(False)


def prepare(image: np.ndarray, resize: str = "tensorflow") -> Tensor:
    """One picture, uint8 (H, W, 3), as the network takes it: (1, 3, 299, 299).

    resize: "tensorflow" is the definition, TensorFlow 1's bilinear (as torch-fidelity and clean-fid's legacy mode have it), with pixels
    (x - 128) / 128; "pytorch" is pytorch-fid's, F.interpolate and pixels 2 x / 255 - 1. Neither smooths before it makes a picture smaller.
    """
    if resize not in RESIZES:
        raise UserError(f"resize {resize!r} is unknown: use {' or '.join(RESIZES)}")
    x = torch.tensor(image).permute(2, 0, 1)[None].float()
    if resize == "pytorch":
        return 2.0 * F.interpolate(x / 255.0, (SIZE, SIZE), mode="bilinear", align_corners=False) - 1.0
    return (_tensorflow_line(_tensorflow_line(x, 3), 2) - 128.0) / 128.0


def _tensorflow_line(x: Tensor, dim: int) -> Tensor:
    """Linear interpolation along one dimension to SIZE: output i looks at i n / SIZE, not at pixel centres."""
    n = x.shape[dim]
    place = torch.arange(SIZE, dtype=torch.float32) * torch.tensor(n / SIZE, dtype=torch.float32)
    low = place.long()
    share = (place - low).view([-1 if d == dim else 1 for d in range(x.ndim)])
    first, second = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(n - 1))
    return first + (second - first) * share
