"""LPIPS: distance of two images in the features of a VGG16, channels weighted by human judgement (arXiv:1801.03924).

Nothing is downloaded: weights come from a file, see `LPIPS`. State-dict names are those of published autoencoder checkpoints, which
hold the whole network below `loss.perceptual_loss.`, so such a checkpoint is a source of weights too.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.util import UserError

ENVIRONMENT_VARIABLE = "LDM_LPIPS_WEIGHTS"
_WIDTHS = (64, 128, 256, 512, 512)  # channels of the five feature maps
# Layers of torchvision's vgg16().features, which give the names: convolutions a block, and where each block starts.
_BLOCKS = ((0, (3, 64, 64)), (5, (64, 128, 128)), (10, (128, 256, 256, 256)), (17, (256, 512, 512, 512)), (24, (512, 512, 512, 512)))
_LINEAR_FILES = (  # layer weights v0.1 as installed packages ship them
    ("lpips", "weights/v0.1/vgg.pth"),
    ("torchmetrics", "functional/image/lpips_models/vgg.pth"),
)


class ScalingLayer(nn.Module):
    """From [-1, 1] to ImageNet's normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), normalised."""
        return (x - self.shift) / self.scale


class VGG16Features(nn.Module):
    """The last activations before each of VGG16's five poolings."""

    def __init__(self) -> None:
        super().__init__()
        for number, (start, channels) in enumerate(_BLOCKS, start=1):
            block = nn.Sequential()
            if number > 1:
                block.add_module(str(start - 1), nn.MaxPool2d(2))
            for i, (c_in, c_out) in enumerate(pairwise(channels)):
                block.add_module(str(start + 2 * i), nn.Conv2d(c_in, c_out, 3, padding=1))
                block.add_module(str(start + 2 * i + 1), nn.ReLU(inplace=True))
            self.add_module(f"slice{number}", block)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Five maps of 64 to 512 channels, each half the size of the one before."""
        features = []
        for number in range(1, len(_BLOCKS) + 1):
            x = getattr(self, f"slice{number}")(x)
            features.append(x)
        return features


class NetLinLayer(nn.Module):
    """A learnt non-negative weight a channel, after dropout (which is never active here)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 1, H, W)."""
        return self.model(x)


class LPIPS(nn.Module):
    """Perceptual distance (B, 1, 1, 1) of images (B, 3, H, W) in [-1, 1]. Frozen, and always in eval mode.

    Weights are looked for in `weights`, else in $LDM_LPIPS_WEIGHTS: a file or a folder of files, with VGG16 under torchvision's names
    (`features.0.weight`) and the layers `lin0.model.1.weight` to lin4, or both under the names of a published autoencoder. What is
    then missing is taken from torchvision's download cache (VGG16) and from the packages lpips or torchmetrics (lin layers).
    They are read by `prepare()` or loaded with the checkpoint; using the network without them raises UserError.
    """

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.weights, self._ready = weights, False
        self.scaling_layer = ScalingLayer()
        self.net = VGG16Features()
        for i, channels in enumerate(_WIDTHS):
            self.add_module(f"lin{i}", NetLinLayer(channels))
        self.requires_grad_(False)
        for parameter in self.parameters():
            parameter.zero_()  # all zero means: not loaded yet, whichever way weights come in later
        self.train(False)

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode."""
        return super().train(False)

    @property
    def ready(self) -> bool:
        """Whether weights have been loaded."""
        self._ready = self._ready or bool(self.lin0.model[1].weight.any())
        return self._ready

    def prepare(self) -> None:
        """Load the weights unless they are there already. Raises UserError that says what to pass."""
        if self.ready:
            return
        wanted = self.state_dict()
        found = find_weights(self.weights or os.environ.get(ENVIRONMENT_VARIABLE))
        missing = [k for k in wanted if k not in found and not k.startswith("scaling_layer.")]
        if missing:
            part = "VGG16" if any(k.startswith("net.") for k in missing) else "the lin layers"
            raise UserError(
                f"LPIPS has no weights for {part} ({len(missing)} tensors): pass perceptual_weights (in lossconfig.params) or "
                f"{ENVIRONMENT_VARIABLE}, a file or folder with torchvision's vgg16 and lpips' vgg.pth, or set perceptual_weight: 0"
            )
        wrong = [k for k in wanted if k in found and found[k].shape != wanted[k].shape]
        if wrong:
            raise UserError(f"LPIPS weights do not fit: {wrong[0]} is {tuple(found[wrong[0]].shape)}, not {tuple(wanted[wrong[0]].shape)}")
        self.load_state_dict({k: found.get(k, v) for k, v in wanted.items()})

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Distance (B, 1, 1, 1), 0 for equal images."""
        if not self.ready:
            self.prepare()
        features_0 = self.net(self.scaling_layer(input))
        features_1 = self.net(self.scaling_layer(target))
        total: Tensor | float = 0.0
        for i, (a, b) in enumerate(zip(features_0, features_1, strict=True)):
            difference = (normalize_tensor(a) - normalize_tensor(b)).square()
            total = total + getattr(self, f"lin{i}")(difference).mean(dim=(2, 3), keepdim=True)
        return total


def normalize_tensor(x: Tensor, eps: float = 1e-10) -> Tensor:
    """Feature vectors (along dim 1) scaled to unit length."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + eps)


def find_weights(path: str | None) -> dict[str, Tensor]:
    """All tensors of LPIPS found in `path` and in the usual places on this machine, under this module's names."""
    if path is not None and not Path(path).exists():
        raise UserError(f"LPIPS weights {path} do not exist: pass a file or folder with torchvision's vgg16 and lpips' vgg.pth")
    found: dict[str, Tensor] = {}
    for file in [*_usual_files(), *_files(path)]:  # later ones win
        found.update(_renamed(_read(file)))
    return found


def _files(path: str | None) -> list[Path]:
    if path is None:
        return []
    root = Path(path)
    suffixes = {".pth", ".pt", ".ckpt", ".safetensors"}
    return [root] if root.is_file() else sorted(p for p in root.iterdir() if p.suffix in suffixes)


def _usual_files() -> list[Path]:
    files = sorted(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth"))
    for package, relative in _LINEAR_FILES:
        spec = importlib.util.find_spec(package)  # finds the folder without importing the package
        candidate = Path(spec.submodule_search_locations[0], relative) if spec and spec.submodule_search_locations else None
        if candidate is not None and candidate.is_file():
            files.append(candidate)
            break
    return files


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"LPIPS weights {file} cannot be read ({type(error).__name__}): pass a plain state dict of tensors") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else {}
    return {k: v for k, v in state.items() if isinstance(v, Tensor)}


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that belong to LPIPS, whichever of the known naming schemes they use."""
    names = {str(start + 2 * i): f"net.slice{n}" for n, (start, c) in enumerate(_BLOCKS, 1) for i in range(len(c) - 1)}
    found = {}
    for key, tensor in state.items():
        key = key.removeprefix("loss.").removeprefix("perceptual_loss.")
        if key.startswith("features."):
            layer = key.split(".")[1]
            if layer in names:
                found[f"{names[layer]}.{key.removeprefix('features.')}"] = tensor
        elif key.startswith(("net.slice", "lin", "scaling_layer.")):
            found[key] = tensor
    return found
