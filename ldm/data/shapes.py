"""The shapes world as training data and as prompts for evaluation.

Owns the data set and the prompt lists. The world itself is in `shapes_world`, its captions in `shapes_text`; both do without
torch, and their public names are re-exported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from ldm.data.shapes_near import MAX_NEAR_MISSES, near_misses
from ldm.data.shapes_text import Part, Spec, caption, parse, spec_of
from ldm.data.shapes_world import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    HELD_OUT,
    HELD_OUT_COMBINATIONS,
    KINDS,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    flip,
    render,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "CANVAS",
    "COLORS",
    "HELD_OUT",
    "HELD_OUT_COMBINATIONS",
    "KINDS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "EvalPrompt",
    "Object",
    "Part",
    "Scene",
    "ShapesDataset",
    "Spec",
    "caption",
    "evaluation_prompts",
    "flip",
    "parse",
    "render",
    "sample_scene",
    "spec_of",
    "unseen_prompts",
]

# Independent random streams of one item.
_SCENE, _CAPTION, _CROP, _NEAR = 0, 1, 2, 3


class ShapesDataset(Dataset):
    """Scenes of the shapes world with captions, drawn as they are asked for; nothing is stored.

    Item i is {"image": float32 (H, W, 3) in [-1, 1], "caption": str}. The image is a pure function of (seed, i); the
    caption is one of (seed, i, epoch), and the epoch, set with `set_epoch`, also reaches workers that already run.
    """

    def __init__(
        self,
        size: int = 100_000,  # number of items
        image_size: int = CANVAS,  # side of the picture in pixels, before the crop
        seed: int = 0,
        kinds: Sequence[str] | None = None,  # scenes to draw from, evenly; None for all
        held_out: bool = False,  # True: every scene shows a held-out combination; False: none does
        paraphrase: float = 0.5,  # share of captions in other than the canonical words
        crop: int | None = None,  # side of a random crop in pixels, for training a first stage
        flip: bool = False,  # mirror half of the scenes, captions included
        caption_seed_offset: int = 0,  # another set of captions for the same pictures
        near_misses: int = 0,  # so many follow every scene, the same with one thing changed; shuffle_train: false keeps them together
    ) -> None:
        super().__init__()
        _check_options(size, image_size, kinds, paraphrase, crop, near_misses, held_out)
        self.size, self.image_size, self.seed = size, image_size, seed
        self.kinds = tuple(kinds or KINDS)
        self.held_out, self.paraphrase, self.crop, self.flip = held_out, paraphrase, crop, flip
        self.caption_seed_offset, self.near_misses = caption_seed_offset, near_misses
        self._group: tuple = (-1,)  # the group asked for last: its first item, its scenes and what changes among them
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # shared, so that running workers see it

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Change the captions, and only those."""
        self._epoch[0] = epoch

    def scene(self, i: int) -> Scene:
        """The scene of item i. With near misses, item 0 of every 1 + near_misses is drawn anew and the others are changed from it."""
        return self._draw(i) if not self.near_misses else self._group_of(i)[0][self._index(i) % (1 + self.near_misses)]

    def facts(self, i: int) -> dict[str, str]:
        """{"kind": the kind of scene}, without drawing it."""
        return {"kind": self._kind(self._rng(self._first(i), _SCENE))}

    def _kind(self, rng: np.random.Generator) -> str:
        return self.kinds[int(rng.integers(len(self.kinds)))]

    def caption_for(self, i: int, epoch: int | None = None) -> str:
        """The caption of item i in an epoch; the present one by default."""
        return self._say(self.scene(i), i, epoch)

    def __getitem__(self, i: int) -> dict[str, np.ndarray | str]:
        scene = self.scene(i)
        image = render(scene, self.image_size)  # (H, W, 3)
        if self.crop is not None and self.crop < self.image_size:
            top, left = self._rng(i, _CROP).integers(self.image_size - self.crop + 1, size=2)
            image = image[top : top + self.crop, left : left + self.crop]
        return {"image": image.astype(np.float32) / 127.5 - 1, "caption": self._say(scene, i)}

    def _group_of(self, i: int) -> tuple[list[Scene], set[str]]:
        """The scenes that item i stands among, and what their captions must not leave open. The group asked for last is kept."""
        first = self._first(i)
        if self._group[0] != first:
            scene = self._draw(first)
            others, changed = near_misses(self._rng(first, _NEAR), scene, self.near_misses, self.kinds)
            self._group = (first, ([scene, *others], changed))
        return self._group[1]

    def _draw(self, i: int) -> Scene:
        rng = self._rng(i, _SCENE)
        scene = sample_scene(rng, self._kind(rng), self.held_out)
        return flip(scene) if self.flip and rng.random() < 0.5 else scene

    def _say(self, scene: Scene, i: int, epoch: int | None = None) -> str:
        """A caption; near misses name the same things in words of their own, so that only what was changed tells them apart."""
        epoch = int(self._epoch[0]) if epoch is None else epoch
        stream = (_CAPTION, epoch, self.caption_seed_offset)
        rng = self._rng(self._first(i), *stream)
        spec = spec_of(scene, rng, self._group_of(i)[1] if self.near_misses else ())
        if self.near_misses:
            rng = self._rng(i, *stream, _NEAR)
        return caption(spec, rng if rng.random() < self.paraphrase else None)

    def _first(self, i: int) -> int:
        """The first item of the group of item i; without near misses i itself."""
        return self._index(i) - self._index(i) % (1 + self.near_misses)

    def _index(self, i: int) -> int:
        if not -self.size <= i < self.size:
            raise IndexError(f"item {i} of a data set of {self.size}")
        return i % self.size

    def _rng(self, i: int, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self._index(i), *stream])


