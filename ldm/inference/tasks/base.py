"""The seam between the one core (flags, loading, sampling, finishing) and what is particular to a script.

A task says which flags it adds, what they must satisfy, which picture files it reads, and how prompts and pictures become a
`Condition`. All else is the core's: loading, samplers, seeds, safety, watermark, metadata, grid, `--reproduce`, `--save_progress`.
This module and all modules of tasks are imported for `--help`: torch only inside functions.

A new task is a dataclass of its options (defaults that draw as if the flag were not there), a subclass of `Task`, a line in
`ldm.inference.tasks.TASKS`, and a script that calls `main("name")`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ldm.imaging import load_image
from ldm.inference.options import Options
from ldm.util import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldm.inference.facts import ModelFacts
    from ldm.inference.pipeline import Pipeline
    from ldm.inference.prompts import Batch, PromptLine


@dataclass
class Condition:
    """What one batch is drawn from. The network sees `cond` and `uncond`; `x0` and `mask` say what is kept of a picture."""

    cond: Any  # what apply_model takes: a tensor, a dict of (lists of) tensors, or None
    uncond: Any  # the empty condition in the same form; None without guidance
    shape: tuple[int, int, int]  # of one latent, (C, h, w)
    x0: Tensor | None = None  # (B, C, h, w) or (1, C, h, w), the latent to start from or to keep
    strength: float = 1.0  # share of the steps that are walked from x0: 0 keeps it, 1 starts from pure noise
    mask: Tensor | None = None  # 1 keeps x0, 0 draws new; (B or 1, 1, h, w)
    finish: Callable[[np.ndarray, int], np.ndarray] | None = None  # uint8 (H, W, 3) and its place in the batch -> the same, done
    refined: tuple[Any, Any] | None = None  # the pair (cond, uncond) for the refiner; None: the pipeline encodes the batch's texts


class Task:
    """One script. Class attributes say what it is; methods are called by the core in the order in which they stand here."""

    name: ClassVar[str] = ""  # of the script, without .py
    title: ClassVar[str] = ""  # what it does, the start of --help
    options: ClassVar[type[Options]] = Options  # the common options, or a subclass that adds the task's own
    # Where neither a flag nor the model's YAML says it: sampler, steps, scale, n_samples, n_iter and the task's own options.
    defaults: ClassVar[Mapping[str, Any]] = {"sampler": "ddim", "steps": 50, "scale": 7.5, "n_samples": 3, "n_iter": 2}
    prompts: ClassVar[bool] = True  # takes --prompt, --from_file, --negative_prompt
    sizes: ClassVar[bool] = True  # takes --H and --W
    ships: ClassVar[bool] = True  # the model that ships can do it
    files: ClassVar[Mapping[str, str]] = {}  # options that name pictures to read, and what these are: {"init_img": "init image"}
    # The task's own options that a line of a prompt file may set beside the common ones (`options.PER_PICTURE`).
    per_picture: ClassVar[frozenset[str]] = frozenset()
    from_picture: ClassVar[frozenset[str]] = frozenset()  # further own options that `resolve` takes from a picture, not to be set
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # what the task's own options may be, where these are names

    def add_flags(self, group: argparse._ArgumentGroup) -> None:
        """Add the task's flags; what is left out must be absent from the result (the parser's default is SUPPRESS)."""

    def prepare(self, given: dict[str, Any]) -> dict[str, Any]:
        """The flags as given, those that name the model brought to `config` and `ckpt`. Raises `UserError`."""
        return given

    def resolve(self, values: Mapping[str, Any], facts: ModelFacts) -> dict[str, Any]:
        """Defaults that depend on the model or on other flags (`values`: what was given); they win over `defaults`."""
        size = facts.image_size * facts.factor
        return {"H": size, "W": size}

    def check(self, options: Any, facts: ModelFacts | None) -> list[str]:
        """Everything wrong with the task's options, a clause each. `facts` is None where the config could not be read."""
        problems = []
        for name in self.files:
            path = getattr(options, name)
            if path is not None:
                try:
                    load_image(path)
                except UserError as error:
                    problems.append(f"--{name.replace('_', '-')}: {error}")
        return problems

    def pictures(self, options: Any, problems: list[str]) -> list[str | PromptLine] | None:
        """The pictures of one iteration where the task knows them (always with `prompts = False`); else None, and the core does it."""
        return None

    def read(self, options: Any) -> dict[str, np.ndarray]:
        """The picture files as uint8 arrays, brought to size, by option; the record keeps their hashes, `condition` finds them in
        `pipeline.inputs`."""
        return {}

    def model_config(self, options: Any, config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The `model:` part of the config as this run needs it, and prefixes of weights that it leaves in the file."""
        return config, ()

    def condition(self, pipeline: Pipeline, batch: Batch) -> Condition:
        """What `batch` is drawn from. Random numbers, if any, come from `pipeline.noise` (None: torch's global generator).

        `pipeline.settings` holds the common settings, `pipeline.own` the task's options, `pipeline.inputs` what `read` gave;
        `pipeline.encode_text(batch)` gives (cond, uncond), `pipeline.encode(image)` a scaled latent.
        """
        raise NotImplementedError
