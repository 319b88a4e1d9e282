"""Command lines of txt2img and img2img: flags, defaults, and one check of everything before any weight is read.

Owns the union of both originals' flags (CompVis and Stability), what each means, and every message about a wrong one. Must not
import torch or Lightning: `--help` answers at once. Facts about the model come from its YAML alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ldm.imaging import FIT_MODES, legal_neighbours, load_image, nearest_legal
from ldm.inference.facts import SHIPPED_WEIGHTS, ModelFacts, find_model, read_facts
from ldm.inference.prompts import MAX_SEED, read_prompts
from ldm.util import UserError

DEFAULT_PROMPT = "a red circle left of a blue square"

SAMPLERS = {
    "ddim": "ldm.models.diffusion.ddim.DDIMSampler",
    "plms": "ldm.models.diffusion.plms.PLMSSampler",
    "dpm_solver": "ldm.models.diffusion.dpm_solver.DPMSolverSampler",
}
CHOICES = {
    "device": tuple(["auto", "cpu", "cuda", "mps"]),
    "ema": ("auto", "ema", "raw"),
    "fit": FIT_MODES,
    "precision": ("full", "autocast", "bf16"),
    "rng": ("image", "legacy"),
    "safety": ("card", "warn", "off"),
    "watermark": ("dwtDctSvd", "dwtDct", "none"),
}

# What the originals assume where the model's config has no `sampling:` of its own.
_LEGACY_DEFAULTS = {
    "txt2img": {"sampler": "ddim", "steps": 50, "scale": 7.5, "n_samples": 3, "n_iter": 2},
    "img2img": {"sampler": "ddim", "steps": 50, "scale": 5.0, "n_samples": 2, "n_iter": 1},
}
_OWN_DEFAULTS = {"n_samples": 4, "n_iter": 1}

# Flags that may stand beside --reproduce: where things lie on this machine, never what is drawn.
_BESIDE_REPRODUCE = {"reproduce", "outdir", "config", "ckpt", "safety_ckpt", "init_img", "device", "trust", "verbose"}
# Never taken from a picture: a file from elsewhere must not widen what configs may name, nor choose where we write.
_NOT_FROM_PICTURE = {"reproduce", "outdir", "trust", "verbose", "prompts", "from_file", "task", "own_model", "given"}


@dataclass
class Options:
    """Every choice of one run, resolved: what the flags say, and the model's defaults for what they leave open."""

    task: str  # txt2img or img2img
    config: str  # path of the model's YAML
    ckpt: str  # path of its weights
    own_model: bool  # not the model that ships, so its safety weights must be named
    prompt: str | None = None
    negative_prompt: str = ""
    from_file: str | None = None
    prompts: list[str] = field(default_factory=list)  # pictures of one iteration, in order
    outdir: str = ""
    sampler: str = "ddim"
    steps: int = 50
    ddim_eta: float = 0.0
    scale: float = 7.5
    strength: float | None = None  # img2img: 0 keeps the picture, 1 starts from pure noise
    init_img: str | None = None
    fit: str = "crop"
    n_iter: int = 1
    n_samples: int = 1
    n_rows: int = 0
    H: int = 512
    W: int = 512
    C: int = 4
    f: int = 8
    seed: int = 42
    precision: str = "autocast"
    device: str = "auto"
    fixed_code: bool = False
    skip_grid: bool = False
    skip_save: bool = False
    repeat: int = 1
    rng: str = "image"
    safety: str = "card"
    safety_ckpt: str | None = None
    watermark: str = "dwtDctSvd"
    watermark_text: str | None = None
    ema: str = "auto"
    trust: list[str] = field(default_factory=list)
    verbose: bool = False
    reproduce: str | None = None
    given: dict[str, Any] = field(default_factory=dict)  # the flags as they were given

    @property
    def columns(self) -> int:
        """Pictures in a row of the grid."""
        return self.n_rows or self.n_samples


