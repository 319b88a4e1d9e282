"""The shapes world: geometry, balance, captions and their grammar, and the data set."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data import shapes
from ldm.data.shapes import Part, ShapesDataset, Spec, caption, parse, render, sample_scene, spec_of
from ldm.data.shapes_text import BACKGROUND_FORMS, RELATION_WORDS, SIZE_WORDS
from ldm.data.shapes_world import HALF_WIDTHS, INVERSE, OUTLINES
from ldm.util import ConfigError, UserError


@pytest.fixture(scope="module")
def scenes() -> list[shapes.Scene]:
    rng = np.random.default_rng(7)
    return [sample_scene(rng) for _ in range(6000)]


def off_background(scene: shapes.Scene) -> np.ndarray:
    """Pixels that show anything but the background."""
    return (render(scene) != np.array(shapes.BACKGROUNDS[scene.background], np.uint8)).any(-1)


# --- outlines and pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_outline_fills_its_bounding_box(shape: str) -> None:
    grid = np.linspace(-1.3, 1.3, 2601, dtype=np.float32)
    inside = OUTLINES[shape](grid[None], grid[:, None]) <= 0
    xs, ys = grid[inside.any(0)], grid[inside.any(1)]
    assert [ys[0], ys[-1]] == pytest.approx([-1, 1], abs=0.006)
    assert [xs[0], xs[-1]] == pytest.approx([-HALF_WIDTHS[shape], HALF_WIDTHS[shape]], abs=0.01)
    assert (inside == inside[:, ::-1]).mean() > 0.999  # upright and symmetric


@pytest.mark.parametrize(
    ("shape", "area"),  # of the shape with half-height 1
    [
        ("circle", np.pi),
        ("square", 4),
        ("triangle", 2),
        ("diamond", 1.5),
        ("ring", np.pi * (1 - 0.55**2)),
        ("cross", 4 * 0.68 - 0.68**2),
        ("star", 1.1226 * 1.10557**2),  # a pentagram of circumradius 1 covers 1.1226
    ],
)
def test_rendered_area_is_the_area_of_the_shape(shape: str, area: float) -> None:
    scene = shapes.Scene("single", "black", (shapes.Object(shape, "red", "large", 128.3, 127.6, 50.0),))
    red = (render(scene)[..., 0].astype(float) - 15) / (220 - 15)
    assert red.sum() == pytest.approx(area * 50.0**2, rel=0.01)


def test_render_is_palette_exact_and_scales() -> None:
    scene = shapes.Scene("single", "beige", (shapes.Object("square", "blue", "large", 128.0, 128.0, 50.0),))
    image = render(scene)
    assert image.dtype == np.uint8 and image.shape == (256, 256, 3)
    assert tuple(image[0, 0]) == shapes.BACKGROUNDS["beige"] and tuple(image[128, 128]) == shapes.COLORS["blue"]
    small = image.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(render(scene, 128) - small).max() <= 1


def test_edges_are_anti_aliased() -> None:
    scene = shapes.Scene("single", "black", (shapes.Object("circle", "red", "large", 128.0, 128.0, 50.0),))
    assert len(np.unique(render(scene)[..., 0])) > 20


def test_objects_keep_apart_and_off_the_border(scenes: list[shapes.Scene]) -> None:
    rng = np.random.default_rng(3)
    crowded = [sample_scene(rng, "count") for _ in range(200)]
    for scene in scenes[:200] + crowded:
        masks = [off_background(shapes.Scene("single", scene.background, (o,))) for o in scene.objects]
        boxes = [(np.flatnonzero(m.any(0))[[0, -1]], np.flatnonzero(m.any(1))[[0, -1]]) for m in masks]
        for xs, ys in boxes:
            assert min(xs[0], ys[0]) >= 5 and max(xs[1], ys[1]) <= 250  # a soft edge may reach one pixel out
        for (ax, ay), (bx, by) in combinations(boxes, 2):
            gaps = [bx[0] - ax[1], ax[0] - bx[1], by[0] - ay[1], ay[0] - by[1]]
            assert max(gaps) - 1 >= 4  # six, less a soft edge on both sides


def test_flip_mirrors_the_picture_and_the_relation(scenes: list[shapes.Scene]) -> None:
    for scene in scenes[:60]:
        mirrored = shapes.flip(scene)
        difference = render(mirrored).astype(int) - render(scene)[:, ::-1]
        assert np.abs(difference).max() <= 1
        horizontal = scene.relation in ("left of", "right of")
        assert mirrored.relation == (INVERSE[scene.relation] if horizontal else scene.relation)


# --- what scenes are drawn -------------------------------------------------------------------------------------------


def shares(values: list) -> dict:
    return {k: n / len(values) for k, n in Counter(values).items()}


def test_every_slot_is_balanced(scenes: list[shapes.Scene]) -> None:
    looks = [o for s in scenes for o in (s.objects[:1] if s.kind == "count" else s.objects)]
    slots = {
        shapes.KINDS: [s.kind for s in scenes],
        tuple(shapes.BACKGROUNDS): [s.background for s in scenes],
        shapes.RELATIONS: [s.relation for s in scenes if s.relation],
        (2, 3, 4): [len(s.objects) for s in scenes if s.kind == "count"],
        tuple(shapes.COLORS): [o.color for o in looks],
        shapes.SHAPES: [o.shape for o in looks],
        tuple(shapes.SIZES): [o.size for o in looks],
    }
    for options, values in slots.items():
        found = shares(values)
        spread = 4.5 * np.sqrt(len(options) / len(values))  # in units of the even share
        assert set(found) == set(options)
        assert all(abs(v * len(options) - 1) < spread for v in found.values()), found


def test_four_large_objects_always_fit_and_stay_large() -> None:
    rng = np.random.default_rng(5)
    counts = [s for s in (sample_scene(rng, "count") for _ in range(1500)) if len(s.objects) == 4]
    assert shares([s.objects[0].size for s in counts])["large"] == pytest.approx(0.5, abs=0.1)
    radii = [o.radius for s in counts for o in s.objects if o.size == "large"]
    assert min(radii) >= 44 and max(radii) <= 56 and np.mean(radii) == pytest.approx(50, abs=0.6)
    positions = np.array([(o.cx, o.cy) for s in counts for o in s.objects])
    assert positions.mean(0) == pytest.approx([128, 128], abs=5)


def test_held_out_combinations_show_only_when_asked_for(scenes: list[shapes.Scene]) -> None:
    assert not any(s.held_out for s in scenes)
    assert shares([(o.color, o.shape) for s in scenes for o in s.objects]).keys() == {
        (c, s) for c in shapes.COLORS for s in shapes.SHAPES
    } - set(shapes.HELD_OUT)
    rng = np.random.default_rng(0)
    unseen = [sample_scene(rng, held_out=True) for _ in range(400)]
    assert all(s.held_out for s in unseen)
    assert {(o.color, o.shape) for s in unseen for o in s.objects if o.held_out} == shapes.HELD_OUT


def test_kinds_mean_what_they_say(scenes: list[shapes.Scene]) -> None:
    for scene in scenes:
        looks = [(o.color, o.shape, o.size) for o in scene.objects]
        if scene.kind == "single":
            assert len(looks) == 1
        elif scene.kind == "count":
            assert len(looks) in (2, 3, 4) and len(set(looks)) == 1
        else:
            assert len(looks) == 2 and looks[0][:2] != looks[1][:2]
        if scene.relation:
            a, b = scene.objects if scene.relation in ("left of", "above") else scene.objects[::-1]
            if scene.relation in ("left of", "right of"):
                assert a.cx + a.half_width + 5.999 <= b.cx - b.half_width
            else:
                assert a.cy + a.radius + 5.999 <= b.cy - b.radius


def test_sampling_is_deterministic() -> None:
    draw = lambda seed: [sample_scene(np.random.default_rng([seed, i])) for i in range(50)]  # noqa: E731
    assert draw(1) == draw(1) and draw(1) != draw(2)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match="single, count, pair, relation"):
        sample_scene(np.random.default_rng(0), "triple")


# --- captions --------------------------------------------------------------------------------------------------------

CIRCLE, STAR = Part("circle", "red", "small"), Part("star", "orange")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (Spec("single", (STAR,)), "an orange star"),
        (Spec("single", (Part("star", "orange", "small"),), background="gray"), "a small orange star on a gray background"),
        (Spec("count", (Part("cross", "red"),), 3), "three red crosses"),
        (Spec("count", (CIRCLE,), 2, background="white"), "two small red circles on a white background"),
        (Spec("pair", (CIRCLE, STAR), 2), "a small red circle and an orange star"),
        (Spec("relation", (CIRCLE, STAR), 2, "left of", "black"), "a small red circle left of an orange star on a black background"),
    ],
)  # fmt: skip
def test_canonical_captions(spec: Spec, text: str) -> None:
    assert caption(spec) == text
    assert parse(text) == spec


def test_parse_reads_every_caption_back() -> None:
    rng = np.random.default_rng(11)
    for k in range(4000):
        spec = spec_of(sample_scene(rng, held_out=k % 4 == 0), rng)
        assert parse(caption(spec)) == spec
        text = caption(spec, rng)
        assert parse(text).normalised() == spec.normalised(), text


def test_paraphrases_use_every_word() -> None:
    rng = np.random.default_rng(2)
    said = [caption(spec_of(sample_scene(rng), rng), rng) for _ in range(4000)]
    low = [t.lower() for t in said]
    words = [w for group in (*SIZE_WORDS.values(), *RELATION_WORDS.values()) for w in group]
    words += [form.format("", "").split("  ")[0].strip(" ,") for form in BACKGROUND_FORMS]
    for word in [*words, "grey", "2 ", "3 ", "4 ", " & ", "one ", "the "]:
        assert any(word in t for t in low), word
    assert any(t.isupper() for t in said) and any(t.islower() for t in said) and any(t.endswith(".") for t in said)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("A red circle, white background", "a red circle on a white background"),
        ("on a grey background, 2 big blue hearts", "two large blue hearts on a gray background"),
        ("a little red circle to the left of a blue square", "a blue square right of a small red circle"),
        ("Red circle beneath blue square.", "a blue square above a red circle"),
        ("a blue square & a red circle", "a red circle and a blue square"),
        ("a red circle and a red circle", "two red circles"),
        ("a drawing of one tiny pink star", "a small pink star"),
        ("red small circle", "a small red circle"),
    ],
)
def test_people_type_it_differently(text: str, same: str) -> None:
    assert parse(text).normalised() == parse(same).normalised()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("a cat", "'cat' is not understood"),
        ("a black circle", "backgrounds only"),
        ("red circles", "needs a number"),
        ("a circle", "names no color"),
        ("a red", "names no shape"),
        ("two red circles and a blue square", "cannot be joined"),
        ("a red circle, a blue square and a pink star", "more than two"),
        ("five red circles", "'five'"),
        ("a red circle on a purple background", "'on' after 'circle'"),
    ],
)
def test_text_outside_the_grammar_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        parse(text)
    assert "\n" not in str(error.value) and "write for example" in str(error.value)


def test_swapped_relation_is_another_demand() -> None:
    one, other = parse("a red circle above a blue square"), parse("a blue square above a red circle")
    assert one.normalised() != other.normalised()


# --- data set --------------------------------------------------------------------------------------------------------


def test_items_have_the_agreed_form_and_repeat() -> None:
    data, again = ShapesDataset(size=20, seed=3), ShapesDataset(size=20, seed=3)
    item = data[5]
    assert item["image"].shape == (256, 256, 3) and item["image"].dtype == np.float32
    assert item["image"].min() >= -1 and item["image"].max() <= 1
    assert np.array_equal(np.rint((item["image"] + 1) * 127.5), render(data.scene(5)))
    assert item["caption"] == data.caption_for(5) == again[5]["caption"]
    assert np.array_equal(item["image"], again[5]["image"])
    assert data.scene(5) != ShapesDataset(size=20, seed=4).scene(5)
    with pytest.raises(IndexError):
        data[20]


def test_captions_tell_what_the_scene_shows() -> None:
    data = ShapesDataset(size=300, paraphrase=1.0, flip=True)
    for i in range(len(data)):
        scene, spec = data.scene(i), parse(data.caption_for(i))
        assert (spec.kind, spec.count) == (scene.kind, len(scene.objects))
        assert spec.background in (None, scene.background)
        assert {(p.color, p.shape) for p in spec.parts} == {(o.color, o.shape) for o in scene.objects}


def test_epoch_changes_captions_only() -> None:
    data = ShapesDataset(size=40, image_size=64)
    before = [data[i] for i in range(40)]
    data.set_epoch(1)
    after = [data[i] for i in range(40)]
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(before, after, strict=True))
    assert sum(a["caption"] != b["caption"] for a, b in zip(before, after, strict=True)) > 20
    assert [data.caption_for(i, epoch=0) for i in range(40)] == [b["caption"] for b in before]


def test_epoch_reaches_workers_that_already_run() -> None:
    data = ShapesDataset(size=16, image_size=32)
    loader = DataLoader(data, batch_size=16, num_workers=1, persistent_workers=True)
    first = next(iter(loader))
    data.set_epoch(1)
    second = next(iter(loader))
    assert first["image"].shape == (16, 32, 32, 3) and first["image"].dtype == torch.float32
    assert torch.equal(first["image"], second["image"])
    assert second["caption"] == [data.caption_for(i, epoch=1) for i in range(16)] != first["caption"]


def test_options_of_the_data_set() -> None:
    assert {ShapesDataset(size=30, kinds=["pair"]).scene(i).kind for i in range(30)} == {"pair"}
    assert all(ShapesDataset(size=30, held_out=True).scene(i).held_out for i in range(30))
    assert not any(ShapesDataset(size=300).scene(i).held_out for i in range(300))
    plain = ShapesDataset(size=50, paraphrase=0.0)
    assert all(t == caption(parse(t)) for t in map(plain.caption_for, range(50)))
    other = ShapesDataset(size=50, paraphrase=0.0, caption_seed_offset=1)
    assert [plain.caption_for(i) for i in range(50)] != [other.caption_for(i) for i in range(50)]


def test_crop_is_a_window_of_the_picture() -> None:
    data = ShapesDataset(size=5, crop=128)
    for i in range(5):
        whole, part = render(data.scene(i)), np.rint((data[i]["image"] + 1) * 127.5).astype(np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(whole[..., 0], (128, 128))
        assert part.shape == (128, 128, 3)
        assert any(np.array_equal(w, part[..., 0]) for row in windows for w in row)


def test_wrong_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"crop 300.*paraphrase 2.*kinds"):
        ShapesDataset(crop=300, paraphrase=2, kinds=["triple"])


# --- prompts for evaluation ------------------------------------------------------------------------------------------


def test_evaluation_prompts_are_balanced_and_seen() -> None:
    records = shapes.evaluation_prompts(240)
    assert records == shapes.evaluation_prompts(240) != shapes.evaluation_prompts(240, seed=1)
    assert Counter(r.kind for r in records) == dict.fromkeys(shapes.KINDS, 60)
    assert sum(r.paraphrased for r in records) == 80
    assert len({r.prompt for r in records}) == 240
    for r in records:
        assert parse(r.prompt).normalised() == r.spec.normalised()
        assert (r.prompt == caption(r.spec)) != r.paraphrased
        assert r.kind == r.spec.kind and not r.unseen
        assert not {(p.color, p.shape) for p in r.spec.parts} & shapes.HELD_OUT


def test_unseen_prompts_cover_every_held_out_combination() -> None:
    records = shapes.unseen_prompts(64)
    assert all(r.unseen and {(p.color, p.shape) for p in r.spec.parts} & shapes.HELD_OUT for r in records)
    assert Counter(r.kind for r in records) == dict.fromkeys(shapes.KINDS, 16)
    named = Counter((p.color, p.shape) for r in records for p in r.spec.parts if (p.color, p.shape) in shapes.HELD_OUT)
    assert named == dict.fromkeys(shapes.HELD_OUT, 8)
    mixed = shapes.evaluation_prompts(120, held_out_share=0.25)
    assert sum(r.unseen for r in mixed) == pytest.approx(30, abs=4)
