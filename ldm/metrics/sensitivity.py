"""Which words of a caption a model of the shapes world uses, and at which noise levels.

A model that has understood a word predicts worse when the word is wrong. So the loss is measured twice with the same picture, noise and
timestep: with the right caption, and with that of a near miss, in which one thing differs. What is not told apart here cannot come out in
a picture but by chance; unlike counting pictures, this needs a few hundred model calls and shows the first sign of learning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldm.data.shapes_near import CHANGES, near_miss
from ldm.data.shapes_text import caption, spec_of
from ldm.data.shapes_world import Scene, render, sample_scene

TIMESTEPS = (950, 850, 700, 500, 300)


@dataclass(frozen=True)
class Sensitivity:
    """What a wrong word does to the loss at one timestep."""

    right: float  # mean square error with the right captions
    worse: float  # by how much it is higher with the wrong ones
    noticed: float  # share of the pictures for which it is higher; 0.5 is chance


def wrong_captions(change: str, n: int, seed: int = 0) -> tuple[list[Scene], list[str], list[str]]:
    """n scenes with a full caption each, and the caption of a near miss that differs in `change` (a key of `shapes_near.CHANGES`)."""
    rng = np.random.default_rng([seed, list(CHANGES).index(change)])
    scenes: list[Scene] = []
    right: list[str] = []
    wrong: list[str] = []
    while len(scenes) < n:
        scene = sample_scene(rng)
        other = near_miss(rng, scene, change)
        if other is not None:
            told = [caption(spec_of(s, rng, ("size", "background"))) for s in (scene, other)]
            if told[0] != told[1]:
                scenes.append(scene)
                right.append(told[0])
                wrong.append(told[1])
    return scenes, right, wrong


@torch.no_grad()
def sensitivity(
    model: Any,  # a LatentDiffusion over captions
    changes: Sequence[str] = tuple(CHANGES),
    timesteps: Sequence[int] = TIMESTEPS,
    n: int = 128,  # scenes for each change
    seed: int = 0,
    image_size: int = 256,  # side of the pictures in pixels
    batch: int = 32,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Sensitivity]]:
    """By change, one entry for each of the timesteps. The same seed gives the same scenes and noise to any model."""
    found = {}
    for change in changes:
        progress(change)
        scenes, *captions = wrong_captions(change, n, seed)
        parts = [slice(start, start + batch) for start in range(0, n, batch)]
        noise = torch.Generator().manual_seed(seed)  # goes on from part to part: each scene has its own
        errors = np.concatenate([_errors(model, scenes[p], [c[p] for c in captions], timesteps, image_size, noise) for p in parts], axis=2)
        found[change] = [Sensitivity(float(r.mean()), float((w - r).mean()), float((w > r).mean())) for r, w in errors]
    return found


def _errors(
    model: Any,
    scenes: Sequence[Scene],
    captions: Sequence[Sequence[str]],
    timesteps: Sequence[int],
    image_size: int,
    generator: torch.Generator,  # of the noise
) -> np.ndarray:
    """Mean square errors (timesteps, right and wrong caption, scenes) of what the model predicts."""
    pictures = np.stack([render(scene, image_size) for scene in scenes]).astype(np.float32) / 127.5 - 1
    z = model.get_first_stage_encoding(model.encode_first_stage(torch.from_numpy(pictures).movedim(-1, 1).to(model.device)).mode())
    noise = torch.randn(z.shape, generator=generator).to(z)
    conds = [model.get_learned_conditioning(list(texts)) for texts in captions]
    found = []
    for step in timesteps:
        t = torch.full((len(z),), step, device=z.device)
        noised, target = model.q_sample(z, t, noise), model.training_target(z, noise, t)
        found.append([(model.apply_model(noised, t, c) - target).square().flatten(1).mean(1).cpu().numpy() for c in conds])
    return np.array(found)


def markdown(found: dict[str, list[Sensitivity]], timesteps: Sequence[int] = TIMESTEPS) -> str:
    """A row for each change: share of pictures for which the wrong word is noticed, and by how much the loss is worse."""
    lines = [f"| wrong word | {' | '.join(f't = {t}' for t in timesteps)} |", "|---|" + "---:|" * len(timesteps)]
    for change, row in found.items():
        lines.append(f"| {change} | {' | '.join(f'{s.noticed:.0%} ({s.worse:+.4f})' for s in row)} |")
    return "\n".join(lines) + "\n"
