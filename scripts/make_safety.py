#!/usr/bin/env python3
"""Make the safety check of the Shapes world: which embeddings stand for the Red Cross emblem, and from which similarity on.

The policy blocks one thing: a red cross on a white background. Alone, several alike, and beside another object of each shape are a
concept each. Scenes are rendered with and without it; from one half the concepts and their thresholds are chosen, the other half says
how good they are. All thresholds cut at the same quantile of the lawful scenes, the lowest at which the whole check keeps to --max_fpr.
Three kinds of embedding are tried: the mean of captions (`text`), the mean of pictures (`image`), and the direction that best tells
emblems from lawful pictures (`contrast`: logistic regression).
Needs the trained CLIP, `clip.yaml` and `clip.safetensors`, and for --reconstruct the model beside them, `config.yaml` and
`model.safetensors`. Writes `safety.safetensors` there and prints the table.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.data.shapes_world import SHAPES
from ldm.inference.cli import guarded, say

EMBLEM, LAWFUL = "emblem: red cross on white, ", "lawful: "
CONCEPTS = ("alone", "several", *(f"beside a {shape}" for shape in SHAPES))
KINDS = ("text", "image", "contrast")
MODEL = ("config.yaml", "model.safetensors")


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "models" / "shapes", help="with the CLIP")
    parser.add_argument("--n", type=int, default=1500, help="scenes of a kind, twice; a third of it beside each shape (1500)")
    parser.add_argument("--max_fpr", type=float, default=0.01, help="false positives to accept in any kind of lawful scene (0.01)")
    parser.add_argument("--kind", choices=("best", *KINDS), default="best", help="embedding to use (best: highest recall)")
    parser.add_argument("--reconstruct", action="store_true", help="pass every other scene through the model's first stage, 0.05 s each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing safety.safetensors")
    return parser


# ---------------------------------------------------------------------- scenes
def is_emblem(scene: Any) -> bool:
    """Does this scene show what the policy blocks?"""
    return scene.background == "white" and any((o.color, o.shape) == ("red", "cross") for o in scene.objects)


def changed_scene(rng: Any, kinds: Any = None, background: str = "white", color: str = "red", shape: str | None = "cross") -> Any:
    """A scene whose first object (all, of a number) got a look: a red cross on white, or what is named instead. `shape` None stays."""
    from ldm.data.shapes import KINDS as ALL
    from ldm.data.shapes import sample_scene

    kinds = kinds or ALL
    while True:
        scene = sample_scene(rng, kinds[int(rng.integers(len(kinds)))])
        if shape is None or scene.objects[0].shape in ("circle", "square", "ring"):  # as wide as a cross, so nothing overlaps
            break
    changed = len(scene.objects) if scene.kind == "count" else 1
    look = {"color": color} | ({"shape": shape} if shape else {})
    objects = [dataclasses.replace(o, **look) if i < changed else o for i, o in enumerate(scene.objects)]
    return dataclasses.replace(scene, background=background, objects=tuple(objects))


def beside(rng: Any, shape: str, first: tuple[str, str] = ("red", "cross"), second: str | None = None) -> Any:
    """Two objects on white: the first of a (color, shape), the other of a shape and, where named, of a color."""
    while True:
        scene = changed_scene(rng, ["pair", "relation"], color=first[0], shape=first[1])
        other = scene.objects[1]
        if other.shape == shape and (other.color, shape) != first:
            other = dataclasses.replace(other, color=second or other.color)
            return dataclasses.replace(scene, objects=(scene.objects[0], other))


def groups(n: int, seed: int) -> dict[str, list[Any]]:
    """Scenes by kind (n less those of the wrong class): every kind of emblem, five of lawful scene, of which four are near misses."""
    import numpy as np

    from ldm.data.shapes import BACKGROUNDS, COLORS, sample_scene

    rng = np.random.default_rng(seed)

    def pick(names: Any, without: str) -> str:
        options = [name for name in names if name != without]
        return options[int(rng.integers(len(options)))]

    made = {EMBLEM + name: [changed_scene(rng, [kind]) for _ in range(n)] for name, kind in (("alone", "single"), ("several", "count"))}
    made |= {f"{EMBLEM}beside a {shape}": [beside(rng, shape) for _ in range(n // 3)] for shape in SHAPES}
    made |= {
        LAWFUL + "any scene": [sample_scene(rng, held_out=bool(i % 8 == 0)) for i in range(n)],
        LAWFUL + "red cross, not on white": [changed_scene(rng, background=pick(BACKGROUNDS, "white")) for _ in range(n)],
        LAWFUL + "red on white, no red cross": [changed_scene(rng, shape=None) for _ in range(n)],
        LAWFUL + "cross on white, not red": [changed_scene(rng, color=pick(COLORS, "red")) for _ in range(n)],
        LAWFUL + "cross beside something red, on white": [
            beside(rng, pick(SHAPES, "cross"), (pick(COLORS, "red"), "cross"), "red") for _ in range(n)
        ],
    }
    return {name: [s for s in scenes if is_emblem(s) == name.startswith(EMBLEM)] for name, scenes in made.items()}


def captions(concept: str) -> list[str]:
    """Captions of emblems."""
    from ldm.data.shapes import COLORS

    sizes = ("", "small ", "large ")
    if concept == "alone":
        said = [f"a {size}red cross" for size in sizes]
    elif concept == "several":
        said = [f"{number} {size}red crosses" for number in ("two", "three", "four") for size in sizes]
    else:
        shape = concept.removeprefix("beside a ")
        said = [f"a red cross and a {color} {shape}" for color in COLORS if (color, shape) != ("red", "cross")]
    return [f"{text} on a white background" for text in said]


# ---------------------------------------------------------------------- embeddings
def embed(clip: Any, scenes: list[Any], reconstruct: Any = None) -> Any:
    """(N, D) unit embeddings of rendered scenes; every other one as `reconstruct` draws it."""
    import torch
    from tqdm import tqdm

    from ldm.data.shapes import render
    from ldm.inference.safety import embed_with_clip

    parts = []
    with torch.inference_mode():
        for first in tqdm(range(0, len(scenes), 32), desc="scenes", leave=False):
            images = [render(scene) for scene in scenes[first : first + 32]]
            if reconstruct is not None:
                images[::2] = reconstruct(images[::2])
            parts.append(embed_with_clip(clip, images))
    return torch.cat(parts).clone()


def first_stage(folder: Path) -> Any:
    """uint8 pictures -> what the model's first stage makes of them, for all that the model draws comes out of it."""
    import numpy as np
    import torch

    from ldm.imaging import from_uint8, to_uint8
    from ldm.inference.checkpoint import load_weights
    from ldm.inference.facts import read_config
    from ldm.util import UserError, instantiate_from_config

    config, weights = (folder / name for name in MODEL)
    if not (config.is_file() and weights.is_file()):
        raise UserError(f"--reconstruct needs {' and '.join(MODEL)} in {str(folder)!r}")
    stage = instantiate_from_config(read_config(config)["model"]["params"]["first_stage_config"]).eval()
    load_weights(stage, weights, prefix="first_stage_model.")

    def reconstruct(images: list[Any]) -> list[Any]:
        pixels = torch.from_numpy(np.stack([from_uint8(image) for image in images])).movedim(-1, 1)  # channels last: a third faster
        return list(to_uint8(stage(pixels, sample_posterior=False)[0]))

    return reconstruct


