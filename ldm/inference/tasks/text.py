"""txt2img and img2img: pictures from a prompt, and from a picture and a prompt. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.imaging import FIT_MODES, fit_image, load_image, nearest_legal
from ldm.inference.options import Options
from ldm.inference.tasks.base import Condition, Task
from ldm.inference.tasks.kinds import wrong_kind
from ldm.util import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.inference.facts import ModelFacts
    from ldm.inference.pipeline import Pipeline
    from ldm.inference.prompts import Batch


class TextToImage(Task):
    """Pictures from prompts."""

    name = "txt2img"
    title = "Draw pictures from a prompt"

    def check(self, options: Options, facts: ModelFacts | None) -> list[str]:
        """The model takes text, and nothing else."""
        return wrong_kind(self.name, options.config, ("text",))

    def condition(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """Text alone."""
        cond, uncond = pipeline.encode_text(batch)
        return Condition(cond, uncond, pipeline.latent_shape)


@dataclass
class ImageOptions(Options):
    """Options of tasks that start from a picture."""

    init_img: str | None = None
    strength: float | None = None  # 0 keeps the picture, 1 starts from pure noise
    fit: str = "crop"  # how the picture is brought to W x H


class ImageToImage(Task):
    """Pictures from a picture and prompts."""

    name = "img2img"
    title = "Draw pictures from a picture and a prompt"
    options = ImageOptions
    defaults = {"sampler": "ddim", "steps": 50, "scale": 5.0, "n_samples": 2, "n_iter": 1, "strength": 0.75}  # noqa: RUF012
    files = {"init_img": "init image"}  # noqa: RUF012
    per_picture = frozenset({"init_img", "strength", "fit"})
    choices = {"fit": FIT_MODES}  # noqa: RUF012

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """The picture, how much of it stays, and how it is fitted."""
        group.add_argument("--init_img", metavar="FILE", help="the picture to start from")
        group.add_argument("--strength", type=float, help=f"0 keeps it, 1 forgets it ({self.defaults['strength']:g})")
        group.add_argument("--fit", choices=FIT_MODES, help="how to bring it to --W x --H (crop)")

    def resolve(self, values: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """The model's size. As in the originals, a model without `sampling:` keeps the size of an init image, made legal."""
        sizes = super().resolve(values, facts)
        if values.get("init_img") and not facts.sampling and not {"H", "W"} & set(values):
            with contextlib.suppress(UserError):  # told by check
                width, height = (nearest_legal(side, facts.multiple) for side in load_image(values["init_img"]).size)
                return {**sizes, "H": height, "W": width}
        return sizes

    def check(self, options: ImageOptions, facts: ModelFacts | None) -> list[str]:
        """There is a picture, and the strength is a share."""
        problems = wrong_kind(self.name, options.config, ("text",)) + super().check(options, facts)
        if not options.init_img:
            problems.append("img2img needs a picture to start from: --init-img FILE")
        return problems + strength_problems(options)

    def read(self, options: ImageOptions) -> dict[str, np.ndarray]:
        """The picture at the size of the result."""
        import numpy as np

        assert options.init_img is not None
        return {"init_img": np.asarray(fit_image(load_image(options.init_img), options.W, options.H, options.fit))}

    def condition(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """Text, and the picture's latent to start from."""
        cond, uncond = pipeline.encode_text(batch)
        x0 = pipeline.encode(pipeline.inputs["init_img"])
        return Condition(cond, uncond, pipeline.latent_shape, x0=x0, strength=pipeline.settings.strength)


def strength_problems(options: ImageOptions) -> list[str]:
    """What is wrong with the share of the steps that is walked."""
    strength = options.strength
    if strength is None:
        return []
    if not 0 <= strength <= 1:
        return [f"--strength {strength} must lie in 0 to 1"]
    if 0 < strength * options.steps < 1 and not options.reproduce:
        few = math.ceil(1 / strength)
        return [f"--strength {strength:g} of {options.steps} steps is less than a step: give --steps {few} or more, or --strength 0"]
    return []
