"""Inpainting: a part of a picture is drawn anew, the rest comes back to the bit. Imports no torch.

Works with networks that see the mask (9 channels; LDM's, without text) and, through the sampler's mask, with any other model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.imaging import fit_image, load_image
from ldm.inference.facts import read_facts
from ldm.inference.prompts import PromptLine
from ldm.inference.tasks.base import Condition
from ldm.inference.tasks.kinds import wrong_kind
from ldm.inference.tasks.text import ImageOptions, ImageToImage, strength_problems
from ldm.util import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ldm.inference.facts import ModelFacts
    from ldm.inference.pipeline import Pipeline
    from ldm.inference.prompts import Batch

_WITH_TEXT = ("inpaint", "text")
_KINDS = (*_WITH_TEXT, "concat-inpaint", "unconditional")
_SAME_SHAPE = 0.02  # largest difference of width / height between picture and mask


@dataclass
class InpaintOptions(ImageOptions):
    """Options of inpainting."""

    mask: str | None = None
    mask_blur: int = 8  # pixels outside the mask over which the new part fades into the kept one
    indir: str | None = None
    kind: str = "text"  # of the model, see `kinds`


class Inpaint(ImageToImage):
    """Pictures of which a part is drawn anew."""

    name = "inpaint"
    title = "Draw a part of a picture anew"
    options = InpaintOptions
    defaults = {"sampler": "ddim", "steps": 50, "scale": 7.5, "n_samples": 1, "n_iter": 1, "strength": 1.0}  # noqa: RUF012
    files = {"init_img": "picture", "mask": "mask"}  # noqa: RUF012
    per_picture = frozenset({"init_img", "mask", "mask_blur", "strength", "fit"})

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Picture and mask, or a folder of such pairs."""
        group.add_argument("--mask", metavar="FILE", help="white is drawn anew, black is kept")
        group.add_argument("--mask_blur", type=int, metavar="PIXELS", help="the new part fades out over so many pixels around the mask (8)")
        group.add_argument("--indir", metavar="DIR", help="instead: every X.png with a mask X_mask.png in this folder")
        super().add_flags(group)

    def resolve(self, values: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """As img2img's; models without text need neither a prompt nor guidance."""
        found = {**super().resolve(values, facts), "kind": facts.kind}
        if facts.kind not in _WITH_TEXT:
            found |= {"scale": 1.0}
        if facts.kind not in _WITH_TEXT or (facts.kind == "inpaint" and not values.get("from_file")):
            found |= {"prompt": ""}
        return found

    def check(self, options: InpaintOptions, facts: ModelFacts | None) -> list[str]:
        """Picture and mask belong together, and the model can use them."""
        problems = wrong_kind(self.name, options.config, _KINDS)
        if facts is not None and facts.kind not in _WITH_TEXT:
            problems += text_problems(options)
        problems += strength_problems(options)
        if options.mask_blur < 0:
            problems.append(f"--mask_blur {options.mask_blur} must be 0 (a hard edge) or more")
        if options.indir is not None and not (options.init_img or options.mask):  # its pairs are looked at one by one
            return problems
        if not options.init_img:
            problems.append("inpainting needs a picture: --init-img FILE")
        if not options.mask:
            problems.append("inpainting needs a mask, white where to draw: --mask FILE")
        return problems + (pair_problems(options.init_img, options.mask, options.fit) if options.init_img and options.mask else [])

    def pictures(self, options: InpaintOptions, problems: list[str]) -> list[Any] | None:
        """Those of --indir; else None: what the prompts say."""
        if options.indir is None:
            return None
        if options.init_img or options.mask or options.from_file:
            problems.append("--indir names pictures and masks itself: leave out --init-img, --mask and --from-file")
            return []
        try:
            pairs = find_pairs(options.indir)
        except UserError as error:
            problems.append(str(error))
            return []
        given = {name: options.given[name] for name in ("H", "W") if name in options.given}
        lines = []
        for image, mask in pairs:
            size = {**self._size_of(image, options), **given}
            lines += [PromptLine(options.prompt or "", {"init_img": str(image), "mask": str(mask), **size})] * options.n_samples
        return lines

    def _size_of(self, image: Path, options: InpaintOptions) -> dict[str, int]:
        found = super().resolve({"init_img": str(image)}, read_facts(options.config))
        return {name: found[name] for name in ("H", "W")}

    def read(self, options: InpaintOptions) -> dict[str, np.ndarray]:
        """Picture and mask (bool (H, W)) at the size of the result; with --fit pad the padding is drawn, too."""
        import numpy as np

        from ldm.inference.conditions import binary_mask

        found = super().read(options)
        assert options.mask is not None
        mask = binary_mask(np.asarray(fit_image(load_mask(options.mask), options.W, options.H, options.fit)))
        if not mask.any():
            raise UserError(f"mask {options.mask!r} has no white, so there is nothing to draw")
        return {**found, "mask": mask}

    def condition(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """What the network is to see of picture and mask; and what is pasted back."""
        from ldm.inference import conditions

        own, image, mask = pipeline.own, pipeline.inputs["init_img"], pipeline.inputs["mask"]
        weight = conditions.soft_edge(mask, own.mask_blur)
        found = {"concat-inpaint": self._seen_alone, "inpaint": self._seen_with_text}.get(own.kind, self._held)(pipeline, batch)
        found.strength = pipeline.settings.strength
        if found.x0 is None and found.strength < 1:
            found.x0 = pipeline.encode(image)
        found.finish = lambda drawn, _: conditions.paste(drawn, image, weight)
        return found

    def _seen_alone(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """For networks that see picture and mask, and no text."""
        from ldm.inference import conditions

        inputs = pipeline.inputs
        cond = conditions.concat_inpainting_channels(pipeline.model, inputs["init_img"], inputs["mask"], pipeline.device)
        return Condition(cond, None, pipeline.latent_shape)

    def _seen_with_text(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """For networks that see picture, mask and text."""
        from ldm.inference import conditions

        mask = pipeline.inputs["mask"]
        masked = pipeline.encode(conditions.masked_picture(pipeline.inputs["init_img"], mask, 0.0))
        channels = [conditions.inpainting_channels(pipeline.model, mask, masked)]
        cond, uncond = (text if text is None else conditions.with_text(text, c_concat=channels) for text in pipeline.encode_text(batch))
        return Condition(cond, uncond, pipeline.latent_shape)

    def _held(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """For networks that know nothing of it: the sampler holds what is kept at the picture."""
        from ldm.inference import conditions

        cond, uncond = pipeline.encode_text(batch) if pipeline.own.kind == "text" else (None, None)
        kept = conditions.kept_cells(pipeline.inputs["mask"], pipeline.latent_shape[1:]).to(pipeline.device)
        x0 = pipeline.encode(pipeline.inputs["init_img"])
        return Condition(cond, uncond, pipeline.latent_shape, x0=x0, mask=kept)


def text_problems(options: Any) -> list[str]:
    """What a model without text cannot do."""
    problems = []
    if options.prompt or options.negative_prompt or options.from_file:
        problems.append("this model knows no text: leave out --prompt, --negative-prompt and --from-file")
    if options.clip_skip is not None or options.prompt_syntax != "plain":
        problems.append("this model knows no text: leave out --clip_skip and --prompt_syntax")
    if options.scale != 1.0:
        problems.append(f"--scale {options.scale:g}: this model has no condition to be guided by; leave it out")
    return problems


def find_pairs(folder: str) -> list[tuple[Path, Path]]:
    """Every picture X.png of a folder that has a mask X_mask.png, with it, by name. Raises `UserError` where there are none."""
    masks = sorted(Path(folder).glob("*_mask.png")) if Path(folder).is_dir() else []
    if not masks:
        raise UserError(f"--indir {folder!r} has no masks: it must be a folder with X.png and X_mask.png")
    return [(mask.with_name(mask.name.removesuffix("_mask.png") + ".png"), mask) for mask in masks]


def load_mask(path: str) -> Image.Image:
    """A mask as RGB. What is transparent is kept: strokes are often drawn in white on a layer of their own."""
    return load_image(path, ground="black")


def pair_problems(image: str, mask: str, fit: str) -> list[str]:
    """What is wrong with a picture and its mask, a clause each."""
    found, problems = {}, []
    for flag, path, read in (("--init-img", image, load_image), ("--mask", mask, load_mask)):
        try:
            found[flag] = read(path)
        except UserError as error:
            problems.append(f"{flag}: {error}")
    if problems:
        return problems
    (w, h), (mask_w, mask_h) = (picture.size for picture in found.values())
    if abs(mask_w * h / (mask_h * w) - 1.0) > _SAME_SHAPE:
        problems.append(f"mask {mask!r} is {mask_w}x{mask_h}, the picture {w}x{h}: it must be of the same size, or the same shape")
    if fit != "pad" and found["--mask"].convert("L").getextrema()[1] < 128:
        problems.append(f"mask {mask!r} has no white, so there is nothing to draw")
    return problems
