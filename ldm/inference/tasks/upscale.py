"""Upscaling: a small picture drawn larger, by upscalers with a prompt (x4) and by super-resolution models without. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.imaging import load_image
from ldm.inference.options import Options
from ldm.inference.tasks.base import Condition, Task
from ldm.inference.tasks.inpaint import text_problems
from ldm.inference.tasks.kinds import wrong_kind
from ldm.util import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.inference.facts import ModelFacts
    from ldm.inference.pipeline import Pipeline
    from ldm.inference.prompts import Batch

_DEFAULT_LEVEL = 20


@dataclass
class UpscaleOptions(Options):
    """Options of upscaling."""

    init_img: str | None = None
    noise_level: int = 0
    kind: str = "upscale"  # of the model, see `kinds`
    zoom: int = 4  # pixels of the result per pixel of the small picture, along one side
    small_height: int = 0  # of the small picture; H and W are those of the result with its padding
    small_width: int = 0


class Upscale(Task):
    """Pictures from small pictures."""

    name = "upscale"
    title = "Draw a small picture larger"
    ships = False
    options = UpscaleOptions
    defaults = {"sampler": "ddim", "steps": 50, "scale": 9.0, "n_samples": 1, "n_iter": 1}  # noqa: RUF012
    sizes = False
    files = {"init_img": "small picture"}  # noqa: RUF012
    per_picture = frozenset({"init_img", "noise_level"})
    from_picture = frozenset({"small_height", "small_width"})

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """The small picture, and how much of its detail is drawn anew."""
        group.add_argument("--init_img", metavar="FILE", help="the small picture; the result is larger by the model's factor")
        group.add_argument("--noise_level", type=int, metavar="N", help="0 trusts its detail, more draws more of it anew (20)")

    def resolve(self, values: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """The size of the result, with the padding that the network needs; the small picture's size times the factor."""
        zoom = zoom_of(facts)
        found = {**super().resolve(values, facts), "kind": facts.kind, "zoom": zoom, "prompt": ""}
        if facts.kind == "superresolution":
            found["scale"] = 1.0
        if max_level(facts) > 0:
            found["noise_level"] = min(_DEFAULT_LEVEL, max_level(facts))
        if values.get("init_img"):
            try:
                width, height = load_image(values["init_img"]).size
            except UserError:  # told by check
                return found
            found |= {"small_height": height, "small_width": width}
            found |= {name: side * zoom + -(side * zoom) % facts.multiple for name, side in (("H", height), ("W", width))}
        return found

    def check(self, options: UpscaleOptions, facts: ModelFacts | None) -> list[str]:
        """The picture is there, and the noise level is one that the model was trained for."""
        problems = wrong_kind(self.name, options.config, ("upscale", "superresolution")) + super().check(options, facts)
        if not options.init_img:
            problems.append("upscaling needs a picture: --init-img FILE")
        if facts is None:
            return problems
        if (options.kind, options.zoom) != (facts.kind, zoom_of(facts)):  # of a record: no flag says it
            problems.append(f"the record says {options.kind} by {options.zoom}; this model is for {facts.kind} by {zoom_of(facts)}")
        if facts.kind == "superresolution":
            problems += text_problems(options)
        top = max_level(facts)
        if options.noise_level and top == 0:
            problems.append(f"--noise_level {options.noise_level}: this model adds no noise to the small picture; leave it out")
        elif not 0 <= options.noise_level <= top:
            problems.append(f"--noise_level {options.noise_level} must lie in 0 to {top}, for which this model was trained")
        return problems

    def read(self, options: UpscaleOptions) -> dict[str, np.ndarray]:
        """The small picture, its last row and column repeated up to the size that the network takes."""
        import numpy as np

        assert options.init_img is not None
        image = np.asarray(load_image(options.init_img))
        height, width = image.shape[:2]
        bottom, right = options.H // options.zoom - height, options.W // options.zoom - width
        if min(bottom, right) < 0:
            raise UserError(f"small picture {options.init_img!r} is {width}x{height}, too large for a result of {options.W}x{options.H}")
        return {"init_img": np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="edge")}

    def condition(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """The small picture beside the latent; and the text, where the model knows one."""
        from ldm.imaging import to_tensor
        from ldm.inference import conditions

        own, image = pipeline.own, pipeline.inputs["init_img"]

        def cut(drawn: np.ndarray, _: int) -> np.ndarray:
            return drawn[: own.small_height * own.zoom, : own.small_width * own.zoom]

        if own.kind == "superresolution":
            cond = pipeline.model.get_learned_conditioning(to_tensor(image).to(pipeline.device))
            return Condition(cond, None, pipeline.latent_shape, finish=cut)
        noise = conditions.normal(pipeline.noise, (len(batch), 3, *image.shape[:2]), pipeline.device)
        entries = conditions.small_image(pipeline.model, image, own.noise_level, noise, pipeline.device)
        cond, uncond = (text if text is None else conditions.with_text(text, **entries) for text in pipeline.encode_text(batch))
        return Condition(cond, uncond, pipeline.latent_shape, finish=cut)


def zoom_of(facts: ModelFacts) -> int:
    """Pixels of the result per pixel of the small picture, along one side."""
    return facts.factor // int(facts.params.get("reshuffle_patch_size") or 1)


def max_level(facts: ModelFacts) -> int:
    """The largest noise level that the model was trained for; 0 where it adds no noise."""
    config = facts.params.get("low_scale_config") or {}
    params = config.get("params") or {}
    return int(params.get("max_noise_level", 1000)) - 1 if "noise_schedule_config" in params else 0
