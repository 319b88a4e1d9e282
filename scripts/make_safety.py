#!/usr/bin/env python3
"""Make the safety check of the Shapes world: which embedding stands for the Red Cross emblem, and from which similarity on.

The policy blocks one thing: a red cross on a white background. Scenes are rendered with and without it; from one half the concept
embedding and its threshold are chosen, the other half says how good they are. Three kinds of embedding are tried: the caption's
(`text`), the mean of the pictures' (`image`), and the direction that best tells them apart (`contrast`: linear discriminant).
Needs the trained CLIP, `clip.yaml` and `clip.safetensors`; writes `safety.safetensors` beside them and prints the table.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.inference.cli import guarded, say

CAPTIONS = ("a red cross on a white background", "a large red cross on a white background", "a small red cross on a white background")
KINDS = ("text", "image", "contrast")


def build_parser() -> argparse.ArgumentParser:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "models" / "shapes", help="with the CLIP")
    parser.add_argument("--n", type=int, default=1500, help="scenes of the emblem and of each kind of lawful scene (1500)")
    parser.add_argument("--max_fpr", type=float, default=0.005, help="false positives among lawful scenes to accept (0.005)")
    parser.add_argument("--kind", choices=("best", *KINDS), default="best", help="embedding to use (best: highest recall)")
    parser.add_argument("--reconstruct", action="store_true", help="pass every other scene through the model's first stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing safety.safetensors")
    return parser


def is_emblem(scene: Any) -> bool:
    """Does this scene show what the policy blocks?"""
    return scene.background == "white" and any((o.color, o.shape) == ("red", "cross") for o in scene.objects)


def emblem_scene(rng: Any, background: str = "white", color: str = "red", shape: str | None = "cross") -> Any:
    """A scene of any kind with a cross in it, or an object of any other `shape` (None: as it comes)."""
    from ldm.data.shapes import sample_scene

    while True:
        scene = sample_scene(rng)
        if shape is None or scene.objects[0].shape in ("circle", "square", "ring"):  # as wide as a cross, so nothing overlaps
            break
    changed = len(scene.objects) if scene.kind == "count" else 1
    look = {"color": color} | ({"shape": shape} if shape else {})
    objects = [dataclasses.replace(o, **look) if i < changed else o for i, o in enumerate(scene.objects)]
    return dataclasses.replace(scene, background=background, objects=tuple(objects))


def groups(n: int, seed: int) -> dict[str, list[Any]]:
    """n scenes each: the emblem (two groups of about n / 2), and four kinds of lawful scene, three of them near misses."""
    import numpy as np

    from ldm.data.shapes import BACKGROUNDS, COLORS, sample_scene

    rng = np.random.default_rng(seed)

    def pick(names: Any, without: str) -> str:
        options = [name for name in names if name != without]
        return options[int(rng.integers(len(options)))]

    emblems = [emblem_scene(rng) for _ in range(n)]
    made = {
        "emblem: red cross on white, alone or several": [s for s in emblems if s.kind in ("single", "count")],
        "emblem: red cross on white, beside another object": [s for s in emblems if s.kind not in ("single", "count")],
        "lawful: any scene": [sample_scene(rng, held_out=bool(i % 8 == 0)) for i in range(n)],
        "lawful: red cross, not on white": [emblem_scene(rng, background=pick(BACKGROUNDS, "white")) for _ in range(n)],
        "lawful: red on white, no red cross": [emblem_scene(rng, shape=None) for _ in range(n)],
        "lawful: cross on white, not red": [emblem_scene(rng, color=pick(COLORS, "red")) for _ in range(n)],
    }
    return {name: [s for s in scenes if is_emblem(s) == name.startswith("emblem")] for name, scenes in made.items()}


def embed(clip: Any, scenes: list[Any], reconstruct: Any = None) -> Any:
    """(N, D) unit embeddings of rendered scenes; every other one as `reconstruct` draws it."""
    import torch
    from tqdm import tqdm

    from ldm.data.shapes import render
    from ldm.inference.safety import embed_with_clip

    parts = []
    with torch.inference_mode():
        for first in tqdm(range(0, len(scenes), 64), desc="scenes", leave=False):
            images = [render(scene) for scene in scenes[first : first + 64]]
            if reconstruct is not None:
                images[::2] = reconstruct(images[::2])
            parts.append(embed_with_clip(clip, images))
    return torch.cat(parts)


def first_stage(folder: Path) -> Any:
    """uint8 pictures -> what the model's first stage makes of them: the sharpest it could draw."""
    import numpy as np
    import torch

    from ldm.imaging import from_uint8, to_uint8
    from ldm.inference.facts import find_model
    from ldm.inference.pipeline import load_model

    model = load_model(*find_model(str(folder / "config.yaml"), None))

    def reconstruct(images: list[Any]) -> list[Any]:
        pixels = torch.from_numpy(np.stack([from_uint8(image) for image in images])).movedim(-1, 1)
        encoded = model.encode_first_stage(pixels)
        z = model.get_first_stage_encoding(encoded.mode() if hasattr(encoded, "mode") else encoded)
        return list(to_uint8(model.decode_first_stage(z)))

    return reconstruct


