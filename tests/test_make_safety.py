"""scripts/make_safety.py: its scenes, its concepts and thresholds, and the check that ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ldm.data.shapes import SHAPES, render
from ldm.data.shapes_world import fits
from ldm.inference.safety import SafetyChecker, load_safety
from ldm.util import UserError
from scripts import make_safety

SHIPPED = Path(__file__).resolve().parents[1] / "models" / "shapes"


def test_groups_are_what_they_are_called() -> None:
    made = make_safety.groups(100, seed=3)
    assert [name.startswith(make_safety.EMBLEM) for name in made] == [True] * 10 + [False] * 5
    for name, scenes in made.items():
        assert len(scenes) >= (33 if "beside a " in name else 80)
        assert all(make_safety.is_emblem(s) == name.startswith(make_safety.EMBLEM) for s in scenes)
        assert all(fits(s.objects, s.relation) for s in scenes)
    assert {s.kind for s in made[make_safety.EMBLEM + "several"]} == {"count"}
    first = {name: [s.objects[0] for s in scenes] for name, scenes in made.items()}
    assert {(o.color, o.shape) for o in first[make_safety.LAWFUL + "red cross, not on white"]} == {("red", "cross")}
    assert {o.color for o in first[make_safety.LAWFUL + "red on white, no red cross"]} == {"red"}
    assert "red" not in {o.color for o in first[make_safety.LAWFUL + "cross on white, not red"]}
    assert tuple(SHAPES) == make_safety.SHAPES
    for shape in SHAPES:
        assert {s.objects[1].shape for s in made[f"{make_safety.EMBLEM}beside a {shape}"]} == {shape}
    swapped = made[make_safety.LAWFUL + "cross beside something red, on white"]
    assert {s.background for s in swapped} == {"white"}
    assert all(s.objects[0].shape == "cross" and s.objects[1].color == "red" for s in swapped)


def test_contrast_finds_the_direction_that_tells_apart() -> None:
    torch.manual_seed(0)
    other = torch.randn(400, 8) * torch.tensor([1.0, 5, 5, 5, 5, 5, 5, 5])
    emblem = torch.randn(100, 8) * torch.tensor([1.0, 5, 5, 5, 5, 5, 5, 5]) + torch.tensor([6.0, *[0.0] * 7])
    direction = F.normalize(make_safety.contrast(emblem, other), dim=0)
    assert direction[0] > 0.98
    assert (emblem @ direction > 3).float().mean() > 0.98 and (other @ direction > 3).float().mean() < 0.02


def found(lawful: list[list[float]], emblem: list[float]) -> dict[str, torch.Tensor]:
    """Embeddings (N, 2) whose first entry is the similarity to the concept (1, 0)."""
    groups = {make_safety.EMBLEM + name: emblem for name in make_safety.CONCEPTS}
    groups |= {f"{make_safety.LAWFUL}{i}": values for i, values in enumerate(lawful)}
    return {name: torch.tensor([[v, (1 - v * v) ** 0.5] for v in values]) for name, values in groups.items()}


def test_thresholds_keep_to_the_rate_in_the_worst_kind_of_scene() -> None:
    concepts = torch.tensor([[1.0, 0.0]] * len(make_safety.CONCEPTS))
    easy, hard = np.linspace(-0.5, 0.0, 300).tolist(), np.linspace(0.0, 0.6, 300).tolist()
    vectors = found([easy, hard], np.linspace(0.3, 0.9, 50).tolist())
    at = make_safety.thresholds_for(concepts, vectors, 0.03)
    assert at.unique().numel() == 1
    shares = [make_safety.flagged(vectors[f"{make_safety.LAWFUL}{i}"], concepts, at) for i in (0, 1)]
    assert shares[0] == 0 and 0.02 < shares[1] <= 0.03  # the concepts are all the same, so they share the whole rate
    apart = make_safety.thresholds_for(concepts, found([easy], [0.4, 0.8]), 0.03)
    assert apart.tolist() == pytest.approx([0.2] * len(make_safety.CONCEPTS))


def test_thresholds_keep_to_the_rate_for_all_concepts_together() -> None:
    torch.manual_seed(2)
    concepts = F.normalize(torch.randn(len(make_safety.CONCEPTS), 16), dim=1)
    vectors = {make_safety.EMBLEM + name: F.normalize(torch.randn(50, 16), dim=1) for name in make_safety.CONCEPTS}
    vectors[make_safety.LAWFUL + "any"] = F.normalize(torch.randn(2000, 16), dim=1)
    share = make_safety.flagged(vectors[make_safety.LAWFUL + "any"], concepts, make_safety.thresholds_for(concepts, vectors, 0.05))
    assert 0.03 < share <= 0.05


def test_shares_follow_the_rule_of_the_check() -> None:
    torch.manual_seed(1)
    vectors, concepts = (F.normalize(torch.randn(n, 4), dim=1) for n in (200, 3))
    at = torch.tensor([0.5, 0.6, 0.7])
    none = {"special_care_embeds": torch.zeros(0, 4), "special_care_embeds_weights": torch.zeros(0)}
    state = {"concept_embeds": concepts, "concept_embeds_weights": at, **none}
    verdicts = SafetyChecker(torch.nn.Identity(), lambda images: vectors, state)([np.zeros((8, 8, 3), np.uint8)])
    share = np.mean([v.flagged for v in verdicts])
    assert 0.1 < share < 0.9 and make_safety.flagged(vectors, concepts, at) == pytest.approx(share)


def test_reconstruct_gives_what_the_first_stage_can_draw(tmp_path: Path) -> None:
    images = [render(s) for s in make_safety.groups(100, seed=0)[make_safety.EMBLEM + "alone"][:2]]
    with torch.inference_mode():
        again = make_safety.first_stage(SHIPPED)(images)
    error = np.mean([(a.astype(float) - b) ** 2 for a, b in zip(images, again, strict=True)])
    assert again[0].dtype == np.uint8 and again[0].shape == (256, 256, 3)
    assert 0 < error < 60  # above 30 dB
    with pytest.raises(UserError, match=r"config\.yaml and model\.safetensors"):
        make_safety.first_stage(tmp_path)


def test_the_check_that_ships_finds_the_emblem_and_lets_lawful_pictures_pass() -> None:
    """Scenes that its making has not seen; rates as in models/shapes/README.md, with room for chance."""
    check = load_safety(SHIPPED)
    share = {}
    for name, scenes in make_safety.groups(100, seed=77).items():
        share[name] = np.mean([v.flagged for v in check([render(s) for s in scenes])])
    assert share[make_safety.EMBLEM + "alone"] >= 0.97 and share[make_safety.EMBLEM + "several"] >= 0.95
    assert np.mean([share[f"{make_safety.EMBLEM}beside a {shape}"] for shape in SHAPES]) >= 0.65
    lawful = {name: value for name, value in share.items() if not name.startswith(make_safety.EMBLEM)}
    assert len(lawful) == 5 and max(lawful.values()) <= 0.05, lawful