# ---------------------------------------------------------------------- concepts
def candidates(clip: Any, found: dict[str, Any]) -> dict[str, Any]:
    """Unit concept embeddings (C, D) by kind, a row a concept."""
    import torch
    import torch.nn.functional as F

    lawful = torch.cat([v for name, v in found.items() if name.startswith(LAWFUL)])
    emblems = [found[EMBLEM + name] for name in CONCEPTS]
    with torch.inference_mode():
        text = [clip.encode_text(captions(name)).mean(0) for name in CONCEPTS]
    rows = {"text": text, "image": [e.mean(0) for e in emblems], "contrast": [contrast(e, lawful) for e in emblems]}
    return {kind: F.normalize(torch.stack(vectors), dim=-1) for kind, vectors in rows.items()}


def contrast(emblem: Any, lawful: Any, ridge: float = 1e-4) -> Any:
    """Direction (D,) of a logistic regression with both classes weighted alike: emblem (N, D) against lawful (M, D)."""
    import torch
    import torch.nn.functional as F

    weight, bias = torch.zeros(emblem.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Any:
        optimizer.zero_grad()
        value = F.softplus(-(emblem @ weight + bias)).mean() + F.softplus(lawful @ weight + bias).mean() + ridge * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()


def thresholds_for(concepts: Any, found: dict[str, Any], max_fpr: float, cuts: int = 40) -> Any:
    """(C,): one quantile of the lawful scenes for all, such that in no kind of them more than `max_fpr` are flagged in all.

    A threshold moves half way to the emblems of its concept where these lie apart from everything lawful.
    """
    import torch

    lawful = [v @ concepts.T for name, v in found.items() if name.startswith(LAWFUL)]  # (N, C) each
    highest = torch.stack([scores.amax(0) for scores in lawful]).amax(0)
    best = highest
    for cut in torch.linspace(max_fpr / cuts, max_fpr, cuts):
        lower = torch.stack([scores.quantile(1 - float(cut), dim=0) for scores in lawful]).amax(0)
        if max(float((scores > lower).any(1).float().mean()) for scores in lawful) > max_fpr:
            break
        best = lower
    lowest = torch.stack([(found[EMBLEM + name] @ concept).min() for name, concept in zip(CONCEPTS, concepts, strict=True)])
    return torch.where(lowest > highest, (highest + lowest) / 2, best)


def flagged(vectors: Any, concepts: Any, thresholds: Any) -> float:
    """Share of embeddings (N, D) that the check flags, by its own rule: a score is rounded, and counts above 0."""
    scores = (vectors @ concepts.T - thresholds).mul(1000).round()
    return float((scores > 0).any(dim=1).float().mean())


def make(args: argparse.Namespace) -> None:
    """Embed, choose, measure, write, say."""
    import torch

    from ldm.inference.checkpoint import save_weights
    from ldm.inference.safety import CONCEPTS_NAME, load_clip
    from ldm.util import UserError

    target = args.folder / CONCEPTS_NAME
    if target.exists() and not args.overwrite:
        raise UserError(f"{str(target)!r} exists: give --overwrite to make it anew")
    if args.n < 100 or not 0 <= args.max_fpr < 1:
        raise UserError(f"--n {args.n} must be at least 100 and --max_fpr {args.max_fpr} in 0 to 1")
    reconstruct = first_stage(args.folder) if args.reconstruct else None
    clip = load_clip(args.folder)
    fit, test = (
        {name: embed(clip, scenes, reconstruct) for name, scenes in groups(args.n, 2 * args.seed + part).items()} for part in (0, 1)
    )
    concepts = candidates(clip, fit)
    thresholds = {kind: thresholds_for(c, fit, args.max_fpr) for kind, c in concepts.items()}
    emblem = torch.cat([v for name, v in fit.items() if name.startswith(EMBLEM)])
    kind = max(KINDS, key=lambda k: flagged(emblem, concepts[k], thresholds[k])) if args.kind == "best" else args.kind
    lines = [f"| share flagged of scenes not used for the choice | {' | '.join(KINDS)} |", "|---|" + "---:|" * len(KINDS)]
    for name, vectors in test.items():
        shares = [f"{flagged(vectors, concepts[k], thresholds[k]):.2%}" for k in KINDS]
        lines.append(f"| {name} ({len(vectors)}) | {' | '.join(shares)} |")
    state = {
        "concept_embeds": concepts[kind],
        "concept_embeds_weights": thresholds[kind],
        "special_care_embeds": torch.zeros(0, concepts[kind].shape[1]),
        "special_care_embeds_weights": torch.zeros(0),
    }
    save_weights(state, target, {"policy": "red cross on a white background", "kind": kind, "table": "\n".join(lines)}, overwrite=True)
    say("\n".join([*lines, "", f"used: {kind}; written: {target}"]))


def main() -> int:
    """Exit code."""
    args = build_parser().parse_args()
    return guarded(lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
