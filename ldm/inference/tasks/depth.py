"""depth2img: pictures that keep the depth of another, estimated from it (MiDaS) or given as a map. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.imaging import load_image, nearest_legal
from ldm.inference.tasks.base import Condition
from ldm.inference.tasks.kinds import wrong_kind
from ldm.inference.tasks.text import ImageOptions, ImageToImage, strength_problems
from ldm.util import CheckpointError, UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.inference.facts import ModelFacts
    from ldm.inference.pipeline import Pipeline
    from ldm.inference.prompts import Batch


_MIDAS = "depth_model."  # names of its weights


@dataclass
class DepthOptions(ImageOptions):
    """Options of depth2img."""

    depth: str | None = None


class DepthToImage(ImageToImage):
    """Pictures from a picture's depth, prompts, and as much of the picture as is wanted."""

    name = "depth2img"
    title = "Draw pictures that keep the depth of a picture"
    ships = False
    options = DepthOptions
    defaults = {"sampler": "ddim", "steps": 50, "scale": 9.0, "n_samples": 2, "n_iter": 1, "strength": 0.9}  # noqa: RUF012
    files = {"init_img": "picture", "depth": "depth map"}  # noqa: RUF012
    per_picture = frozenset({"init_img", "depth", "strength", "fit"})

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """The picture, and its depth where it is known."""
        super().add_flags(group)
        group.add_argument(
            "--depth", metavar="FILE", help="its depth map, brighter is nearer (8 or 16 bits, or .npy); MiDaS estimates it otherwise"
        )

    def resolve(self, values: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """As img2img's; a depth map alone decides the size in the picture's place, and is drawn from pure noise."""
        found = super().resolve(values, facts)
        if values.get("init_img"):
            return found
        if values.get("depth") and not facts.sampling:
            with contextlib.suppress(UserError):  # told by check
                height, width = (nearest_legal(side, facts.multiple) for side in load_depth(values["depth"]).shape)
                found |= {"H": height, "W": width}
        return {**found, "strength": 1.0}

    def check(self, options: DepthOptions, facts: ModelFacts | None) -> list[str]:
        """A picture or a depth map is there, and of one shape where both are."""
        problems = wrong_kind(self.name, options.config, ("depth",))
        problems += _file_problems(options) + strength_problems(options)
        if not options.init_img and not options.depth:
            problems.append("depth2img needs a picture whose depth is kept: --init-img FILE, or its depth: --depth FILE")
        elif not options.init_img and options.strength != 1.0:
            problems.append(f"--strength {options.strength} keeps a part of a picture: name it by --init-img, or leave --strength out")
        return problems

    def read(self, options: DepthOptions) -> dict[str, np.ndarray]:
        """Picture and depth map (float32 (H, W)) at the size of the result."""
        found = super().read(options) if options.init_img else {}
        if options.depth:
            found["depth"] = fit_depth(load_depth(options.depth), options.W, options.H, options.fit)
        return found

    def model_config(self, options: DepthOptions, config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """With depth maps for all pictures MiDaS is not built, and its weights need not be there."""
        maps = [getattr(line, "overrides", {}).get("depth", options.depth) for line in options.prompts] or [options.depth]
        if not all(maps):
            _require_midas(options.ckpt)
            return config, ()
        params = {**config["params"], "depth_stage_config": {"target": "torch.nn.Identity"}}
        return {**config, "params": params}, (_MIDAS,)

    def condition(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """Text and depth; the picture's latent to start from."""
        from ldm.inference import conditions

        size, inputs, strength = pipeline.latent_shape[1:], pipeline.inputs, pipeline.settings.strength
        if "depth" in inputs:
            channel = conditions.given_depth(inputs["depth"], size, pipeline.device)
        else:
            channel = conditions.estimated_depth(pipeline.model, inputs["init_img"], size, pipeline.device)
        cond, uncond = (text if text is None else conditions.with_text(text, c_concat=[channel]) for text in pipeline.encode_text(batch))
        x0 = pipeline.encode(inputs["init_img"]) if "init_img" in inputs and strength < 1 else None
        return Condition(cond, uncond, pipeline.latent_shape, x0=x0, strength=strength)


def _require_midas(ckpt: str) -> None:
    from ldm.inference.weights.files import read_header

    if Path(ckpt).is_file() and not any(name.startswith(_MIDAS) for name in read_header(Path(ckpt)).tensors):
        raise CheckpointError(f"{ckpt!r} has no depth estimator ({_MIDAS}*): give the depth map by --depth FILE")


def load_depth(path: str) -> np.ndarray:
    """A depth map as float32 (H, W), any range: a gray picture of 8, 16 or 32 bits, or a .npy file. Raises `UserError`."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        if Path(path).suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as file:
                values = np.asarray(file if file.mode.startswith("I") or file.mode == "F" else file.convert("L"))
        values = np.squeeze(values).astype(np.float32)
    except FileNotFoundError:
        raise UserError(f"depth map {path!r} does not exist") from None
    except (OSError, ValueError, EOFError, TypeError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"depth map {path!r} cannot be read ({error}): use a gray PNG or TIFF, or .npy") from None
    if values.ndim != 2 or not np.isfinite(values).all() or values.size == 0:
        raise UserError(f"depth map {path!r} must be one channel of finite numbers, (H, W); it is {values.shape}")
    return values


def fit_depth(depth: np.ndarray, width: int, height: int, mode: str) -> np.ndarray:
    """As `fit_image`, for a depth map: float32 (height, width). Padding is as far as the farthest point."""
    import numpy as np
    from PIL import Image, ImageOps

    image, size = Image.fromarray(depth, mode="F"), (width, height)
    if image.size == size:
        return depth
    if mode == "crop":
        return np.asarray(ImageOps.fit(image, size, Image.Resampling.BICUBIC))
    if mode == "pad":
        return np.asarray(ImageOps.pad(image, size, Image.Resampling.BICUBIC, color=float(depth.min())))  # type: ignore[arg-type]
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def _file_problems(options: DepthOptions) -> list[str]:
    sizes, problems = {}, []
    for flag, path, load in (("--init-img", options.init_img, load_image), ("--depth", options.depth, load_depth)):
        if path:
            try:
                found: Any = load(path)
                sizes[flag] = found.size if flag == "--init-img" else found.shape[::-1]
            except UserError as error:
                problems.append(f"{flag}: {error}")
    if len(sizes) == 2:
        (w, h), (depth_w, depth_h) = sizes.values()
        if abs(depth_w * h / (depth_h * w) - 1.0) > 0.02:
            problems.append(f"depth map is {depth_w}x{depth_h}, the picture {w}x{h}: it must be of the same size, or the same shape")
    return problems
