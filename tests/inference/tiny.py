"""Tiny models with random weights, written to a folder as a user would have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from ldm.inference.checkpoint import save_weights
from ldm.inference.facts import read_config
from ldm.util import instantiate_from_config

DATA = Path(__file__).parents[1] / "data"


def write_model(folder: Path, seed: int = 0) -> Path:
    """`config.yaml` and `model.safetensors` of a LatentDiffusion that draws 64x64 pixels; gives the weights' path."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / "tiny_text2image.yaml", folder / "config.yaml")
    torch.manual_seed(seed)
    model = instantiate_from_config(read_config(folder / "config.yaml")["model"])
    with torch.no_grad():  # layers that start at zero would make every prompt draw the same
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return save_weights(model, folder / "model.safetensors")


def write_safety(folder: Path, threshold: float, seed: int = 0) -> Path:
    """A safety check with one concept; `threshold` -2 flags everything, 2 nothing. Gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(DATA / "tiny_clip.yaml", folder / "clip.yaml")
    torch.manual_seed(seed)
    save_weights(instantiate_from_config(read_config(folder / "clip.yaml")["model"]), folder / "clip.safetensors")
    concepts = {
        "concept_embeds": torch.randn(1, 16),
        "concept_embeds_weights": torch.tensor([threshold]),
        "special_care_embeds": torch.zeros(0, 16),
        "special_care_embeds_weights": torch.zeros(0),
    }
    save_weights(concepts, folder / "safety.safetensors")
    return folder
