"""The safety check of Stable Diffusion: a picture's CLIP embedding against concept embeddings, each with its threshold.

Owns the rule, the two forms its weights come in (the published checker's folder; a CLIP of `ldm.models.clip` with a small file of
concepts), and the card that takes a flagged picture's place. Downloads nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ldm.imaging import from_uint8
from ldm.inference.checkpoint import load_weights, read_state_dict
from ldm.util import CheckpointError, UserError, instantiate_from_config

log = logging.getLogger(__name__)

CONCEPT_KEYS = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")
CONCEPTS_NAME = "safety.safetensors"
CLIP_NAMES = ("clip.yaml", "clip.safetensors")
SPECIAL_CARE = 0.01  # added to every later score once a special-care concept is near
CARD_TEXT = "Withheld by the\nsafety check"

# Pixels of CLIP: mean and standard deviation of RGB in [0, 1].
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# The published checker's image tower (ViT-L/14), for a folder without config.json.
_VIT_L14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}


@dataclass(frozen=True)
class Verdict:
    """What the check found in one picture. A score is cosine similarity minus threshold plus adjustment; above 0 it counts."""

    flagged: bool
    scores: tuple[float, ...]  # one a concept
    special: tuple[float, ...]  # one a special-care concept


class SafetyChecker(nn.Module):
    """Flags pictures whose embedding is nearer to a concept than its threshold."""

    concept_embeds: Tensor
    concept_embeds_weights: Tensor
    special_care_embeds: Tensor
    special_care_embeds_weights: Tensor

    def __init__(
        self,
        tower: nn.Module,
        embed: Callable[[Sequence[np.ndarray]], Tensor],  # uint8 pictures (H, W, 3) -> (B, D)
        concepts: Mapping[str, Tensor],  # CONCEPT_KEYS: embeddings (N, D) and thresholds (N,), special care alike
    ) -> None:
        super().__init__()
        self.tower = tower
        self.embed = embed
        for key in CONCEPT_KEYS:
            self.register_buffer(key, concepts[key].detach().float())
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, images: Sequence[np.ndarray]) -> list[Verdict]:
        """Judge uint8 pictures (H, W, 3)."""
        return [self._judge(embedding) for embedding in self.embed(images).float()]

    def _judge(self, embedding: Tensor) -> Verdict:
        special = _cosine(embedding, self.special_care_embeds)
        concepts = _cosine(embedding, self.concept_embeds)
        adjustment, special_scores, scores = 0.0, [], []
        for cosine, threshold in zip(special, self.special_care_embeds_weights.tolist(), strict=True):
            special_scores.append(round(cosine - threshold + adjustment, 3))
            if special_scores[-1] > 0:
                adjustment = SPECIAL_CARE
        for cosine, threshold in zip(concepts, self.concept_embeds_weights.tolist(), strict=True):
            scores.append(round(cosine - threshold + adjustment, 3))
        return Verdict(any(score > 0 for score in scores), tuple(scores), tuple(special_scores))


def _cosine(embedding: Tensor, concepts: Tensor) -> list[float]:
    """(D,) against (N, D) -> N similarities."""
    return (F.normalize(concepts, dim=-1) @ F.normalize(embedding, dim=-1)).tolist()


def load_safety(path: str | Path, device: str | torch.device = "cpu") -> SafetyChecker:
    """Read a checker from a local folder (or a file in it). Raises `CheckpointError` where anything is missing.

    Two forms: `clip.yaml`, `clip.safetensors` and `safety.safetensors`, as shipped in models/shapes; or the published Stable
    Diffusion checker, `model.safetensors` or `pytorch_model.bin` with its `config.json`.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not folder.is_dir() or not Path(path).exists():
        raise CheckpointError(f"safety weights {str(path)!r} do not exist: check --safety_ckpt, or choose --safety off")
    if (folder / CONCEPTS_NAME).is_file():
        checker = _load_own(folder)
    else:
        weights = next((folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()), None)
        if weights is None:
            raise CheckpointError(
                f"no safety weights in {str(folder)!r}: it needs {CONCEPTS_NAME} with {' and '.join(CLIP_NAMES)}, or the published "
                "checker's model.safetensors; or choose --safety off"
            )
        checker = _load_published(folder, weights)
    return checker.to(device)


def check_safety_files(path: str | Path) -> None:
    """Raise `CheckpointError` where `load_safety` would miss a file; reads nothing."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    own = [CONCEPTS_NAME, *CLIP_NAMES]
    if all((folder / name).is_file() for name in own):
        return
    if not (folder / CONCEPTS_NAME).is_file() and any((folder / n).is_file() for n in ("model.safetensors", "pytorch_model.bin")):
        return
    missing = ", ".join(name for name in own if not (folder / name).is_file())
    raise CheckpointError(
        f"safety weights are incomplete: no {missing} in {str(folder)!r}; name a folder by --safety_ckpt, or --safety off"
    )


# ---------------------------------------------------------------------- with a CLIP of our own
def load_clip(folder: Path) -> Any:
    """The `ContrastiveCLIP` of `clip.yaml` and `clip.safetensors`, in eval mode."""
    from ldm.inference.facts import read_config

    config, weights = (folder / name for name in CLIP_NAMES)
    for file in (config, weights):
        if not file.is_file():
            raise CheckpointError(f"no {file.name} in {str(folder)!r}")
    clip = instantiate_from_config(read_config(config)["model"])
    load_weights(clip, weights)
    return clip.float().eval()


def _load_own(folder: Path) -> SafetyChecker:
    clip = load_clip(folder)
    concepts = read_state_dict(folder / CONCEPTS_NAME)
    if missing := [key for key in CONCEPT_KEYS if key not in concepts]:
        raise CheckpointError(f"{str(folder / CONCEPTS_NAME)!r} lacks {', '.join(missing)}")
    return SafetyChecker(clip, lambda images: embed_with_clip(clip, images), concepts)


def embed_with_clip(clip: Any, images: Sequence[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) of one size -> (B, D), by a `ContrastiveCLIP`."""
    pixels = torch.from_numpy(np.stack([from_uint8(image) for image in images])).movedim(-1, 1)  # (B, 3, H, W)
    return clip.encode_image(pixels)


