"""sample_diffusion: pictures of models without prompts, from nothing, a class, a layout or a label map. Imports no torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.inference.facts import WEIGHTS_NAME, read_facts
from ldm.inference.options import Options
from ldm.inference.tasks.base import Condition, Task
from ldm.inference.tasks.kinds import wrong_kind
from ldm.inference.tasks.layout import layout_tokens, read_layout
from ldm.util import UserError

if TYPE_CHECKING:
    import numpy as np

    from ldm.inference.facts import ModelFacts
    from ldm.inference.pipeline import Pipeline
    from ldm.inference.prompts import Batch, PromptLine
    from ldm.inference.sharding import Share

_WEIGHTS = (WEIGHTS_NAME, "model.ckpt", "last.ckpt")  # beside a config.yaml
_FILE_OF = {"layout": "layout", "semantic": "segmentation"}  # kind -> the flag that names its condition
_GRID_UP_TO = 100  # pictures


@dataclass
class SampleOptions(Options):
    """Options of sample_diffusion."""

    batch_size: int = 10
    vanilla_sample: bool = False
    classes: list[int] | None = None
    layout: str | None = None
    segmentation: str | None = None
    skip_npz: bool = False
    kind: str = "unconditional"  # of the model, see `kinds`

    @property
    def batch(self) -> int:
        """Pictures that are drawn at once."""
        return self.batch_size


class SampleDiffusion(Task):
    """Pictures without prompts."""

    name = "sample_diffusion"
    title = "Draw pictures with a model that takes no prompt: unconditional, by class, by layout, by label map"
    ships = False
    options = SampleOptions
    defaults = {"sampler": "ddim", "steps": 50, "scale": 1.0, "ddim_eta": 1.0, "n_samples": 10, "n_iter": 1}  # noqa: RUF012
    prompts = False
    files = {"layout": "layout", "segmentation": "label map"}  # noqa: RUF012

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """The original's flags, and what a condition is made of."""
        group.add_argument(
            "-r", "--resume", metavar="RUN", help="the model: a folder with config.yaml and weights, a run's, or weights there"
        )
        group.add_argument("-n", dest="n_samples", type=int, metavar="N", help="same as --n_samples: pictures in all (10)")
        group.add_argument("--batch_size", type=int, metavar="N", help="pictures drawn at once (10)")
        group.add_argument("-c", "--custom_steps", dest="steps", type=int, metavar="N", help="same as --steps (50)")
        group.add_argument("-e", "--eta", dest="ddim_eta", type=float, metavar="ETA", help="same as --ddim_eta (1)")
        group.add_argument("-v", "--vanilla_sample", action="store_true", help="DDPM sampling along all timesteps")
        group.add_argument("-l", "--logdir", dest="outdir", metavar="DIR", help="same as --outdir")
        group.add_argument("--classes", type=int, nargs="+", action="extend", metavar="CLASS", help="these in turn (0, 1, 2, ...)")
        group.add_argument("--layout", metavar="JSON", help='layout: [{"class": 3, "box": [left, top, width, height]}, ...], in shares')
        group.add_argument("--segmentation", metavar="PNG", help="semantic synthesis: a gray or palette picture whose values are classes")
        group.add_argument("--skip_npz", action="store_true", help="write no DIR/NxHxWx3-samples.npz with all pictures")

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        """--resume becomes config and weights."""
        values = dict(given)
        resume = values.pop("resume", None)
        if resume is None:
            return values
        if {"config", "ckpt"} & set(values):
            raise UserError("--resume names config and weights: leave out --config and --ckpt")
        config, ckpt = find_run(resume)
        return {**values, "config": config, "ckpt": ckpt}

    def resolve(self, values: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """The model's size; guidance for classes; all timesteps with --vanilla_sample."""
        found = {**super().resolve(values, facts), "kind": facts.kind}
        if facts.kind == "class":
            found["scale"] = 1.5 if _has_empty_class(facts) else 1.0
        if values.get("vanilla_sample"):
            found |= {"sampler": "ddpm", "steps": facts.timesteps, "ddim_eta": None}
        elif values.get("sampler", facts.sampling.get("sampler", "ddim")) != "ddim":
            found["ddim_eta"] = None  # the sampler's own
        count = values.get("n_samples", max(len(values.get("classes") or ()), int(self.defaults["n_samples"])))
        return found | {"n_samples": count, "n_rows": min(count, 10), "skip_grid": count > _GRID_UP_TO}

    def check(self, options: SampleOptions, facts: ModelFacts | None) -> list[str]:
        """The model takes no prompt, and its condition is there."""
        problems = wrong_kind(self.name, options.config, ("class", "layout", "semantic", "unconditional"))
        if options.batch_size < 1:
            problems.append(f"--batch_size {options.batch_size} must be at least 1")
        problems += _batch_problems(options)
        if options.vanilla_sample and (options.sampler != "ddpm" or (facts is not None and options.steps != facts.timesteps)):
            problems.append("--vanilla_sample is DDPM along all timesteps: leave out --sampler and --custom_steps, or take --sampler ddpm")
        if options.skip_save and not options.skip_npz:
            problems.append("--skip_save leaves nothing for the .npz file: add --skip_npz, or leave it out")
        return problems if facts is None or problems else _condition_problems(options, facts)

    def pictures(self, options: SampleOptions, problems: list[str]) -> list[str | PromptLine] | None:
        """What each picture is of, in order: for classes their numbers, in turn."""
        if options.kind != "class":
            return [str(getattr(options, _FILE_OF.get(options.kind, ""), None) or "")] * options.n_samples
        facts = read_facts(options.config)
        classes = options.classes or range(max(_class_count(facts) - _has_empty_class(facts), 1))
        return [f"class {classes[i % len(classes)]}" for i in range(options.n_samples)]

    def read(self, options: SampleOptions) -> dict[str, np.ndarray]:
        """The tokens of the layout (L,), or the label map, integers (H, W), at the size of the picture."""
        import numpy as np

        if options.layout:
            return {"layout": np.array(_tokens(options.layout, read_facts(options.config)))}
        if options.segmentation:
            return {"segmentation": read_labels(options.segmentation, options.W, options.H)}
        return {}

    def condition(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """What the network sees, by the kind of the model."""
        from ldm.inference import conditions

        kind, model, inputs = pipeline.own.kind, pipeline.model, pipeline.inputs
        cond = uncond = None
        if kind == "class":
            labels = [_label(text) for text in batch.prompts]
            cond = conditions.class_condition(model, labels)
            nothing = [model.cond_stage_model.n_classes - 1] * len(labels)
            uncond = None if pipeline.settings.scale == 1.0 else conditions.class_condition(model, nothing)
        elif kind == "layout":
            cond = conditions.token_condition(model, inputs["layout"].tolist(), pipeline.device)
        elif kind == "semantic":
            classes = model.cond_stage_model.channel_mapper.in_channels
            cond = conditions.label_map_condition(model, inputs["segmentation"], classes, pipeline.device)
        return Condition(cond, uncond, pipeline.latent_shape)


def _label(text: str) -> int:
    match = re.fullmatch(r"class (\d+)", text)
    if match is None:
        raise UserError(f"the record of the batch is damaged: {text!r} names no class")
    return int(match[1])


def _batch_problems(options: SampleOptions) -> list[str]:
    """A batch that no record could hold."""
    largest = min(options.batch_size, options.n_samples)
    if largest <= SampleOptions.batch_size:  # `record` imports torch, which most calls need not wait for here
        return []
    from ldm.inference.record import MOST_PICTURES

    if largest <= MOST_PICTURES:
        return []
    return [f"--batch_size {options.batch_size}: a picture records its whole batch, of at most {MOST_PICTURES} pictures; give no more"]


def _condition_problems(options: SampleOptions, facts: ModelFacts) -> list[str]:
    """What is missing or too much for a model of this kind."""
    problems = []
    for kind, flag in (("class", "classes"), *_FILE_OF.items()):
        given = getattr(options, flag)
        if given and facts.kind != kind:
            problems.append(f"--{flag} has no meaning for this model ({facts.kind}): leave it out")
        if facts.kind == kind and not given and kind != "class":
            problems.append(f"this model draws from a {kind} condition: name it by --{flag}")
    if facts.kind != "class" and options.scale != 1.0:
        problems.append(f"--scale {options.scale:g}: only class-conditional models have an empty condition to be guided by; leave it out")
    if facts.kind == "class":
        count = _class_count(facts)
        if options.scale != 1.0 and not _has_empty_class(facts) and not options.reproduce:
            problems.append(
                f"--scale {options.scale:g}: none of this model's {count} classes stands for nothing, to be guided by; leave it out"
            )
        if wrong := [label for label in options.classes or () if not 0 <= label < count]:
            problems.append(f"--classes {' '.join(map(str, wrong))}: this model has classes 0 to {count - 1}")
    return problems + _file_problems(options, facts)


def _file_problems(options: SampleOptions, facts: ModelFacts) -> list[str]:
    try:
        if options.layout:
            _tokens(options.layout, facts)
        if options.segmentation:
            labels, count = read_labels(options.segmentation, options.W, options.H), _stage(facts).get("in_channels", 3)
            if labels.max() >= count:
                return [f"label map {options.segmentation!r} has class {labels.max()}; this model knows 0 to {count - 1}"]
    except UserError as error:
        return [str(error)]
    return []


def _stage(facts: ModelFacts) -> Mapping[str, Any]:
    """Parameters of the cond stage."""
    stage = facts.params["cond_stage_config"]
    return stage.get("params") or {}


def _class_count(facts: ModelFacts) -> int:
    return int(_stage(facts).get("n_classes", 1000))


def _has_empty_class(facts: ModelFacts) -> bool:
    """Whether the last class stands for nothing. It does but for ImageNet's 1000 without dropout, where it is a thing like the others."""
    return _class_count(facts) != 1000 or bool(_stage(facts).get("ucg_rate") or facts.params.get("ucg_training"))


def _tokens(path: str, facts: ModelFacts) -> list[int]:
    stage = _stage(facts)
    return layout_tokens(read_layout(path), int(stage["max_seq_len"]), int(stage["vocab_size"]))


def read_labels(path: str, width: int, height: int) -> np.ndarray:
    """A label map, integers (height, width), from a gray or palette picture. Raises `UserError`."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "I", "I;16", "1"):
                raise UserError(f"label map {path!r} has colours ({image.mode}): it must be gray or have a palette, its values are classes")
            labels = np.asarray(image.resize((width, height), Image.Resampling.NEAREST)).astype(np.int64)
    except FileNotFoundError:
        raise UserError(f"label map {path!r} does not exist") from None
    except Image.DecompressionBombError:
        raise UserError(f"label map {path!r} is too large: at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from None
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"label map {path!r} cannot be read: {error}") from None
    if labels.min() < 0:
        raise UserError(f"label map {path!r} has the value {labels.min()}: its values are classes, numbered from 0 on")
    return labels


def find_run(path: str) -> tuple[str, str]:
    """(config, weights) of a folder with config.yaml and weights, of a run's folder, or of a weights file in one. Raises `UserError`."""
    given = Path(path)
    if not given.exists():
        raise UserError(f"--resume {path!r} does not exist")
    folders, weights = (list(given.resolve().parents)[:2], [given]) if given.is_file() else ([given], _weights_in(given))
    if not weights:
        raise UserError(f"--resume {path!r} has no weights: it needs checkpoints/last.ckpt, {' or '.join(_WEIGHTS)}; or name the file")
    for folder in folders:
        runs = sorted((folder / "configs").glob("*-project.yaml"))  # a start each, all settings in each
        config = runs[-1] if runs else folder / "config.yaml"
        if config.is_file():
            return str(config), str(weights[0])
    raise UserError(f"--resume {path!r}: neither config.yaml nor configs/*-project.yaml is there; give --config and --ckpt instead")


def _weights_in(folder: Path) -> list[Path]:
    return [path for path in (folder / "checkpoints" / "last.ckpt", *(folder / name for name in _WEIGHTS)) if path.is_file()]


def main(argv: Sequence[str] | None = None) -> int:
    """scripts/sample_diffusion.py: draw, then pack the pictures; gives the exit code."""
    from ldm.inference.args import parse
    from ldm.inference.cli import guarded

    return guarded(lambda: _run(parse(SampleDiffusion.name, argv)))


def _run(options: SampleOptions) -> None:
    from ldm.inference.cli import draw, say

    summary = draw(options)
    if not options.skip_npz and not options.reproduce:
        from ldm.inference.npz import write_npz

        folder = Path(options.outdir)
        say(f"npz: {write_npz(folder, summary.samples) if summary.share is None else _pack_run(summary.share, folder)}")


def _pack_run(share: Share, folder: Path) -> str:
    """Pack the run that several processes or calls draw, once all of it is there; gives the file, or why there is none yet."""
    from ldm.inference.npz import write_npz

    paths = share.paths()
    missing = sum(not path.exists() or path.stat().st_size == 0 for path in paths)  # a name may be reserved for a moment
    if missing:
        who = "the process that draws the last of them packs all, and if it was stopped, a call with --continue does"
        return f"not yet, {missing} of {len(paths)} pictures are still to be drawn; {who}"
    if share.rank > 0 and not share.batches:
        return "left to the other processes"
    share.check_all()  # each process has looked at its own pictures only
    return str(write_npz(folder, paths, once=True))
