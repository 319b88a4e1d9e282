"""What every script checks of its flags before a weight is read; each check gives a clause for everything wrong. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ldm.imaging import legal_neighbours
from ldm.inference.additions import check_additions
from ldm.inference.facts import ModelFacts
from ldm.inference.options import Options
from ldm.inference.prompts import MAX_SEED
from ldm.inference.tasks.base import Task
from ldm.models.diffusion.registry import ALIASES, SAMPLERS, SPACINGS, sampler_info
from ldm.util import UserError


def check_options(task: Task, options: Any, facts: ModelFacts | None) -> list[str]:
    """Everything wrong with `options`, a clause each."""
    problems = check_sizes(options, facts) if facts is not None else []
    problems += check_numbers(options, facts) + task.check(options, facts)
    problems += check_sdxl(options, facts) + check_tiles(options, facts) if facts is not None else []
    return problems + check_files(options) + check_sampler(options)


def check_idle(options: Any) -> list[str]:
    """Flags that were given and would change nothing beside the others."""
    lines = [getattr(line, "overrides", {}) for line in options.prompts]
    scales = [line.get("scale", options.scale) for line in lines] or [options.scale]
    idle = {
        "repeat": (not options.from_file, "repeats the lines of --from_file FILE; for more pictures of --prompt give --n_samples"),
        "progress_every": (not options.save_progress, "says nothing without --save_progress"),
        "watermark_text": (options.watermark == "none", "says nothing with --watermark none"),
        "safety_ckpt": (options.safety == "off", "says nothing with --safety off"),
        "negative_prompt": (set(scales) == {1.0}, "says nothing at --scale 1, which is no guidance"),
        "guidance_rescale": (set(scales) == {1.0}, "says nothing at --scale 1, which is no guidance"),
        "negative_aesthetic_score": (set(scales) == {1.0}, "says nothing at --scale 1, which is no guidance"),
    }
    problems = [f"--{name} {why}" for name, (unused, why) in idle.items() if unused and options.given.get(name)]
    for line, scale in zip(options.prompts, scales, strict=False):
        if scale == 1.0 and getattr(line, "overrides", {}).get("negative_prompt"):
            problems.append(f"line {line.line}: negative_prompt says nothing at scale 1, which is no guidance")
    return problems


def check_sizes(options: Options, facts: ModelFacts) -> list[str]:
    """The network's legal heights and widths, and the numbers that must agree with its config."""
    problems = []
    for flag, value in (("--H", options.H), ("--W", options.W)):
        near = legal_neighbours(value, facts.multiple)
        if near != (value,):
            problems.append(f"{flag} {value} must be a multiple of {facts.multiple}: use {' or '.join(map(str, near))}")
    for flag, value, right in (("--C", options.C, facts.channels), ("--f", options.f, facts.factor)):
        if value != right:
            problems.append(f"{flag} {value} does not fit the model, whose config says {right}: leave it out")
    return problems


def check_tiles(options: Options, facts: ModelFacts) -> list[str]:
    """Tiles that network and first stage can work on."""
    if options.tile is None:
        return [] if options.tile_overlap is None else ["--tile_overlap says nothing without --tile PIXELS"]
    problems, overlap = [], options.tile_overlap or 0
    near = legal_neighbours(options.tile, facts.multiple)
    if near != (options.tile,):
        problems.append(f"--tile {options.tile} must be a multiple of {facts.multiple}: use {' or '.join(map(str, near))}")
    if not 0 <= overlap < options.tile or overlap % facts.factor:
        problems.append(f"--tile_overlap {overlap} must be a multiple of {facts.factor} from 0 to below --tile {options.tile}")
    return problems


def check_numbers(options: Options, facts: ModelFacts | None) -> list[str]:
    """Numbers within their ranges."""
    problems = []
    timesteps = facts.timesteps if facts is not None else 1000
    if not 1 <= options.steps <= timesteps:
        problems.append(f"--steps {options.steps} must lie in 1 to {timesteps}")
    for name in ("n_samples", "n_iter", "repeat", "progress_every"):
        if getattr(options, name) < 1:
            problems.append(f"--{name} {getattr(options, name)} must be at least 1")
    if options.clip_skip is not None and options.clip_skip < 1:
        problems.append(f"--clip_skip {options.clip_skip} must be at least 1 (the last block)")
    if options.n_rows < 0:
        problems.append(f"--n_rows {options.n_rows} must be 0 (as many as --n_samples) or more")
    if not 0 <= options.seed <= MAX_SEED:
        problems.append(f"--seed {options.seed} must lie in 0 to {MAX_SEED}")
    for name in ("scale", "aesthetic_score", "negative_aesthetic_score"):
        if not math.isfinite(getattr(options, name)):
            problems.append(f"--{name} {getattr(options, name)} must be a finite number")
    if options.ddim_eta is not None and not 0 <= options.ddim_eta < math.inf:
        problems.append(f"--ddim_eta {options.ddim_eta} must be 0 or more")
    for name in ("guidance_rescale", "refiner_start"):
        if not 0 <= getattr(options, name) <= 1:
            problems.append(f"--{name} {getattr(options, name)} must lie in 0 to 1")
    return problems


