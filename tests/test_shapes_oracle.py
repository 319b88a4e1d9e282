"""The oracle: right on the truth, wrong on every single mistake, steady under noise and blur."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ldm.data import shapes
from ldm.data.shapes import Object, Scene, parse, render, sample_scene, spec_of
from ldm.metrics.shapes import CHECKS, judge, label_components, read_picture, score
from ldm.util import UserError


def truths(n: int, seed: int = 0) -> list[tuple[Scene, shapes.Spec]]:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, shapes.KINDS[i % 4], held_out=i % 5 == 0) for i in range(n)]
    return [(scene, spec_of(scene, rng)) for scene in scenes]


def blurred(image: np.ndarray) -> np.ndarray:
    """Binomial blur, sigma about 1 px."""
    out = np.pad(image.astype(np.float32), ((2, 2), (2, 2), (0, 0)), mode="edge")
    for axis in (0, 1):
        n = image.shape[axis]
        out = sum(w * np.take(out, range(k, k + n), axis) for k, w in enumerate(np.array([1, 4, 6, 4, 1]) / 16))
    return out


# --- right -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [256, 128])
def test_every_true_picture_is_correct(size: int) -> None:
    wrong = [judge(render(scene, size), spec).reasons for scene, spec in truths(400)]
    assert not any(wrong)


def test_true_pictures_stay_correct_under_noise_and_blur() -> None:
    rng = np.random.default_rng(1)
    found = []
    for scene, spec in truths(300, seed=2):
        image = blurred(render(scene)) + rng.normal(0, 5, (256, 256, 3))
        found.append(judge(np.clip(image, 0, 255).astype(np.uint8), spec).correct)
    assert np.mean(found) >= 0.98


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("radius", [24.0, 32.0, 44.0, 56.0])
def test_reading_measures_the_object(shape: str, radius: float) -> None:
    size = "large" if radius > 38 else "small"
    thing = Object(shape, "green", size, 101.4, 140.7, radius)
    (found,) = read_picture(render(Scene("single", "beige", (thing,)))).objects
    assert (found.shape, found.color, found.size) == (shape, "green", size)
    assert (found.cx, found.cy, found.radius) == pytest.approx((101.4, 140.7, radius), abs=1.2)
    assert found.iou > 0.8


@pytest.mark.parametrize("background", shapes.BACKGROUNDS)
@pytest.mark.parametrize("color", shapes.COLORS)
def test_every_color_is_told_on_every_background(background: str, color: str) -> None:
    reading = read_picture(render(Scene("single", background, (Object("ring", color, "small", 60.0, 60.0, 24.0),))))
    assert reading.background == background and [o.color for o in reading.objects] == [color]


def test_float_pictures_read_like_bytes() -> None:
    (scene, spec), *_ = truths(1)
    image = render(scene)
    assert judge(image / np.float32(127.5) - 1, spec) == judge(image, spec)


# --- wrong -----------------------------------------------------------------------------------------------------------

A = Object("circle", "red", "small", 70.0, 80.0, 28.0)
B = Object("square", "blue", "large", 180.0, 170.0, 50.0)
SCENE = Scene("relation", "white", (A, B), "left of")
SPEC = parse("a small red circle left of a large blue square on a white background")


def failed(scene: Scene, spec: shapes.Spec = SPEC) -> set[str]:
    verdict = judge(render(scene), spec)
    names = {name for name, passed in verdict.checks.items() if passed is False}
    assert verdict.correct == (not names) and len(verdict.reasons) == len(names)
    return names


def test_the_scene_itself_is_right() -> None:
    assert failed(SCENE) == set()
    assert failed(replace(SCENE, objects=(B, A))) == set()  # the order of drawing means nothing


@pytest.mark.parametrize(
    ("scene", "check"),
    [
        (replace(SCENE, background="beige"), "background"),
        (replace(SCENE, objects=(replace(A, color="orange"), B)), "color"),
        (replace(SCENE, objects=(replace(A, shape="ring"), B)), "shape"),
        (replace(SCENE, objects=(replace(A, radius=45.0), B)), "size"),
        (replace(SCENE, objects=(A, replace(B, radius=32.0))), "size"),
        (replace(SCENE, objects=(replace(A, cx=180.0, cy=60.0), replace(B, cx=75.0))), "relation"),
        (replace(SCENE, objects=(replace(A, cx=172.0, cy=60.0), B)), "relation"),  # by 8 px is not enough
        (replace(SCENE, objects=(A, B, replace(A, cx=200.0, cy=60.0))), "count"),
    ],
)
def test_each_mistake_fails_its_own_check(scene: Scene, check: str) -> None:
    assert failed(scene) == {check}


def test_swapped_colors_and_sizes_are_wrong() -> None:
    swapped = replace(SCENE, objects=(replace(A, color="blue"), replace(B, color="red")))
    assert not judge(render(swapped), SPEC).correct
    swapped = replace(SCENE, objects=(replace(A, radius=50.0), replace(B, radius=28.0)))
    assert "size" in failed(swapped)


def test_missing_object_fails_the_count_and_leaves_the_relation_open() -> None:
    verdict = judge(render(replace(SCENE, objects=(A,))), SPEC)
    assert verdict.checks["count"] is False and verdict.checks["relation"] is None and not verdict.correct


@pytest.mark.parametrize(("asked", "drawn"), [(2, 3), (3, 2), (4, 3), (3, 4)])
def test_counts_are_exact(asked: int, drawn: int) -> None:
    spots = [(60.0, 60.0), (190.0, 60.0), (60.0, 190.0), (190.0, 190.0)][:drawn]
    scene = Scene("count", "gray", tuple(replace(A, cx=x, cy=y) for x, y in spots))
    assert "count" in failed(scene, parse(f"{asked} red circles"))
    assert failed(scene, parse(f"{drawn} small red circles")) == set()


def test_one_odd_object_out_spoils_a_count() -> None:
    objects = (replace(A, cx=60.0), replace(A, cx=190.0, color="pink"))
    assert failed(Scene("count", "gray", objects), parse("two red circles")) == {"color"}


@pytest.mark.parametrize("relation", shapes.RELATIONS)
def test_all_relations_hold_and_fail(relation: str) -> None:
    rng = np.random.default_rng(4)
    scene = sample_scene(rng, "relation")
    while scene.relation != relation:
        scene = sample_scene(rng, "relation")
    spec = spec_of(scene, rng)
    assert failed(scene, spec) == set()
    assert failed(scene, replace(spec, parts=spec.parts[::-1])) == {"relation"}


def test_random_other_specs_are_wrong() -> None:
    pairs = truths(200, seed=9)
    right = [judge(render(a), spec).correct for (a, _), (_, spec) in zip(pairs, pairs[4:], strict=False)]
    assert np.mean(right) < 0.05


def test_touching_objects_and_blobs_have_no_shape() -> None:
    touching = Scene("pair", "white", (replace(A, cx=100.0), replace(A, cx=150.0, cy=85.0)))
    assert "count" in failed(touching, parse("two red circles"))
    blob = render(Scene("single", "white", ()))
    blob[60:100, 40:220] = shapes.COLORS["red"]  # a bar: the penalty for the aspect ratio rules the square out
    (found,) = read_picture(blob).objects
    assert found.shape is None


def test_specks_are_not_objects_and_noise_is_not_a_picture() -> None:
    image = render(SCENE)
    image[10:20, 230:240] = 0  # 100 px
    assert judge(image, SPEC).correct
    image[10:30, 220:240] = 0  # 400 px
    assert judge(image, SPEC).checks["count"] is False
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    assert not judge(noise, SPEC).correct
    assert not judge(np.full((256, 256, 3), 250, np.uint8), SPEC).correct


@pytest.mark.parametrize("image", [np.zeros((3, 256, 256), np.uint8), np.zeros((64, 32, 3), np.uint8), np.zeros((64, 64, 3), np.int64)])
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_picture(image)


# --- parts -----------------------------------------------------------------------------------------------------------


def flood_components(mask: np.ndarray) -> list[int]:
    """Areas of 8-connected components by plain flood fill."""
    left, areas = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        stack, area = [left.pop()], 0
        while stack:
            y, x = stack.pop()
            area += 1
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        areas.append(area)
    return sorted(areas)


@pytest.mark.parametrize("density", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_components_agree_with_flood_fill(density: float) -> None:
    mask = np.random.default_rng(6).random((40, 50)) < density
    labels, areas = label_components(mask)
    assert sorted(areas.tolist()) == flood_components(mask)
    assert np.array_equal(labels > 0, mask)
    assert np.bincount(labels.ravel(), minlength=len(areas) + 1)[1:].tolist() == areas.tolist()
    for k in range(1, len(areas) + 1):
        assert len(flood_components(labels == k)) == 1


# --- report ----------------------------------------------------------------------------------------------------------


def test_score_reports_by_kind_with_unseen_apart() -> None:
    records = shapes.evaluation_prompts(40) + shapes.unseen_prompts(8)
    blank = np.full((256, 256, 3), 250, np.uint8)
    images = []
    for k, r in enumerate(records):
        rng = np.random.default_rng(k)
        scene = sample_scene(rng, r.kind, held_out=r.unseen)
        images.append(render(scene))
        records[k] = replace(r, spec=spec_of(scene, rng))
    images[0] = images[4] = images[-1] = blank
    table = score(images, records)
    report = json.loads(json.dumps(table.to_dict()))
    assert report["kinds"]["single"] == {"correct": 8, "total": 10, "share": 0.8}
    assert report["overall"] == pytest.approx((0.8 + 3) / 4)
    assert report["unseen"] == {"correct": 7, "total": 8, "share": 7 / 8}
    assert report["wording"]["canonical"]["total"] + report["wording"]["paraphrased"]["total"] == 40
    assert set(report["checks"]) == set(CHECKS)
    assert report["checks"]["count"] == {"correct": 38, "total": 40, "share": 0.95}
    text = table.markdown()
    assert "| single | 8 | 10 | 80.0% |" in text and "| unseen combinations | 7 | 8 | 87.5% |" in text


def test_score_wants_one_picture_for_each_prompt() -> None:
    with pytest.raises(UserError, match="1 pictures for 2 prompts"):
        score([render(SCENE)], shapes.evaluation_prompts(2))
