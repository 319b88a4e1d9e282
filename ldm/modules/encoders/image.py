"""Image encoders: CLIP's image tower as Stable unCLIP is conditioned on it, and the noising of its embedding.

Owns: architectures and the preparation of pixels; no weights. The weights come with the checkpoint of the whole model or from a local
file, and nothing here ever opens a connection. Sources: CLIP (arXiv:2103.00020), unCLIP (arXiv:2204.06125).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.diffusionmodules.util import timestep_embedding
from ldm.modules.encoders.clip_towers import CLIP, read_arch
from ldm.modules.encoders.text import AbstractEncoder
from ldm.modules.freezing import freeze
from ldm.util import CheckpointError, ConfigError, names_weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB, pixels in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SIZE = 224  # pixels, square
OPENAI_NAMES = {  # name in OpenAI's package -> open_clip's
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}


class ClipImageEncoder(AbstractEncoder):
    """Shared by the image encoders: image (B, 3, H, W) in [-1, 1] -> CLIP embedding (B, D), not normalised."""

    def __init__(self, model: CLIP, antialias: bool, ucg_rate: float) -> None:
        super().__init__()
        if not 0.0 <= ucg_rate <= 1.0:
            raise ConfigError(f"{type(self).__name__}: ucg_rate {ucg_rate} is not a share between 0 and 1")
        self.model = model
        self.image_size = model.visual.config.image_size
        self.antialias = antialias  # blur before making an image smaller
        self.ucg_rate = ucg_rate  # share of images whose embedding is set to zero, in every mode
        self.register_buffer("mean", torch.tensor(CLIP_MEAN, device="cpu"), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD, device="cpu"), persistent=False)

    def freeze(self) -> None:
        """No gradients, and evaluation mode for good."""
        freeze(self)

    def preprocess(self, x: Tensor, size: int = CLIP_SIZE) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> what the tower takes (B, 3, size, size). Stretches what is not square."""
        x = (resize(x, size, self.antialias) + 1.0) / 2.0
        shape = (1, -1, 1, 1)
        return (x - self.mean.to(x).view(shape)) / self.std.to(x).view(shape)

    def encode_with_vision_transformer(self, img: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> embedding (B, D)."""
        pixels = self.preprocess(img, self.image_size)
        return self.model.encode_image(pixels.to(self.model.visual.proj.dtype)).to(img.dtype)

    def forward(self, image: Tensor, no_dropout: bool = False) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] -> embedding (B, D); some are zero when `ucg_rate` is above 0."""
        z = self.encode_with_vision_transformer(image)
        if self.ucg_rate > 0.0 and not no_dropout:
            kept = torch.bernoulli(torch.full((len(z),), 1.0 - self.ucg_rate, device=z.device))
            z = kept[:, None].to(z.dtype) * z
        return z

    def encode(self, image: Tensor) -> Tensor:
        """As calling the module."""
        return self(image)


class FrozenOpenCLIPImageEmbedder(ClipImageEncoder):
    """Image tower of an open_clip model.

    Keys as published (`model.*`): the image tower, and of the text tower everything but its transformer.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",  # a name open_clip knows, or a mapping {embed_dim, text_cfg, vision_cfg}
        version: str = "laion2b_s32b_b79k",  # a local weights file to read; a published name only says which weights belong here
        device: str | None = None,  # accepted for old configs; the pixels follow the weights
        max_length: int = 77,  # accepted for old configs; means nothing for images
        freeze: bool = True,
        layer: str = "pooled",  # the only one there is
        antialias: bool = True,
        ucg_rate: float = 0.0,
    ) -> None:
        if layer != "pooled":
            raise ConfigError(f"FrozenOpenCLIPImageEmbedder: layer {layer!r} is unknown; use pooled")
        super().__init__(_without_text_transformer(arch), antialias, ucg_rate)
        self.layer, self.max_length = layer, max_length
        if names_weights(version) and not self.model.visual.proj.is_meta:
            load_tower(self.model, version)
        if freeze:
            self.freeze()


class ClipImageEmbedder(ClipImageEncoder):
    """Image tower of an OpenAI model. Keys as published (`model.*`): both towers, though only the image's is used."""

    def __init__(
        self,
        model: str | Mapping[str, Any],  # such as ViT-L/14, or a mapping in open_clip's format
        jit: bool = False,  # accepted for old configs
        device: str | None = None,  # accepted for old configs; the pixels follow the weights
        antialias: bool = True,
        ucg_rate: float = 0.0,
        weights: str | None = None,  # a local weights file to read
    ) -> None:
        if isinstance(model, str) and model not in OPENAI_NAMES:
            raise ConfigError(f"ClipImageEmbedder: model {model!r} is unknown; known are {', '.join(OPENAI_NAMES)}")
        super().__init__(CLIP(OPENAI_NAMES[model] if isinstance(model, str) else model), antialias, ucg_rate)
        if weights is not None and not self.model.visual.proj.is_meta:
            load_tower(self.model, weights)


class CLIPEmbeddingNoiseAugmentation(ImageConcatWithNoiseAugmentation):
    """Noises CLIP image embeddings, in units of their own statistics, and embeds the level: (B, D) -> ((B, D), (B, timestep_dim))."""

    def __init__(
        self,
        *args: Any,
        clip_stats_path: str | None = None,  # file with (mean (D,), std (D,)) of the embeddings; 0 and 1 without
        timestep_dim: int = 256,  # of the level's embedding; without statistics also D
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.timestep_dim = timestep_dim
        self._missing_stats: str | None = None
        mean, std = torch.zeros(timestep_dim, device="cpu"), torch.ones(timestep_dim, device="cpu")
        if clip_stats_path is not None:
            try:
                mean, std = _read_stats(clip_stats_path)
            except FileNotFoundError:
                if torch.get_default_device().type != "meta":
                    raise CheckpointError(_no_stats(clip_stats_path)) from None
                self._missing_stats = clip_stats_path  # names and shapes need no numbers
        self.register_buffer("data_mean", mean[None], persistent=False)
        self.register_buffer("data_std", std[None], persistent=False)

    def scale(self, x: Tensor) -> Tensor:
        """Embeddings with mean 0 and standard deviation 1 in every dimension."""
        if self._missing_stats is not None:
            raise CheckpointError(_no_stats(self._missing_stats))
        return (x - self.data_mean) / self.data_std

    def unscale(self, x: Tensor) -> Tensor:
        """Back from `scale`."""
        return x * self.data_std + self.data_mean

    def forward(
        self, x: Tensor, noise_level: Tensor | None = None, seed: int | None = None, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, D) -> (x noised, embedding of its noise level (B, timestep_dim)). For `seed` and `noise` see `q_sample`."""
        level = self.levels(x, noise_level)
        z = self.unscale(self.q_sample(self.scale(x), level, noise, seed))
        return z, timestep_embedding(level, self.timestep_dim).to(z.dtype)


# ---------------------------------------------------------------------------------------------------------------- pixels
def resize(x: Tensor, size: int, antialias: bool) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size): bicubic, the corner pixels stay; with `antialias` a Gaussian blur before shrinking.

    The blur is that of kornia's `resize`, which published models saw: standard deviation (factor - 1) / 2, cut at twice that.
    """
    factors = [n / size for n in x.shape[-2:]]
    if antialias and max(factors) > 1.0:
        for dim, factor in zip((2, 3), factors, strict=True):
            sigma = max((factor - 1.0) / 2.0, 0.001)
            width = int(max(4.0 * sigma, 3.0))
            x = _blur(x, dim, sigma, width + (width + 1) % 2)
    return F.interpolate(x, size=(size, size), mode="bicubic", align_corners=True)


def _blur(x: Tensor, dim: int, sigma: float, width: int) -> Tensor:
    """Gaussian blur along one dimension, `width` (odd) pixels wide; the image is mirrored at its edge."""
    if x.shape[dim] == 1:
        return x
    offset = torch.arange(width, device=x.device, dtype=torch.float32) - width // 2
    kernel = torch.exp(-offset.square() / (2.0 * sigma**2))
    kernel = (kernel / kernel.sum()).to(x.dtype).view([1, 1, -1, 1] if dim == 2 else [1, 1, 1, -1])
    margin = [0, 0, width // 2, width // 2] if dim == 2 else [width // 2, width // 2, 0, 0]
    channels = x.shape[1]
    return F.conv2d(F.pad(x, margin, mode="reflect"), kernel.expand(channels, -1, -1, -1), groups=channels)


# --------------------------------------------------------------------------------------------------------------- weights
def _without_text_transformer(arch: str | Mapping[str, Any]) -> CLIP:
    """CLIP with all of the text tower but its transformer, which is built as short as can be and thrown away."""
    _, values = read_arch(arch)
    model = CLIP({**values, "text_cfg": {**values["text_cfg"], "layers": 1}})
    del model.transformer
    return model


def load_tower(model: CLIP, path: str) -> None:
    """Fill `model` from a local file of a whole CLIP: open_clip's own names, or those below `model.`.

    A model without memory gets the file's tensors in the place of its own.
    """
    from ldm.inference.checkpoint import read_state_dict  # lies above this layer

    weights = {name.removeprefix("model."): value for name, value in read_state_dict(path).items()}
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in weights or weights[n].shape != wanted[n].shape]
    if missing:
        raise CheckpointError(f"{path} does not hold this CLIP: {len(missing)} tensors missing or of another shape, such as {missing[0]}")
    values = {name: weights[name].to(value.dtype) for name, value in wanted.items()}
    model.load_state_dict(values, assign=any(value.is_meta for value in wanted.values()))


def _no_stats(path: str) -> str:
    return f"clip_stats_path {path}: there is no such file; it holds mean and std of the image embeddings (ViT-L-14_stats.th of karlo)"


def _read_stats(path: str) -> tuple[Tensor, Tensor]:
    """(mean, std), each (D,); nothing in the file is run."""
    try:
        mean, std = torch.load(path, map_location="cpu", weights_only=True)
        return mean.float(), std.float()
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, TypeError, AttributeError):
        raise CheckpointError(f"clip_stats_path {path} does not hold a pair of tensors (mean, std)") from None
