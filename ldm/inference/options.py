"""Every choice of a run as a record, and which of them may come from where. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHOICES = {
    "device": ("auto", "cpu", "cuda", "mps"),
    "ema": ("auto", "ema", "raw"),
    "precision": ("full", "autocast", "bf16"),
    "prediction": ("eps", "v", "x0"),
    "prompt_syntax": ("plain", "weighted"),
    "rng": ("image", "legacy"),
    "safety": ("card", "warn", "off"),
    "save_progress": ("gif", "webp"),
    "watermark": ("dwtDctSvd", "dwtDct", "none"),
}

PER_SEED = frozenset({"negative_prompt", "seed"})  # may differ within a batch
# What a line of a JSONL prompt file may set for its picture, beside what its task allows.
PER_PICTURE = PER_SEED | frozenset(
    {"scale", "steps", "H", "W", "sampler", "ddim_eta", "spacing", "guidance_rescale", "clip_skip", "prompt_syntax"}
    | {"original_size", "crop", "target_size", "aesthetic_score", "negative_aesthetic_score", "refiner_start"}
)
# Flags that may stand beside --reproduce: where things lie on this machine, never what is drawn.
BESIDE_REPRODUCE = frozenset(
    {"reproduce", "outdir", "config", "ckpt", "vae", "lora", "embedding", "refiner", "refiner_config", "safety_ckpt", "device"}
    | {"trust", "verbose", "save_progress", "progress_every"}
)
# Decides no pixel, so a picture does not record it.
_NOT_RECORDED = frozenset(
    {
        "outdir",
        "trust",
        "verbose",
        "reproduce",
        "prompts",
        "from_file",
        "repeat",
        "skip_grid",
        "skip_save",
        "skip_existing",
        "given",
        "n_rows",
    }
    | {"own_model", "save_progress", "progress_every", "indir"}
)
# Never taken from a picture: a file from elsewhere must not widen what configs may name, nor choose where we write.
NOT_FROM_PICTURE = frozenset(
    {"reproduce", "outdir", "trust", "verbose", "prompts", "from_file", "task", "own_model", "given", "save_progress", "progress_every"}
    | {"skip_existing"}
)


@dataclass
class Options:
    """Every choice of one run, resolved: what the flags say, and the model's defaults for what they leave open.

    Defaults draw as if the flag were not there: a record of an older version, which lacks the newer names, means them.
    """

    task: str  # name of the script
    config: Any  # path of the model's YAML, or the config found from the weights as plain containers
    ckpt: str  # path of its weights: a file or a diffusers folder
    own_model: bool  # not the model that ships, so its safety weights must be named
    # what to draw
    prompt: str | None = None
    negative_prompt: str = ""
    from_file: str | None = None
    prompts: list[Any] = field(default_factory=list)  # pictures of one iteration, in order
    prompt_syntax: str = "plain"
    clip_skip: int | None = None  # blocks of the text encoder left out at its end, counted from 1 (none is left out)
    n_iter: int = 1
    n_samples: int = 1
    repeat: int = 1
    H: int = 512
    W: int = 512
    seed: int = 42
    # how to draw
    sampler: str = "ddim"
    steps: int = 50
    spacing: str | None = None  # of the timesteps; None is the sampler's own
    ddim_eta: float | None = None  # None is the sampler's own
    scale: float = 7.5
    guidance_rescale: float = 0.0
    fixed_code: bool = False
    rng: str = "image"
    precision: str = "autocast"
    device: str = "auto"
    tile: int | None = None  # side in pixels of the tiles of a large canvas
    tile_overlap: int | None = None  # pixels that neighbours share
    # SDXL
    original_size: list[int] | None = None  # height, width; None is H, W
    crop: list[int] | None = None  # top, left; None is 0, 0
    target_size: list[int] | None = None  # height, width; None is H, W
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    refiner: str | None = None
    refiner_config: Any = None  # as `config`
    refiner_start: float = 0.8  # share of the steps that the base takes
    # the model
    prediction: str | None = None
    vae: str | None = None
    lora: list[str] = field(default_factory=list)  # FILE or FILE:WEIGHT
    embedding: list[str] = field(default_factory=list)  # FILE or FILE:WORD
    ema: str = "auto"
    C: int = 4
    f: int = 8
    trust: list[str] = field(default_factory=list)
    # what becomes of the pictures
    outdir: str = ""
    n_rows: int = 0
    skip_grid: bool = False
    skip_save: bool = False
    skip_existing: bool = False  # pictures of this very run that are there already are not drawn again
    save_progress: str | None = None
    progress_every: int = 1
    safety: str = "card"
    safety_ckpt: str | None = None
    watermark: str = "dwtDctSvd"
    watermark_text: str | None = None
    verbose: bool = False
    reproduce: str | None = None
    given: dict[str, Any] = field(default_factory=dict)  # the flags as they were given

    @property
    def batch(self) -> int:
        """Pictures that are drawn at once."""
        return self.n_samples

    @property
    def columns(self) -> int:
        """Pictures in a row of the grid."""
        return self.n_rows or self.n_samples


def recorded_options(options: Options) -> dict[str, Any]:
    """What a picture says about its flags: all that decides its pixels, nothing about where it was written."""
    left_out = set(_NOT_RECORDED)
    if not options.own_model and _is_shipped(options.config):
        left_out |= {"config", "ckpt"}
    record = {name: value for name, value in vars(options).items() if name not in left_out and value not in (None, [])}
    for name in ("config", "refiner_config"):
        if not isinstance(record.get(name, ""), str):  # found from the weights, and found again from them
            record.pop(name)
    return record


def _is_shipped(config: Any) -> bool:
    """Whether this config is found again where none is named: the shipped weights' own, or one made of it by other flags."""
    from ldm.inference import facts

    return not isinstance(config, str) or Path(config).resolve() == facts.SHIPPED_CONFIG.resolve()
