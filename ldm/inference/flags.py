"""The flags all scripts share, in groups: the union of both originals' (CompVis and Stability). Imports no torch, for a quick `--help`."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any, NoReturn

from ldm.inference.options import CHOICES
from ldm.inference.tasks import get_task
from ldm.inference.tasks.base import Task


class Parser(argparse.ArgumentParser):
    """Errors are one line, exit code 2; `--ddim-steps` and `--ddim_steps` are one flag."""

    def error(self, message: str) -> NoReturn:
        """One line on standard error, and the end."""
        self.exit(2, f"error: {message}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As usual, after underscores were put for dashes; an unknown flag is answered with those that are like it."""
        given = [_underscored(word) for word in (sys.argv[1:] if args is None else args)]
        known, unknown = super().parse_known_args(given, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=2)
            hint = f"; did you mean {' or '.join(close)}?" if close else "; --help lists all flags"
            self.error(f"unknown argument {unknown[0]!r}{hint}")
        return known

    @property
    def names(self) -> set[str]:
        """Options that this parser has a flag for."""
        return {action.dest for action in self._actions}


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word[2:].partition("=")
    return word if " " in flag else "--" + flag.replace("-", "_") + equals + value  # with a blank it is the text of a prompt


_WITHOUT_CKPT = {True: "With no --ckpt, the model that ships draws, at its own sizes.", False: "Name a model that can by --ckpt."}


def build_parser(name: str) -> Parser:
    """The parser of the task `name`. Flags that are left out are absent from its result."""
    task = get_task(name)
    parser = Parser(
        prog=f"{name}.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description=f"{task.title}. {_WITHOUT_CKPT[task.ships]}",
        epilog="Dashes and underscores in flags are the same. A model's YAML may set sampler, steps and scale under `sampling:`.",
    )
    _add_what(parser, task)
    _add_how(parser)
    _add_model(parser)
    if task.prompts:
        _add_sdxl(parser)
    _add_output(parser)
    _add_refused(parser)
    return parser


def _add_what(parser: Parser, task: Task) -> None:
    group = parser.add_argument_group("what to draw")
    if task.prompts:
        source = group.add_mutually_exclusive_group()
        source.add_argument("--prompt", metavar="TEXT", help="what the pictures show")
        source.add_argument(
            "--from_file", metavar="FILE", help="a prompt a line, or .jsonl with flags a line; one picture a line and iteration, in order"
        )
        group.add_argument("--negative_prompt", metavar="TEXT", help="what they should not show")
        group.add_argument("--repeat", type=int, metavar="N", help="draw each line of --from_file this often (1)")
    task.add_flags(group)
    group.add_argument("--n_samples", type=int, metavar="N", help="pictures a batch" if task.prompts else "pictures in all")
    group.add_argument("--n_iter", type=int, metavar="N", help="times to draw all of it (batches of --prompt)")
    group.add_argument("--seed", type=int, help="picture k of the run is drawn from seed + k (42)")
    if task.sizes:
        group.add_argument("--H", type=int, help="height in pixels (the model's)")
        group.add_argument("--W", type=int, help="width in pixels (the model's)")
    group.add_argument("--reproduce", metavar="PNG", help="draw the picture in this file again, bit for bit")
    if task.prompts:
        group.add_argument(
            "--prompt_syntax", choices=CHOICES["prompt_syntax"], help="weighted: (red:1.3), [less], prompts of any length (plain)"
        )
        group.add_argument(
            "--clip_skip", type=int, metavar="N", help="1 takes the text encoder's last block, 2 the one before (the model's)"
        )


def _add_how(parser: Parser) -> None:
    group = parser.add_argument_group("how to draw")
    group.add_argument("--sampler", metavar="NAME", help="how to walk from noise to picture; --list_samplers names all")
    group.add_argument("--list_samplers", action=_ListSamplers, nargs=0, help="print the table of samplers and exit")
    group.add_argument("--plms", dest="sampler", action="store_const", const="plms", help="same as --sampler plms")
    group.add_argument(
        "--dpm_solver", "--dpm", dest="sampler", action="store_const", const="dpm_solver", help="same as --sampler dpm_solver"
    )
    group.add_argument("--steps", "--ddim_steps", dest="steps", type=int, metavar="N", help="sampling steps")
    group.add_argument("--spacing", "--grid", dest="spacing", metavar="NAME", help="which noise levels the steps visit (the sampler's)")
    group.add_argument("--ddim_eta", type=float, metavar="ETA", help="fresh noise a step: 0 none, 1 as in DDPM (the sampler's)")
    group.add_argument("--scale", type=float, help="classifier-free guidance; 1 is none")
    group.add_argument("--guidance_rescale", type=float, metavar="PHI", help="0 to 1: undo the overexposure of a large --scale (0)")
    group.add_argument("--fixed_code", action="store_true", help="all pictures start from the same noise")
    group.add_argument("--rng", choices=CHOICES["rng"], help="a generator a picture, or one for all as in the originals")
    group.add_argument("--precision", choices=CHOICES["precision"], help="autocast is float16 on accelerators, full on the CPU")
    group.add_argument("--bf16", dest="precision", action="store_const", const="bf16", help="same as --precision bf16")
    group.add_argument("--device", choices=CHOICES["device"], help="auto takes an accelerator where there is one")
    group.add_argument("--tile", type=int, metavar="PIXELS", help="work on tiles of this side: large canvases in bounded memory")
    group.add_argument("--tile_overlap", type=int, metavar="PIXELS", help="what neighbouring tiles share (a quarter of --tile)")