class _Parser(argparse.ArgumentParser):
    """Errors are one line, exit code 2; `--ddim-steps` and `--ddim_steps` are one flag."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
        known, unknown = super().parse_known_args(given, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else "; --help lists all flags"
            self.error(f"unknown argument {unknown[0]!r}{hint}")
        return known


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    return "--" + flag.replace("-", "_") + equals + value


def build_parser(task: str) -> argparse.ArgumentParser:
    """The parser of `task`, txt2img or img2img. Flags that are left out are absent from its result."""
    verb = "Draw pictures from a prompt" if task == "txt2img" else "Draw pictures from a picture and a prompt"
    parser = _Parser(
        prog=f"{task}.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=f"{verb}. With no --ckpt, the model that ships draws, at its own sizes.",
        epilog="Dashes and underscores in flags are the same. A model's YAML may set sampler, steps and scale under `sampling:`.",
    )
    _add_what(parser, task)
    _add_how(parser)
    _add_model(parser)
    _add_output(parser)
    _add_refused(parser)
    return parser


def _add_what(parser: argparse.ArgumentParser, task: str) -> None:
    group = parser.add_argument_group("what to draw")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="what the pictures show")
    source.add_argument("--from_file", metavar="FILE", help="a prompt a line; one picture a line and iteration, in order")
    group.add_argument("--negative_prompt", metavar="TEXT", help="what they should not show")
    group.add_argument("--repeat", type=int, metavar="N", help="draw each line of --from_file this often (1)")
    group.add_argument("--n_samples", type=int, metavar="N", help="pictures a batch")
    group.add_argument("--n_iter", type=int, metavar="N", help="times to draw all of it (batches of --prompt)")
    group.add_argument("--seed", type=int, help="picture k of the run is drawn from seed + k (42)")
    group.add_argument("--H", type=int, help="height in pixels (the model's)")
    group.add_argument("--W", type=int, help="width in pixels (the model's)")
    group.add_argument("--reproduce", metavar="PNG", help="draw the picture in this file again, bit for bit")
    if task == "img2img":
        group.add_argument("--init_img", metavar="FILE", help="the picture to start from")
        group.add_argument("--strength", type=float, help="0 keeps it, 1 forgets it (0.75)")
        group.add_argument("--fit", choices=CHOICES["fit"], help="how to bring it to --W x --H (crop)")


def _add_how(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to draw")
    group.add_argument("--sampler", metavar="NAME", help=f"one of {', '.join(SAMPLERS)}")
    group.add_argument("--plms", dest="sampler", action="store_const", const="plms", help="same as --sampler plms")
    group.add_argument(
        "--dpm_solver", "--dpm", dest="sampler", action="store_const", const="dpm_solver", help="same as --sampler dpm_solver"
    )
    group.add_argument("--steps", "--ddim_steps", dest="steps", type=int, metavar="N", help="sampling steps")
    group.add_argument("--ddim_eta", type=float, metavar="ETA", help="fresh noise a step: 0 none, 1 as in DDPM (0)")
    group.add_argument("--scale", type=float, help="classifier-free guidance; 1 is none")
    group.add_argument("--fixed_code", action="store_true", help="all pictures start from the same noise")
    group.add_argument("--rng", choices=CHOICES["rng"], help="a generator a picture, or one for all as in the originals")
    group.add_argument("--precision", choices=CHOICES["precision"], help="autocast is float16 on accelerators, full on the CPU")
    group.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="same as --precision bf16")
    group.add_argument("--device", choices=CHOICES["device"], help="auto takes an accelerator where there is one")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--ckpt", metavar="FILE", help="weights, .safetensors or .ckpt (the model that ships)")
    group.add_argument("--config", metavar="YAML", help="its config (beside --ckpt: the same name, or config.yaml)")
    group.add_argument("--ema", choices=CHOICES["ema"], help="which weights of --ckpt: auto takes EMA where present")
    group.add_argument("--C", type=int, help="latent channels, checked against the config")
    group.add_argument("--f", type=int, help="downsampling factor, checked against the config")
    group.add_argument("--trust", metavar="PACKAGE", action="append", help="let the config name classes of this package")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what becomes of the pictures")
    group.add_argument("--outdir", metavar="DIR", help="pictures go to DIR/samples, grids to DIR")
    group.add_argument("--n_rows", type=int, metavar="N", help="pictures in a row of the grid (n_samples)")
    group.add_argument("--skip_grid", action="store_true", help="save no grid")
    group.add_argument("--skip_save", action="store_true", help="save no single pictures")
    group.add_argument("--safety", choices=CHOICES["safety"], help="flagged pictures: replaced, named, or not looked for")
    group.add_argument("--safety_ckpt", metavar="DIR", help="weights of the safety check, for a model of your own")
    group.add_argument("--watermark", choices=CHOICES["watermark"], help="invisible watermark (dwtDctSvd)")
    group.add_argument("--watermark_text", metavar="TEXT", help="its text: up to 4 ASCII letters; any bytes with dwtDct")
    group.add_argument("--verbose", action="store_true", help="log details")


def _add_refused(parser: argparse.ArgumentParser) -> None:
    for flag in ("--laion400m", "--torchscript", "--ipex"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)


def parse(task: str, argv: Sequence[str] | None = None) -> Options:
    """Flags to `Options`, all checked. Raises one `UserError` that names everything wrong; exits 2 on flags argparse refuses."""
    given = vars(build_parser(task).parse_args(argv))
    problems = _refusals(given)
    if "reproduce" in given:
        given = _from_picture(task, given)
    options, facts = _resolve(task, given, problems)
    if facts is not None:
        problems += _check_sizes(options, facts)
    problems += _check_numbers(options, facts) + _check_files(options) + _check_sampler(options)
    _fill_prompts(options, problems)
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return options


def _refusals(given: dict[str, Any]) -> list[str]:
    reasons = {
        "laion400m": "--laion400m is not supported: name that model by --config and --ckpt",
        "torchscript": "--torchscript is not supported: leave it out",
        "ipex": "--ipex is not supported: leave it out, --bf16 is the fast way on a CPU",
    }
    return [reason for flag, reason in reasons.items() if given.pop(flag, False)]


def _from_picture(task: str, given: dict[str, Any]) -> dict[str, Any]:
    """The flags recorded in a picture, with what was given beside --reproduce in their place."""
    from ldm.inference.output import read_metadata

    extra = sorted(set(given) - _BESIDE_REPRODUCE)
    if extra:
        allowed = ", ".join("--" + name for name in sorted(_BESIDE_REPRODUCE - {"reproduce"}))
        raise UserError(f"--reproduce draws what the picture says: leave out --{', --'.join(extra)} (allowed beside it: {allowed})")
    recorded = read_metadata(given["reproduce"])["options"]
    if recorded.get("task") != task:
        raise UserError(f"{given['reproduce']!r} was drawn by {recorded.get('task')}: use scripts/{recorded.get('task')}.py --reproduce")
    kinds = {f.name: str(f.type).partition(" ")[0] for f in dataclasses.fields(Options) if f.name not in _NOT_FROM_PICTURE}
    kept = {name: value for name, value in recorded.items() if name in kinds and value is not None}
    for name, value in kept.items():  # a picture may come from anywhere
        right = type(value).__name__ == kinds[name] or (type(value), kinds[name]) == (int, "float")
        if not right or value not in CHOICES.get(name, (value,)):
            raise UserError(f"picture {given['reproduce']!r} was tampered with: its record says {name} = {value!r}")
    return {**kept, **given}


def _resolve(task: str, given: dict[str, Any], problems: list[str]) -> tuple[Options, ModelFacts | None]:
    """Fill what the flags leave open from the model's YAML, then from the originals' defaults."""
    values = dict(given)
    own_model = "ckpt" in given or "config" in given
    config, ckpt = values.pop("config", None), values.pop("ckpt", None)
    facts = None
    try:
        config, ckpt = find_model(config, ckpt)
        facts = read_facts(config)
    except UserError as error:
        problems.append(str(error))
    defaults: dict[str, Any] = dict(_LEGACY_DEFAULTS[task], outdir=f"outputs/{task}-samples")
    if facts is not None:
        defaults |= _default_sizes(values, facts)
        if facts.sampling:
            defaults |= _OWN_DEFAULTS | facts.sampling
    if task == "img2img":
        defaults["strength"] = 0.75
    if not own_model and not given.get("from_file"):
        defaults["prompt"] = DEFAULT_PROMPT
    values = defaults | values
    own_model = own_model and Path(str(ckpt)).resolve() != SHIPPED_WEIGHTS.resolve()
    return Options(task=task, config=str(config), ckpt=str(ckpt), own_model=own_model, given=given, **values), facts


def _default_sizes(values: dict[str, Any], facts: ModelFacts) -> dict[str, int]:
    """The model's sizes. As in the originals, a model without `sampling:` keeps the size of an init image, made legal."""
    width = height = facts.image_size * facts.factor
    if values.get("init_img") and not facts.sampling and not {"H", "W"} & set(values):
        with contextlib.suppress(UserError):  # told by _check_files
            width, height = (nearest_legal(side, facts.multiple) for side in load_image(values["init_img"]).size)
    return {"H": height, "W": width, "C": facts.channels, "f": facts.factor}


