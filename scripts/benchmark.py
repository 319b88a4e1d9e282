#!/usr/bin/env python3
"""Our speed and memory beside diffusers': the same networks, weights, inputs and steps, timed in turn. Prints a Markdown table."""

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say

WHAT = ("unet", "txt2img", "decode", "encode", "training", "first_picture")
DTYPES = ("float32", "bfloat16", "float16")
TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 0.1,
    "float16": 0.02,
}  # of the results, relative: half precision rounds in its own way on each side


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"of {', '.join(WHAT)} (default: all)")
    parser.add_argument("--size", default="small", help="small: Stable Diffusion 1 at 0.4 of its width; sd1: at its own (default: small)")
    parser.add_argument(
        "--latent", type=int, default=32, help="side of the latent, an eighth of the picture's (default: 32; 64 is 512 pixels)"
    )
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: 1)")
    parser.add_argument("--steps", type=int, default=10, help="of DDIM; a divisor of 1000 (default: 10)")
    parser.add_argument("--scale", type=float, default=7.5, help="guidance (default: 7.5)")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side (default: 7)")
    parser.add_argument("--warmup", type=int, default=2, help="calls before them (default: 2)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights of both (default: float32)")
    parser.add_argument("--channels_last", action="store_true", help="memory order of the networks of both")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks of both")
    parser.add_argument("--threads", type=int, help="threads of both (default: torch's own choice)")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, where other programs share the machine"
    )
    return parser


def measure(options: argparse.Namespace) -> "tuple[list[Any], str]":
    """The rows, and how they were made."""
    import torch

    from ldm.inference.models import pick_device
    from ldm.metrics.against_diffusers import Contest, Work, check_diffusers
    from ldm.metrics.stopwatch import CLOCKS
    from ldm.metrics.stopwatch import measure as timed
    from ldm.util import UserError

    if unknown := [name for name in options.what if name not in WHAT]:
        raise UserError(f"{unknown[0]!r} is unknown: choose from {', '.join(WHAT)}")
    device = pick_device(options.device)
    if options.clock == "cpu" and device.type != "cpu":
        raise UserError(f"--clock cpu says nothing about {device.type}: use --clock wall")
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads {options.threads} must be 1 or more")
    work = Work(
        options.size,
        options.latent,
        options.batch,
        options.steps,
        options.scale,
        device,
        getattr(torch, options.dtype),
        options.channels_last,
        options.compile,
    )
    check_diffusers()
    from diffusers.utils import logging

    logging.set_verbosity_error()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    known: dict[str, Any] = {"warmup": options.warmup, "tolerance": TOLERANCE[options.dtype], "clock": CLOCKS[options.clock]}
    if device.type != "cpu":
        known["synchronize"] = torch.accelerator.synchronize
    contest, rows = Contest(work), []
    for name in [name for name in WHAT if name in (options.what or WHAT)]:
        if name == "first_picture":
            from ldm.metrics.first_picture import first_picture, write_folder

            with tempfile.TemporaryDirectory() as folder:
                write_folder(work, Path(folder))
                rows += first_picture(work, Path(folder), options.rounds, torch.get_num_threads(), options.clock)
        else:
            rows.append(timed(getattr(contest, name)(), options.rounds, **known))
    return rows, conditions(options, device)


def conditions(options: argparse.Namespace, device: Any) -> str:
    """What the numbers depend on."""
    import diffusers
    import torch

    name = torch.get_device_module(device).get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    switches = [flag for flag in ("channels_last", "compile") if getattr(options, flag)]
    return (
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}; {device.type} ({name}), "
        f"{', '.join([f'{torch.get_num_threads()} of {os.cpu_count()} threads', options.dtype, *switches])}; size {options.size}, "
        f"latent {options.latent}x{options.latent}, batch {options.batch}, {options.rounds} rounds, {options.clock} clock"
    )


def main() -> int:
    """Parse, measure, print."""
    options = build_parser().parse_args()

    def run() -> None:
        from ldm.metrics.stopwatch import markdown

        rows, made = measure(options)
        say(f"{markdown(rows)}\n\n{made}")

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
