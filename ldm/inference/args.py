"""From a command line to `Options`: flags, a picture's record, the model's defaults, and one check of everything before any weight is read.

Must not import torch or Lightning: `--help` answers at once. Facts about the model come from its YAML, or from names and shapes in its
weights.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import json
import os
import reprlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.inference.additions import FLAGS, moved
from ldm.inference.checks import check_idle, check_options
from ldm.inference.facts import SHIPPED_WEIGHTS, ModelFacts, find_model, read_facts
from ldm.inference.flags import REFUSED, build_parser
from ldm.inference.options import BESIDE_REPRODUCE, CHOICES, NOT_FROM_PICTURE, PER_PICTURE, PER_SEED, Options
from ldm.inference.prompts import LINE_FLAGS, PromptLine, read_prompts
from ldm.inference.tasks import get_task
from ldm.inference.tasks.base import Task
from ldm.models.diffusion.registry import sampler_info
from ldm.util import UserError

__all__ = ["DEFAULT_PROMPT", "Options", "build_parser", "parse"]

DEFAULT_PROMPT = "a red circle left of a blue square"
_TEXTS = ("prompt", "negative_prompt", "watermark_text")  # all other text names something, mostly files
_OWN_DEFAULTS = {"n_samples": 4, "n_iter": 1}  # where the model's YAML has defaults of its own


def parse(name: str, argv: Sequence[str] | None = None) -> Any:
    """The options of the task `name`, all checked.

    Raises one `UserError` that names everything wrong; exits with code 2 on flags that argparse refuses.
    """
    task = get_task(name)
    given = vars(build_parser(name).parse_args(argv))
    problems = [reason for flag, reason in REFUSED.items() if given.pop(flag, False)]
    if "reproduce" in given:
        given = from_picture(task, given)
    given = task.prepare(given)
    options, facts = _resolve(task, given, problems)
    if options.reproduce:
        problems += check_options(task, options, facts)
    else:
        _fill_prompts(task, options, facts, problems)
        problems += _check_pictures(task, options, facts) + check_idle(options)
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return options


def from_picture(task: Task, given: dict[str, Any]) -> dict[str, Any]:
    """The flags recorded in a picture, with what was given beside --reproduce in their place."""
    from ldm.inference.output import read_metadata

    beside = BESIDE_REPRODUCE | set(task.files)
    extra = sorted(set(given) - beside)
    if extra:
        allowed = ", ".join("--" + name for name in sorted(beside - {"reproduce"}))
        raise UserError(f"--reproduce draws what the picture says: leave out --{', --'.join(extra)} (allowed beside it: {allowed})")
    recorded = read_metadata(given["reproduce"])["options"]
    if recorded.get("task") != task.name:
        raise UserError(f"{given['reproduce']!r} was drawn by {recorded.get('task')}: use scripts/{recorded.get('task')}.py --reproduce")
    kinds = {f.name: _kind(f.type) for f in dataclasses.fields(task.options) if f.name not in NOT_FROM_PICTURE}
    kinds |= {"config": "str", "refiner_config": "str"}  # those that are no paths are not recorded
    kept = {name: value for name, value in recorded.items() if name in kinds and value is not None}
    for name, value in kept.items():  # a picture may come from anywhere
        legal = _is(value, kinds[name]) and (name in _TEXTS or _is_usable(value))
        if not legal or value not in {**CHOICES, **task.choices}.get(name, (value,)):
            raise UserError(f"picture {given['reproduce']!r} was tampered with: its record says {name} = {reprlib.repr(value)}")
    return {**kept, **given, **{flag: moved(flag, kept.get(flag, []), given.get(flag)) for flag in FLAGS}}


def _kind(annotation: Any) -> str:
    """`list[int] | None` -> `list[int]`."""
    return str(annotation).partition(" | ")[0]


def _is(value: Any, kind: str) -> bool:
    outer, _, inner = kind.removesuffix("]").partition("[")
    if outer == "list":
        return isinstance(value, list) and all(_is(item, inner) for item in value)
    if outer == "float" and type(value) is int:
        return abs(value) <= sys.float_info.max
    return outer in ("Any", type(value).__name__)


def _is_usable(value: Any) -> bool:
    """No name that the file system chokes on, no number beyond 64 bits."""
    if isinstance(value, list):
        return all(map(_is_usable, value))
    if isinstance(value, str):
        try:
            os.stat(value)
        except ValueError:  # a zero byte, or what is no text
            return False
        except OSError as error:
            return error.errno != errno.ENAMETOOLONG
    return not isinstance(value, int) or abs(value) < 2**63


def _resolve(task: Task, given: dict[str, Any], problems: list[str]) -> tuple[Any, ModelFacts | None]:
    """Fill what the flags leave open from the model's YAML, then from the originals' defaults."""
    values = _with_sampler_name(given)
    own_model = "ckpt" in given or "config" in given
    config, ckpt = values.pop("config", None), values.pop("ckpt", None)
    facts = None
    try:
        config, ckpt = find_model(config, ckpt, values.get("prediction"))
        facts = read_facts(config)
        facts = dataclasses.replace(facts, sampling=_with_sampler_name(facts.sampling))
        if "refiner" in values:
            values["refiner_config"], values["refiner"] = find_model(values.get("refiner_config"), values["refiner"])
    except UserError as error:
        problems.append(str(error))
    defaults: dict[str, Any] = {"outdir": f"outputs/{task.name}-samples"}
    if facts is not None:
        defaults |= {"C": facts.channels, "f": facts.factor}
    if "reproduce" not in given:
        defaults |= _defaults(task, values, facts)
    elif facts is not None:  # a record leaves out only what is the class's default, which the task's defaults need not be
        defaults |= task.resolve(values, facts)
    if not own_model and not {"from_file", "reproduce"} & set(given) and task.prompts and "prompt" not in defaults:
        defaults["prompt"] = DEFAULT_PROMPT
    values = defaults | values
    if values.get("tile") is not None and facts is not None:
        values.setdefault("tile_overlap", values["tile"] // 4 // facts.factor * facts.factor)
    own_model = own_model and Path(str(ckpt)).resolve() != SHIPPED_WEIGHTS.resolve()
    config = "" if config is None else config
    return task.options(task=task.name, config=config, ckpt=str(ckpt), own_model=own_model, given=given, **values), facts


def _with_sampler_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """An alias of a sampler becomes its name before anything depends on it; an unknown one is told by `check_sampler`."""
    found = dict(values)
    if isinstance(found.get("sampler"), str):
        with contextlib.suppress(UserError):
            found["sampler"] = sampler_info(found["sampler"]).name
    return found


def _defaults(task: Task, values: Mapping[str, Any], facts: ModelFacts | None) -> dict[str, Any]:
    """What to take for all that `values`, the flags, leave open.

    From the weakest on: the task's defaults, what it makes of the model, the YAML's `sampling:`, what follows from flags, or from a
    model that cannot be guided.
    """
    if facts is None:
        return dict(task.defaults)
    if not facts.sampling:
        return {**task.defaults, **task.resolve(values, facts)}
    own = _OWN_DEFAULTS | facts.sampling
    same = copy.copy(task)
    vars(same)["defaults"] = {**task.defaults, **own}  # `resolve` reckons with them: at least so many pictures
    plain, found = same.resolve({}, facts), same.resolve(values, facts)
    follows = {name: value for name, value in found.items() if name not in plain or value != plain[name]}
    if found.get("scale") == 1.0:
        follows["scale"] = 1.0
    if values.get("sampler", follows.get("sampler", same.defaults["sampler"])) != same.defaults["sampler"]:
        own.pop("ddim_eta", None)  # said of the YAML's own sampler
    return {"ddim_eta": None, **task.defaults, **found, **own, **follows}


def _fill_prompts(task: Task, options: Options, facts: ModelFacts | None, problems: list[str]) -> None:
    """`options.prompts`: the pictures of one iteration, from the task where it knows them, otherwise from the prompts."""
    try:
        known = task.pictures(options, problems)
    except UserError as error:
        if facts is not None:  # else it is what was told already: there is no model to ask
            problems.append(str(error))
        return
    if known is not None:
        options.prompts = known
    elif options.from_file:
        try:
            sizes = frozenset() if task.sizes else frozenset({"H", "W"})  # which follow from the picture
            lines = read_prompts(options.from_file, (PER_PICTURE - sizes) | task.per_picture)
            lines = lines if facts is None else [_with_own_size(task, options, facts, line) for line in lines]
            options.prompts = [line for line in lines for _ in range(options.repeat)]
        except UserError as error:
            problems.append(str(error))
    elif options.prompt is not None:
        options.prompts = [options.prompt] * options.n_samples
    else:
        problems.append("nothing to draw: give --prompt TEXT or --from-file FILE")


def _with_own_size(task: Task, options: Options, facts: ModelFacts, line: PromptLine) -> PromptLine:
    """A line that names a picture also gets what a run with that picture would take from it, such as its size, unless it is given."""
    if not set(task.files) & set(line.overrides) or _check_values(task, dict(line.overrides)):
        return line
    said = _with_sampler_name({**options.given, **line.overrides})
    found = _defaults(task, said, facts)
    names = (PER_PICTURE | task.per_picture | task.from_picture) & set(found) - set(said)
    changed = {name: found[name] for name in names if found[name] != getattr(options, name)}
    return dataclasses.replace(line, overrides={**line.overrides, **changed})


def _check_pictures(task: Task, options: Options, facts: ModelFacts | None) -> list[str]:
    """What is wrong with the options of the run or of single pictures, a clause each; pictures of the same options are looked at once.

    What is wrong with the run, but with none of its pictures, since they say something else, is not wrong.
    """
    run = check_options(task, options, facts)
    kinds: dict[str, tuple[int, dict[str, Any]]] = {}  # line and options, by these
    for line in options.prompts:
        own = {name: value for name, value in getattr(line, "overrides", {}).items() if name not in PER_SEED}
        kinds.setdefault(json.dumps(own, sort_keys=True), (getattr(line, "line", 0), own))
    found = [(line, _check_picture(task, options, own, facts)) for line, own in kinds.values()]
    problems = [problem for problem in run if all(problem in wrong for _, wrong in found)]
    for line, wrong in found:
        problems += [f"line {line}: {problem}" if line else problem for problem in wrong if problem not in problems]
    return problems


def _check_picture(task: Task, options: Options, own: dict[str, Any], facts: ModelFacts | None) -> list[str]:
    """What is wrong with the run's options where `own` stand in their place."""
    return _check_values(task, own) or check_options(task, dataclasses.replace(options, **own), facts)


def _check_values(task: Task, values: dict[str, Any]) -> list[str]:
    """Values of another type than their option, and unknown names."""
    kinds, choices = {f.name: _kind(f.type) for f in dataclasses.fields(task.options)}, {**CHOICES, **task.choices}
    # `read_prompts` tells of a null there, so a None was found by `_with_own_size`
    values = {name: value for name, value in values.items() if value is not None or name not in LINE_FLAGS}
    wrong = [f"{name} {value!r} must be of type {kinds[name]}" for name, value in values.items() if not _is(value, kinds[name])]
    unknown = [(name, value) for name, value in values.items() if value not in choices.get(name, (value,))]
    return wrong + [f"{name} {value!r} is unknown: use one of {', '.join(choices[name])}" for name, value in unknown]
