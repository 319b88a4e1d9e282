"""unCLIP: variations of a picture, and pictures between two. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.imaging import FIT_MODES, fit_image, load_image
from ldm.inference.options import Options
from ldm.inference.prompts import MAX_SEED
from ldm.inference.tasks.base import Condition, Task
from ldm.inference.tasks.kinds import wrong_kind

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldm.inference.facts import ModelFacts
    from ldm.inference.pipeline import Pipeline
    from ldm.inference.prompts import Batch


@dataclass
class UnclipOptions(Options):
    """Options of unclip."""

    init_img: str | None = None
    second_img: str | None = None
    mix: list[float] | None = None  # shares of the second picture, one a picture of an iteration; None: evenly from 0 to 1
    noise_level: int = 0
    fit: str = "crop"


class Unclip(Task):
    """Pictures from the CLIP embedding of one picture, or of what lies between two."""

    name = "unclip"
    title = "Draw variations of a picture, or the way from one to another"
    ships = False
    options = UnclipOptions
    defaults = {"sampler": "ddim", "steps": 50, "scale": 10.0, "n_samples": 4, "n_iter": 1, "prompt": ""}  # noqa: RUF012
    files = {"init_img": "picture", "second_img": "second picture"}  # noqa: RUF012
    per_picture = frozenset({"init_img", "noise_level", "fit"})
    choices = {"fit": FIT_MODES}  # noqa: RUF012

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """One picture or two, and how freely they are followed."""
        group.add_argument("--init_img", metavar="FILE", help="the picture to vary")
        group.add_argument("--second_img", metavar="FILE", help="pictures lead from --init-img to this one, all from the same noise")
        group.add_argument(
            "--mix", type=float, nargs="+", action="extend", metavar="SHARE", help="shares of the second, 0 to 1 (evenly, one a picture)"
        )
        group.add_argument("--noise_level", type=int, metavar="N", help="0 follows the picture closely, more frees the variations (0)")
        group.add_argument("--fit", choices=FIT_MODES, help="how the pictures become squares for CLIP (crop)")

    def resolve(self, values: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """The model's size; between two pictures one noise for all, and a picture a share."""
        found: dict[str, Any] = {**super().resolve(values, facts), "prompt": ""}
        shares = values.get("mix") or []
        if values.get("second_img") and len(shares) != 1:
            found["fixed_code"] = True
        if len(shares) > 1:
            found["n_samples"] = len(shares)
        return found

    def check(self, options: UnclipOptions, facts: ModelFacts | None) -> list[str]:
        """The pictures are there, shares and noise level within their ranges."""
        problems = wrong_kind(self.name, options.config, ("unclip",)) + super().check(options, facts)
        if not options.init_img:
            problems.append("unclip needs a picture to vary: --init-img FILE")
        if options.mix is not None:
            problems += self._mix_problems(options)
        elif options.second_img and options.from_file:
            problems.append("--second-img with --from-file needs one --mix SHARE for all lines")
        levels = max_level(facts) if facts is not None else 0
        if facts is not None and not 0 <= options.noise_level <= levels:
            problems.append(f"--noise_level {options.noise_level} must lie in 0 to {levels}, for which this model was trained")
        return problems

    def _mix_problems(self, options: UnclipOptions) -> list[str]:
        assert options.mix is not None
        if not options.second_img:
            return ["--mix says nothing without --second-img FILE"]
        if not all(0.0 <= share <= 1.0 for share in options.mix):
            return [f"--mix {' '.join(f'{share:g}' for share in options.mix)} must lie in 0 to 1"]
        if len(options.mix) != 1 and (options.from_file or len(options.mix) != options.n_samples):
            return [f"--mix gives {len(options.mix)} shares: give one for all pictures, or with --prompt one each (--n_samples)"]
        return []

    def read(self, options: UnclipOptions) -> dict[str, np.ndarray]:
        """The pictures, as squares of their shorter side."""
        import numpy as np

        found = {}
        for name in self.files:
            if getattr(options, name):
                image = load_image(getattr(options, name))
                found[name] = np.asarray(fit_image(image, min(image.size), min(image.size), options.fit))
        return found

    def condition(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """Text and embedding; without guidance by the embedding, zeros stand in its place."""
        import torch

        from ldm.inference import conditions

        own, inputs, model = pipeline.own, pipeline.inputs, pipeline.model
        embeddings = [conditions.image_embedding(model, inputs[name], pipeline.device) for name in self.files if name in inputs]
        embedding = embeddings[0].expand(len(batch), -1)
        if len(embeddings) == 2:
            shares = own.mix or [i / max(own.n_samples - 1, 1) for i in range(own.n_samples)]
            weights = torch.tensor([shares[(batch.start + i) % len(shares)] for i in range(len(batch))])
            embedding = conditions.between(embeddings[0], embeddings[1], weights)
        noise = self._noise(pipeline, embedding)
        c_adm = conditions.embedding_condition(model, embedding, own.noise_level, noise)
        cond, uncond = pipeline.encode_text(batch)
        cond = conditions.with_text(cond, c_adm=c_adm)
        uncond = None if uncond is None else conditions.with_text(uncond, c_adm=torch.zeros_like(c_adm))
        return Condition(cond, uncond, pipeline.latent_shape)

    def _noise(self, pipeline: Pipeline, embedding: Tensor) -> Tensor:
        """Noise for the embeddings; the same for all where all pictures start from one noise, and other numbers than those."""
        from ldm.inference import conditions
        from ldm.inference.noise import ImageNoise

        fixed = pipeline.settings.fixed_seed
        if fixed is None:
            return conditions.normal(pipeline.noise, embedding.shape, pipeline.device)
        source = ImageNoise([(fixed + (MAX_SEED + 1) // 2) % (MAX_SEED + 1)])
        return conditions.normal(source, (1, embedding.shape[1]), pipeline.device).expand_as(embedding)


def max_level(facts: ModelFacts) -> int:
    """The largest noise level of the model's embedding; 0 where it adds none."""
    config = facts.params.get("noise_aug_config") or {}
    params = config.get("params") or {}
    return int((params.get("noise_schedule_config") or {}).get("timesteps", 1000)) - 1 if config else 0