def _check_sizes(options: Options, facts: ModelFacts) -> list[str]:
    problems = []
    for flag, value in (("--H", options.H), ("--W", options.W)):
        near = legal_neighbours(value, facts.multiple)
        if near != (value,):
            problems.append(f"{flag} {value} must be a multiple of {facts.multiple}: use {' or '.join(map(str, near))}")
    for flag, value, right in (("--C", options.C, facts.channels), ("--f", options.f, facts.factor)):
        if value != right:
            problems.append(f"{flag} {value} does not fit the model, whose config says {right}: leave it out")
    return problems


def _check_numbers(options: Options, facts: ModelFacts | None) -> list[str]:
    problems = []
    timesteps = facts.timesteps if facts is not None else 1000
    if not 1 <= options.steps <= timesteps:
        problems.append(f"--steps {options.steps} must lie in 1 to {timesteps}")
    for name in ("n_samples", "n_iter", "repeat"):
        if getattr(options, name) < 1:
            problems.append(f"--{name} {getattr(options, name)} must be at least 1")
    if options.n_rows < 0:
        problems.append(f"--n_rows {options.n_rows} must be 0 (as many as --n_samples) or more")
    if not 0 <= options.seed <= MAX_SEED:
        problems.append(f"--seed {options.seed} must lie in 0 to {MAX_SEED}")
    if not math.isfinite(options.scale):
        problems.append(f"--scale {options.scale} must be a finite number")
    if not 0 <= options.ddim_eta < math.inf:
        problems.append(f"--ddim_eta {options.ddim_eta} must be 0 or more")
    if options.strength is not None and not 0 <= options.strength <= 1:
        problems.append(f"--strength {options.strength} must lie in 0 to 1")
    return problems


