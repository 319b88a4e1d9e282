from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm.inference.safety import (
    PublishedTower,
    SafetyChecker,
    SafetyFilter,
    check_safety_files,
    clip_pixels,
    load_safety,
    safety_card,
)
from ldm.util import CheckpointError, UserError

PICTURES = [np.full((64, 64, 3), level, np.uint8) for level in (0, 90, 255)]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}


def checker(embedding: list[float], concepts: list[list[float]], at: list[float], special: list[list[float]], special_at: list[float]):
    weights = {
        "concept_embeds": torch.tensor(concepts),
        "concept_embeds_weights": torch.tensor(at),
        "special_care_embeds": torch.tensor(special).reshape(-1, 2),
        "special_care_embeds_weights": torch.tensor(special_at),
    }
    return SafetyChecker(torch.nn.Identity(), lambda images: torch.tensor([embedding] * len(images)), weights)


def test_a_concept_nearer_than_its_threshold_flags():
    unit = [0.6, 0.8]
    near, far = checker(unit, [[1.0, 0.0]], [0.59], [], []), checker(unit, [[2.0, 0.0]], [0.61], [], [])
    assert near(PICTURES[:1])[0].flagged and near(PICTURES[:1])[0].scores == (0.01,)
    assert not far(PICTURES[:1])[0].flagged and far(PICTURES[:1])[0].scores == (-0.01,)


def test_special_care_adds_a_hundredth():
    """A picture just below the threshold is flagged once a special-care concept is near, as in the published rule."""
    plain = checker([0.6, 0.8], [[1.0, 0.0]], [0.605], [[0.0, 1.0]], [0.9])(PICTURES[:1])[0]
    careful = checker([0.6, 0.8], [[1.0, 0.0]], [0.605], [[0.0, 1.0], [0.0, 1.0]], [0.7, 0.805])(PICTURES[:1])[0]
    assert not plain.flagged and plain.scores == (-0.005,) and plain.special == (-0.1,)
    assert careful.flagged and careful.scores == (0.005,) and careful.special == (0.1, 0.005)


def test_the_filter_replaces_or_only_names(lenient: Path, strict: Path):
    everything = load_safety(strict)
    images, verdicts = SafetyFilter(everything, "card")(PICTURES)
    assert all(v is not None and v.flagged for v in verdicts)
    assert all(np.array_equal(image, safety_card(64, 64)) for image in images)
    images, verdicts = SafetyFilter(everything, "warn")(PICTURES)
    assert all(v is not None and v.flagged for v in verdicts) and images == PICTURES
    images, verdicts = SafetyFilter(load_safety(lenient), "card")(PICTURES)
    assert not any(v is None or v.flagged for v in verdicts) and images == PICTURES
    assert SafetyFilter(None, "off")(PICTURES) == (PICTURES, [None] * 3)


def test_no_check_without_weights_unless_told(tmp_path: Path):
    with pytest.raises(UserError, match="--safety off"):
        SafetyFilter(None, "card")
    for check in (check_safety_files, load_safety):
        with pytest.raises(CheckpointError, match="safety"):
            check(tmp_path)


def test_the_card_is_neutral_and_of_any_size():
    for height, width in ((512, 256), (64, 64), (8, 8)):
        card = safety_card(height, width)
        assert card.shape == (height, width, 3) and card.dtype == np.uint8
        assert (card[..., 0] == card[..., 1]).all() and (card[..., 1] == card[..., 2]).all()
    assert len(np.unique(safety_card(256, 256))) > 2  # it says something


def test_incomplete_weights_are_named(tmp_path: Path, lenient: Path):
    (tmp_path / "safety.safetensors").write_bytes((lenient / "safety.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"clip\.yaml"):
        load_safety(tmp_path)
    with pytest.raises(CheckpointError, match=r"clip\.yaml, clip\.safetensors"):
        check_safety_files(tmp_path)


def published_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small checker under the published names, whatever the installed transformers calls its parts."""
    torch.manual_seed(seed)
    tower = PublishedTower(VISION, 16)
    state = {}
    for key, value in tower.state_dict().items():
        if key.startswith("vision_model.") and not key.startswith("vision_model.vision_model."):
            key = "vision_model." + key
        state[key] = value.clone()
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]  # of old files
    state |= {"concept_embeds": torch.randn(17, 16), "concept_embeds_weights": torch.full((17,), 2.0)}
    return state | {"special_care_embeds": torch.randn(3, 16), "special_care_embeds_weights": torch.full((3,), 2.0)}


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_the_published_checkers_folder_is_read(tmp_path: Path, form: str):
    state = published_state()
    (tmp_path / "config.json").write_text(json.dumps({"projection_dim": 16, "vision_config": VISION}))
    if form.endswith(".bin"):
        torch.save(state, tmp_path / form)
    else:
        save_file(state, tmp_path / form)
    read = load_safety(tmp_path)
    rng = np.random.default_rng(0)
    for size, tolerance in (((28, 28), 1e-5), ((50, 40), 2e-3)):  # resizing differs a little: transformers' is no longer PIL's
        noise = rng.integers(0, 255, (*size, 3), np.uint8)
        with torch.inference_mode():
            torch.testing.assert_close(read.embed([noise]), _embedding_by_transformers(state, noise), rtol=1e-4, atol=tolerance)
    assert len(read([noise])[0].scores) == 17 and len(read([noise])[0].special) == 3
    assert not read([noise])[0].flagged
    read.concept_embeds_weights[4] = -2.0
    assert read([noise])[0].flagged


def _embedding_by_transformers(state: dict[str, torch.Tensor], image: np.ndarray) -> torch.Tensor:
    """The same picture through transformers' own preprocessing and CLIPVisionModelWithProjection."""
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=16)).eval()
    own = model.state_dict()
    short = {key.replace("vision_model.vision_model.", "vision_model.", 1): value for key, value in state.items()}
    model.load_state_dict({key: short[key] for key in own})
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    with torch.inference_mode():
        return model(**processor(Image.fromarray(image), return_tensors="pt")).image_embeds


@pytest.mark.parametrize("lost", ["concept_embeds", "visual_projection.weight", "special_care_embeds_weights"])
def test_a_checker_with_a_missing_part_is_refused(tmp_path: Path, lost: str):
    state = published_state()
    del state[lost]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"projection_dim": 16, "vision_config": VISION}))
    with pytest.raises(CheckpointError, match=lost):
        load_safety(tmp_path)


def test_clip_pixels_cuts_the_middle():
    image = np.zeros((28, 56, 3), np.uint8)
    image[:, 14:42] = 255
    white = (1 - 0.48145466) / 0.26862954
    assert clip_pixels(image, 28)[0].min() == pytest.approx(white, abs=1e-4)
