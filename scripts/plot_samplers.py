#!/usr/bin/env python3
"""Measure every sampler against the truth and write docs/samplers.md and docs/samplers.png; with a network, too, if one is given."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say
from ldm.models.diffusion.registry import RECOMMENDED, SAMPLERS

PROMPTS = ("a large red circle left of a small blue square on a white background", "three small green hearts on a black background")
DRAWN = (
    "ddim",
    "plms",
    "dpm_solver",
    "euler",
    "heun_karras",
    "dpmpp_2m_karras",
    "dpmpp_3m_karras",
    "unipc_karras",
    "dpmpp_3m_full",
    RECOMMENDED,
)
DRAWN_RANDOM = ("ddpm", "euler_a", "euler_a_karras", "dpmpp_sde", "dpmpp_2m_sde_karras", "dpmpp_3m_sde_karras", "ddim", RECOMMENDED)


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--outdir", default=str(Path(__file__).resolve().parents[1] / "docs"), help="where samplers.md and samplers.png go, anew"
    )
    parser.add_argument("--samplers", nargs="+", metavar="NAME", default=list(SAMPLERS), help="which (default: all)")
    parser.add_argument("--config", metavar="YAML", help="measure with this model too")
    parser.add_argument("--ckpt", metavar="FILE", help="its weights")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="what it draws")
    parser.add_argument("--scale", type=float, default=3.0, help="guidance of the model (default: 3)")
    parser.add_argument(
        "--reference", type=int, default=1000, metavar="CALLS", help="model calls of the walk that counts as the truth (default: 1000)"
    )
    return parser


def markdown_table(table: "dict[str, list[float]]", calls: "tuple[int, ...]") -> str:
    """One row a sampler, best first at ten calls; the best of each column is bold."""
    names = sorted(table, key=lambda name: (table[name][calls.index(10)] != table[name][calls.index(10)], table[name][calls.index(10)]))
    best = [min(values) for values in zip(*table.values(), strict=True)]
    lines = [f"| sampler | {' | '.join(f'{n} calls' for n in calls)} |", "| --- |" + " ---: |" * len(calls)]
    for name in names:
        cells = [f"**{v:.4f}**" if v == low else f"{v:.4f}" for v, low in zip(table[name], best, strict=True)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(path: str) -> str:
    """A path as it is written in the repository's folder."""
    return os.path.relpath(path, Path(__file__).resolve().parents[1])


def plot(panels: "list[tuple[str, dict[str, list[float]], tuple[str, ...]]]", calls: "tuple[int, ...]", path: Path) -> None:
    """Error against model calls, one panel a measure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 5), squeeze=False)
    for axis, (title, table, drawn) in zip(axes[0], panels, strict=True):
        for name in [name for name in drawn if name in table]:
            bold = name == RECOMMENDED
            axis.plot(
                calls, table[name], marker="o", markersize=3, label=name, linewidth=2.5 if bold else 1.2, color="black" if bold else None
            )
        axis.set(title=title, xlabel="model calls", xscale="log", yscale="log", xticks=calls, xticklabels=calls)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("error")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def load(options: argparse.Namespace) -> "tuple[Any, Any, Any, tuple[int, ...]]":
    """The network, what it draws, the empty condition, the shape of a latent."""
    import torch
    from omegaconf import OmegaConf

    from ldm.inference.checkpoint import load_weights
    from ldm.util import instantiate_from_config

    model = instantiate_from_config(OmegaConf.load(options.config).model).eval().float()
    load_weights(model, options.ckpt)
    with torch.no_grad():
        cond, uncond = (model.get_learned_conditioning(texts) for texts in (list(options.prompt), [""] * len(options.prompt)))
    return model, cond, uncond, (model.channels, model.image_size, model.image_size)


TEXT = """# Samplers, measured

Made by `{command}`. Errors by number of model calls; a guided call counts once. Bold is the best of a column.
The names are those of `--sampler`; `{fast}` is the {about}.

![error against model calls](samplers.png)

## Zero terminal SNR

Models of v or x0 that were trained down to pure noise are drawn with `--spacing trailing`, which starts there (so does every grid but
uniform, quad and leading): each sampler takes its first step from the predicted x0. The published grid of `ddim` and `plms`, uniform,
leaves that timestep out. What a model of eps says at pure noise determines no x0, so it is refused there; with `--spacing leading`,
which leaves the timestep out, all samplers draw with it.

## Distance from the exact flow

Mixtures of Gaussians with their exact score, on Stable Diffusion's noise schedule: {problems}. Median root mean square distance of samples
of about unit variance from where the probability-flow ODE leads (integrated apart, to the clean picture); geometric mean over the four.
Samplers that stop at the first noise level keep a distance of some 0.004 from it.

{flow}

## Spread of the samples

A Gaussian in eight directions with standard deviations from 0.1 to 1: relative error of the samples' standard deviation, root mean square.
Computed without drawing any, so it holds for the random samplers as it does for the others.

{spread}
"""

NETWORK = """
## With a network

`{config}`, {n} prompts, guidance {scale:g}: median root mean square distance of latents from a walk of {reference} model calls from the
same noise.

{table}
"""


def main() -> int:
    """Parse, measure, write."""
    options = build_parser().parse_args()

    def run() -> None:
        from ldm.models.diffusion.registry import sampler_info
        from ldm.util import UserError

        names = [sampler_info(name).name for name in options.samplers]
        if (options.config is None) != (options.ckpt is None):
            raise UserError("--config and --ckpt belong together: give both, or neither")
        if not Path(options.outdir).is_dir():
            raise UserError(f"--outdir {options.outdir!r} is not a folder")
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError('the figure needs matplotlib: pip install -e ".[train]"')
        say(f"written: {', '.join(map(str, measure(options, names)))}")

    return guarded(run)


def measure(options: argparse.Namespace, names: "list[str]") -> "list[Path]":
    """The tables and the figure, written; gives their paths."""
    from ldm.metrics import samplers as metric

    calls, ode = metric.CALLS, metric.deterministic(names)
    flow = metric.mean_table([metric.flow_errors(problem, ode) for problem in metric.problems()]) if ode else {}
    spread = metric.spread_errors(names)
    panels = [("distance from the exact flow, mixtures", flow, DRAWN), ("error of the spread, Gaussian data", spread, DRAWN_RANDOM)]
    network = [] if options.config is None else ["--config", shown(options.config), "--ckpt", shown(options.ckpt)]
    network += ["--reference", str(options.reference)] if network else []
    text = TEXT.format(
        command=" ".join(["python scripts/plot_samplers.py", *network]),
        fast=RECOMMENDED,
        about=SAMPLERS[RECOMMENDED].summary,
        problems="; ".join(problem.name for problem in metric.problems()),
        flow=markdown_table(flow, calls) if flow else "",
        spread=markdown_table(spread, calls),
    )
    if options.config is not None:
        model, cond, uncond, shape = load(options)
        known: dict[str, Any] = {"scale": options.scale, "batch": len(options.prompt), "reference": options.reference}
        table = metric.network_errors(model, cond, uncond, shape, ode, progress=say, **known)
        panels.append((f"distance from {options.reference} calls, network", table, DRAWN))
        text += NETWORK.format(
            config=shown(options.config),
            n=len(options.prompt),
            scale=options.scale,
            reference=options.reference,
            table=markdown_table(table, calls),
        )
    page, figure = Path(options.outdir) / "samplers.md", Path(options.outdir) / "samplers.png"
    page.write_text(text, encoding="utf-8")
    plot(panels, calls, figure)
    return [page, figure]


if __name__ == "__main__":
    sys.exit(main())