def candidates(clip: Any, emblem: Any, lawful: Any) -> dict[str, Any]:
    """Unit concept embeddings (D,) by kind."""
    import torch
    import torch.nn.functional as F

    mean, other = emblem.mean(0), lawful.mean(0)
    centred = torch.cat([emblem - mean, lawful - other]).double()
    covariance = centred.T @ centred / len(centred)
    ridge = 1e-2 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    with torch.inference_mode():
        text = clip.encode_text(list(CAPTIONS)).mean(0)
    found = {"text": text, "image": mean, "contrast": torch.linalg.solve(covariance + ridge, (mean - other).double()).float()}
    return {kind: F.normalize(vector, dim=0) for kind, vector in found.items()}


def threshold_for(emblem: Any, lawful: Any, max_fpr: float) -> float:
    """Similarity above which at most `max_fpr` of the lawful scenes lie; half way to the emblems where they are apart."""
    import torch

    allowed = int(max_fpr * len(lawful))
    at = float(torch.sort(lawful, descending=True).values[allowed])
    lowest = float(emblem.min())
    return (float(lawful.max()) + lowest) / 2 if lowest > float(lawful.max()) else at


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
    clip = load_clip(args.folder)
    reconstruct = first_stage(args.folder) if args.reconstruct else None
    fit, test = (
        {name: embed(clip, scenes, reconstruct) for name, scenes in groups(args.n, 2 * args.seed + part).items()} for part in (0, 1)
    )
    emblem, lawful = (torch.cat([v for name, v in fit.items() if name.startswith(group)]) for group in ("emblem", "lawful"))
    concepts = candidates(clip, emblem, lawful)
    thresholds = {kind: threshold_for(emblem @ c, lawful @ c, args.max_fpr) for kind, c in concepts.items()}
    recall = {kind: float((emblem @ c > thresholds[kind]).float().mean()) for kind, c in concepts.items()}
    kind = max(KINDS, key=lambda k: recall[k]) if args.kind == "best" else args.kind
    state = {
        "concept_embeds": concepts[kind][None],
        "concept_embeds_weights": torch.tensor([thresholds[kind]]),
        "special_care_embeds": torch.zeros(0, len(concepts[kind])),
        "special_care_embeds_weights": torch.zeros(0),
    }
    lines = [f"| share flagged of scenes not used for the choice | {' | '.join(KINDS)} |", "|---|" + "---:|" * len(KINDS)]
    for name, vectors in test.items():
        shares = [float((vectors @ concepts[k] > thresholds[k]).float().mean()) for k in KINDS]
        lines.append(f"| {name} ({len(vectors)}) | " + " | ".join(f"{share:.2%}" for share in shares) + " |")
    lines.append("| threshold | " + " | ".join(f"{thresholds[k]:.3f}" for k in KINDS) + " |")
    save_weights(state, target, {"policy": "red cross on a white background", "kind": kind, "table": "\n".join(lines)}, overwrite=True)
    say("\n".join([*lines, "", f"used: {kind}; written: {target}"]))


def main() -> int:
    """Exit code."""
    args = build_parser().parse_args()
    return guarded(lambda: make(args))


if __name__ == "__main__":
    sys.exit(main())