# ---------------------------------------------------------------------- the published checker
class PublishedTower(nn.Module):
    """CLIP's image tower and projection under the published names (`vision_model.vision_model.*`, `visual_projection.weight`)."""

    def __init__(self, vision_config: Mapping[str, Any], projection_dim: int) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        config = CLIPVisionConfig(**vision_config)
        self.image_size = int(vision_config["image_size"])
        self.vision_model = CLIPVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, projection_dim, bias=False)

    def forward(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 pictures (H, W, 3) -> (B, D)."""
        weight = self.visual_projection.weight
        pixels = torch.stack([clip_pixels(image, self.image_size) for image in images]).to(weight.device, weight.dtype)
        return self.visual_projection(self.vision_model(pixel_values=pixels).pooler_output)


def clip_pixels(image: np.ndarray, size: int) -> Tensor:
    """CLIP's own preparation: shorter side to `size` (bicubic), middle square, normalised. uint8 (H, W, 3) -> (3, size, size)."""
    height, width = image.shape[:2]
    short = min(height, width)
    resized = Image.fromarray(image).resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    top, left = (resized.height - size) // 2, (resized.width - size) // 2
    square = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32) / 255.0
    return torch.from_numpy(((square - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)).transpose(2, 0, 1))


def _load_published(folder: Path, weights: Path) -> SafetyChecker:
    vision, projection_dim = _published_config(folder / "config.json")
    state = read_state_dict(weights)
    if missing := [key for key in CONCEPT_KEYS if key not in state]:
        raise CheckpointError(f"{str(weights)!r} is not a Stable Diffusion safety checker: it lacks {', '.join(missing)}")
    concepts = {key: state.pop(key) for key in CONCEPT_KEYS}
    tower = PublishedTower(vision, projection_dim).eval()
    _load_tower(tower, state, weights)
    return SafetyChecker(tower, tower, concepts)


def _published_config(path: Path) -> tuple[dict[str, Any], int]:
    if not path.is_file():
        return dict(_VIT_L14), int(_VIT_L14["projection_dim"])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        vision = dict(config.get("vision_config") or {})
        projection = int(config.get("projection_dim", vision.get("projection_dim", 768)))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from None
    known = set(_VIT_L14) | {"hidden_act", "layer_norm_eps", "num_channels"}
    return _VIT_L14 | {key: value for key, value in vision.items() if key in known}, projection


def _load_tower(tower: PublishedTower, state: dict[str, Tensor], source: Path) -> None:
    """Fit the published names to those of the installed transformers (5.6 and later have one `vision_model.` less)."""
    own = tower.state_dict()
    fitted = {}
    for name, value in state.items():
        short = name.replace("vision_model.vision_model.", "vision_model.", 1)
        key = name if name in own else short if short in own else name.replace("vision_model.", "vision_model.vision_model.", 1)
        if key in own:
            fitted[key] = value
        elif not name.endswith("position_ids"):
            raise CheckpointError(f"{str(source)!r} has the unexpected key {name!r}")
    missing = [key for key in own if key not in fitted and not key.endswith("position_ids")]
    wrong = [key for key in fitted if fitted[key].shape != own[key].shape]
    if missing or wrong:
        raise CheckpointError(f"{str(source)!r} does not fit its config.json: " + ", ".join((missing or wrong)[:5]))
    tower.load_state_dict({**own, **fitted})


# ---------------------------------------------------------------------- what becomes of a flagged picture
def safety_card(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): a plain gray card that says why there is no picture."""
    card = Image.new("RGB", (width, height), (208, 208, 208))
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, width - 1, height - 1), outline=(120, 120, 120), width=max(1, min(height, width) // 64))
    font = ImageFont.load_default(max(6, min(height, width) // 12))
    box = draw.multiline_textbbox((0, 0), CARD_TEXT, font=font, align="center")
    at = ((width - box[2] - box[0]) / 2, (height - box[3] - box[1]) / 2)
    draw.multiline_text(at, CARD_TEXT, fill=(60, 60, 60), font=font, align="center")
    return np.asarray(card).copy()


class SafetyFilter:
    """The `--safety` flag: pictures in, pictures out, with what was flagged. `checker` None is `off`."""

    def __init__(self, checker: SafetyChecker | None, mode: str = "card") -> None:
        if mode not in ("card", "warn", "off"):
            raise UserError(f"unknown safety mode {mode!r}: use card, warn or off")
        if checker is None and mode != "off":
            raise UserError("no safety weights are loaded: name them by --safety_ckpt, or choose --safety off")
        self.checker, self.mode = checker, mode

    def __call__(self, images: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[Verdict | None]]:
        """uint8 pictures (H, W, 3) of one size -> the same or cards, and a verdict each (None when off)."""
        if self.mode == "off" or self.checker is None:
            return list(images), [None] * len(images)
        verdicts = self.checker(images)
        kept = []
        for image, verdict in zip(images, verdicts, strict=True):
            kept.append(safety_card(*image.shape[:2]) if verdict.flagged and self.mode == "card" else image)
        return kept, list(verdicts)