def _check_options(
    size: int, image_size: int, kinds: Sequence[str] | None, paraphrase: float, crop: int | None, near_misses: int, held_out: bool
) -> None:
    """Tell all wrong options of a data set at once."""
    wrong = []
    if size < 1:
        wrong.append(f"size {size} must be at least 1")
    if image_size < 32:
        wrong.append(f"image_size {image_size} must be at least 32")
    if crop is not None and not 1 <= crop <= image_size:
        wrong.append(f"crop {crop} must lie between 1 and image_size {image_size}")
    if not 0 <= paraphrase <= 1:
        wrong.append(f"paraphrase {paraphrase} must lie between 0 and 1")
    if isinstance(kinds, str) or any(k not in KINDS for k in kinds or ()):
        wrong.append(f"kinds {kinds!r} must be a list out of {', '.join(KINDS)}")
    if not 0 <= near_misses <= MAX_NEAR_MISSES:
        wrong.append(f"near_misses {near_misses} must lie between 0 and {MAX_NEAR_MISSES}")
    elif near_misses and held_out:
        wrong.append("near_misses has no scenes with held-out combinations: use held_out: false")
    if wrong:
        from ldm.util import ConfigError

        raise ConfigError("ShapesDataset: " + "; ".join(wrong))


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt, what it demands, and the row of the report it counts in."""

    prompt: str
    spec: Spec
    kind: str
    paraphrased: bool = False
    unseen: bool = False


def evaluation_prompts(n: int = 240, seed: int = 0, held_out_share: float = 0.0) -> list[EvalPrompt]:
    """Prompts over all kinds evenly, every third paraphrased, `held_out_share` of them with a held-out combination."""
    if not 0 <= held_out_share <= 1:
        from ldm.util import UserError

        raise UserError(f"held_out_share {held_out_share} must lie between 0 and 1")
    unseen = [int((i + 1) * held_out_share) > int(i * held_out_share) for i in range(-(-n // len(KINDS)))]
    return _prompts(n, [seed, 1], lambda i: unseen[i // len(KINDS)])


def unseen_prompts(n: int = 64, seed: int = 0) -> list[EvalPrompt]:
    """Prompts with held-out combinations only, over all kinds and all eight combinations evenly."""
    return _prompts(n, [seed, 2], lambda i: True)


def _prompts(n: int, seed: list[int], is_unseen: Callable[[int], bool]) -> list[EvalPrompt]:
    rng = np.random.default_rng(seed)
    records: list[EvalPrompt] = []
    used: set[str] = set()
    for i in range(n):
        kind, round_ = KINDS[i % len(KINDS)], i // len(KINDS)
        look = HELD_OUT_COMBINATIONS[round_ % len(HELD_OUT_COMBINATIONS)] if is_unseen(i) else None
        for _ in range(20):  # a few tries for a prompt that is not yet in the list
            record = _prompt(rng, kind, look, paraphrased=round_ % 3 == 2)
            if record.prompt not in used:
                break
        used.add(record.prompt)
        records.append(record)
    return records


def _prompt(rng: np.random.Generator, kind: str, look: tuple[str, str] | None, paraphrased: bool) -> EvalPrompt:
    """One record; with `look` one of the objects is of this held-out (color, shape)."""
    scene = sample_scene(rng, kind, held_out=look is not None)
    while look is not None and look not in {(o.color, o.shape) for o in scene.objects}:
        scene = sample_scene(rng, kind, held_out=True)
    spec = spec_of(scene, rng)
    plain = text = caption(spec)
    while paraphrased and text == plain:
        text = caption(spec, rng)
    return EvalPrompt(text, spec, kind, paraphrased, look is not None)