def _check_files(options: Options) -> list[str]:
    from ldm.inference.watermark import check_text

    problems = []
    if options.task == "img2img" and not options.init_img:
        problems.append("img2img needs a picture to start from: --init-img FILE")
    elif options.init_img:
        try:
            load_image(options.init_img)
        except UserError as error:
            problems.append(f"--init-img: {error}")
    if options.safety != "off" and options.own_model and not options.safety_ckpt:
        problems.append("no safety weights for this model: name their folder by --safety_ckpt, or choose --safety off")
    if options.safety_ckpt and not Path(options.safety_ckpt).exists():
        problems.append(f"safety weights {options.safety_ckpt!r} do not exist: check --safety_ckpt, or choose --safety off")
    try:
        check_text(options.watermark, options.watermark_text)
    except UserError as error:
        problems.append(str(error))
    return problems


def _check_sampler(options: Options) -> list[str]:
    name = {"dpm": "dpm_solver"}.get(options.sampler, options.sampler)
    options.sampler = name
    there = [n for n, target in SAMPLERS.items() if importlib.util.find_spec(target.rpartition(".")[0])]
    if name not in SAMPLERS:
        return [f"unknown sampler {name!r}: use one of {', '.join(there)}"]
    if name not in there:
        return [f"sampler {name} is not in this version yet: use one of {', '.join(there)}"]
    if name != "ddim" and options.ddim_eta:
        return [f"--ddim_eta {options.ddim_eta} has no meaning for sampler {name}: use --sampler ddim or leave it out"]
    return []


def _fill_prompts(options: Options, problems: list[str]) -> None:
    """`options.prompts`: the pictures of one iteration."""
    if options.from_file:
        try:
            options.prompts = [p for p in read_prompts(options.from_file) for _ in range(options.repeat)]
        except UserError as error:
            problems.append(str(error))
    elif options.prompt is not None:
        options.prompts = [options.prompt] * options.n_samples
    elif not options.reproduce:
        problems.append("nothing to draw: give --prompt TEXT or --from-file FILE")