# Flags that a model knows only where its conditioner reads this entry of a batch.
_NUMBERS = {
    "original_size": "original_size_as_tuple",
    "crop": "crop_coords_top_left",
    "target_size": "target_size_as_tuple",
    "aesthetic_score": "aesthetic_score",
    "negative_aesthetic_score": "aesthetic_score",
}


def check_sdxl(options: Options, facts: ModelFacts) -> list[str]:
    """Sizes, crop and scores are numbers that this model knows; the refiner knows them all."""
    conditioner = (facts.params.get("conditioner_config") or {}).get("params") or {}
    known = {embedder.get("input_key") for embedder in conditioner.get("emb_models") or ()}
    plain, problems = type(options)(options.task, "", "", False), []
    for name, entry in _NUMBERS.items():
        value = getattr(options, name)
        if value != getattr(plain, name) and entry not in known and not options.refiner:
            problems.append(f"--{name} means nothing to this model, which is not conditioned on it: leave it out")
        if isinstance(value, list) and (len(value) != 2 or min(value) < (0 if name == "crop" else 1)):
            problems.append(f"--{name} {' '.join(map(str, value))} must be two sizes in pixels")
    if options.refiner_start != plain.refiner_start and not options.refiner:
        problems.append("--refiner_start says nothing without --refiner PATH")
    return problems


def check_files(options: Options) -> list[str]:
    """Files that must be there, and what must not be left out or given together."""
    from ldm.inference.watermark import check_text

    problems = []
    for flag, path in (("--vae", options.vae), ("--refiner", options.refiner), ("--refiner_config", options.refiner_config)):
        if path is not None and not Path(path).exists():
            problems.append(f"{flag} {path!r} does not exist")
    problems += check_additions(options.lora, options.embedding)
    if options.refiner_config and not options.refiner:
        problems.append("--refiner_config says nothing without --refiner PATH")
    if options.save_progress and options.skip_save:
        problems.append("--save_progress saves beside the pictures: leave out --skip_save")
    if options.safety != "off" and options.own_model and not options.safety_ckpt:
        problems.append("no safety weights for this model: name their folder by --safety_ckpt, or choose --safety off")
    if options.safety_ckpt and not Path(options.safety_ckpt).exists():
        problems.append(f"safety weights {options.safety_ckpt!r} do not exist: check --safety_ckpt, or choose --safety off")
    try:
        check_text(options.watermark, options.watermark_text)
    except UserError as error:
        problems.append(str(error))
    return problems


def check_sampler(options: Options) -> list[str]:
    """The sampler exists and can do what is asked of it; an alias becomes its name."""
    try:
        info = sampler_info(options.sampler)
    except UserError as error:
        return [str(error)]
    options.sampler = info.name
    problems = []
    if options.ddim_eta and not info.stochastic and info.name != "ddim":
        problems.append(f"--ddim_eta {options.ddim_eta:g} has no meaning for sampler {info.name}: use --sampler ddim or leave it out")
    if options.spacing is not None and options.spacing not in SPACINGS:
        problems.append(f"--spacing {options.spacing!r} is unknown: use one of {', '.join(SPACINGS)}")
    return problems


def sampler_table() -> str:
    """What `--list_samplers` prints: name, order, whether it is random, and what it is."""
    width = max(map(len, SAMPLERS))
    lines = [f"{'name':<{width}}  order  random  what it is"]
    for info in SAMPLERS.values():
        lines.append(f"{info.name:<{width}}  {info.order:<5}  {'yes' if info.stochastic else 'no':<6}  {info.summary}")
    lines.append("also: " + ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items()))
    return "\n".join([*lines, f"spacings: {', '.join(SPACINGS)}"]) + "\n"