def _add_model(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--ckpt", metavar="PATH", help="weights: .safetensors, .ckpt or a diffusers folder (the model that ships)")
    group.add_argument("--config", metavar="YAML", help="its config (beside --ckpt, or found from the weights)")
    group.add_argument("--prediction", choices=CHOICES["prediction"], help="what the network predicts, where weights do not tell")
    group.add_argument("--vae", metavar="PATH", help="another first stage, of the same shapes, from this file or folder")
    group.add_argument(
        "--lora", nargs="+", action="extend", metavar="FILE[:WEIGHT]", help="changes of the weights, added up; WEIGHT 1 is all of one"
    )
    group.add_argument(
        "--embedding", nargs="+", action="extend", metavar="FILE[:WORD]", help="words learnt by textual inversion (WORD: the file's)"
    )
    group.add_argument("--ema", choices=CHOICES["ema"], help="which weights of --ckpt: auto takes EMA where present")
    group.add_argument("--C", type=int, help="latent channels, checked against the config")
    group.add_argument("--f", type=int, help="downsampling factor, checked against the config")
    group.add_argument("--trust", metavar="PACKAGE", action="append", help="let the config name classes of this package")


def _add_sdxl(parser: Parser) -> None:
    group = parser.add_argument_group("SDXL")
    group.add_argument("--original_size", type=int, nargs=2, metavar=("H", "W"), help="size of the picture it imitates (--H --W)")
    group.add_argument("--crop", type=int, nargs=2, metavar=("TOP", "LEFT"), help="as if cropped here from it (0 0)")
    group.add_argument("--target_size", type=int, nargs=2, metavar=("H", "W"), help="size of the result (--H --W)")
    group.add_argument("--aesthetic_score", type=float, metavar="A", help="of the refiner's condition (6.0)")
    group.add_argument("--negative_aesthetic_score", type=float, metavar="A", help="of its negative condition (2.5)")
    group.add_argument("--refiner", metavar="PATH", help="a second model takes over for the last steps")
    group.add_argument("--refiner_config", metavar="YAML", help="its config (beside --refiner, or found from the weights)")
    group.add_argument("--refiner_start", type=float, metavar="SHARE", help="of the steps, the base's (0.8)")


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("what becomes of the pictures")
    group.add_argument("--outdir", metavar="DIR", help="pictures go to DIR/samples, grids to DIR")
    group.add_argument("--n_rows", type=int, metavar="N", help="pictures in a row of the grid (n_samples)")
    group.add_argument("--skip_grid", action="store_true", help="save no grid")
    group.add_argument("--skip_save", action="store_true", help="save no single pictures")
    group.add_argument(
        "--skip_existing", "--continue", dest="skip_existing", action="store_true", help="go on with a run: draw what --outdir lacks of it"
    )
    group.add_argument(
        "--save_progress", nargs="?", const="gif", choices=CHOICES["save_progress"], help="also each picture's way from noise (gif)"
    )
    group.add_argument("--progress_every", type=int, metavar="K", help="show every k-th step there (1); each costs a decoding")
    group.add_argument("--safety", choices=CHOICES["safety"], help="flagged pictures: replaced, named, or not looked for")
    group.add_argument("--safety_ckpt", metavar="DIR", help="weights of the safety check, for a model of your own")
    group.add_argument("--watermark", choices=CHOICES["watermark"], help="invisible watermark (dwtDctSvd)")
    group.add_argument("--watermark_text", metavar="TEXT", help="its text: up to 4 ASCII letters; any bytes with dwtDct")
    group.add_argument("--verbose", action="store_true", help="log details")


def _add_refused(parser: Parser) -> None:
    for flag in REFUSED:
        parser.add_argument(f"--{flag}", action="store_true", help=argparse.SUPPRESS)


# Flags of the originals that have no meaning here, and what to do instead.
REFUSED = {
    "laion400m": "--laion400m is not supported: name that model by --config and --ckpt",
    "torchscript": "--torchscript is not supported: leave it out",
    "ipex": "--ipex is not supported: leave it out, --bf16 is the fast way on a CPU",
}


class _ListSamplers(argparse.Action):
    """Prints the table of samplers, and nothing is drawn."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from ldm.inference.checks import sampler_table

        sys.stdout.write(sampler_table())
        parser.exit()
