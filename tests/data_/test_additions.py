"""What is added to items: masks, small copies, labels; and the data set that adds them."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import Dataset

from ldm.data.laion import AddMask as PublishedMask
from ldm.data.loading import ResumableLoader, seeded
from ldm.data.masks import KINDS, AddMask, random_mask
from ldm.data.shapes import ShapesDataset
from ldm.data.wrappers import AddLabelFromCaption, AddLowResolution, WrappedItems
from ldm.util import ConfigError

SHAPES = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 6, "image_size": 48, "seed": 4}}
MASKED = {"target": "ldm.data.masks.AddMask"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(64, 64), (40, 96), (9, 7)])
def test_masks_are_binary_and_of_the_wanted_area(kind, size):
    for seed in range(20):
        mask = random_mask(np.random.default_rng(seed), *size, {kind: 1.0}, (0.1, 0.5))
        assert mask.shape == (*size, 1) and mask.dtype == np.float32 and set(np.unique(mask)) <= {0.0, 1.0}
        share = mask.mean()
        assert share == 1 if kind == "whole" else 0.1 - 2 / min(size) <= share <= 0.5


def test_an_area_that_no_stroke_has_becomes_a_box():
    mask = random_mask(np.random.default_rng(0), 64, 64, {"boxes": 1.0}, (0.9, 0.95))[..., 0]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all() and 0.85 < mask.mean() <= 0.95


def test_kinds_come_as_often_as_asked():
    whole = [bool(random_mask(np.random.default_rng(i), 16, 16, {"boxes": 3, "whole": 1}).all()) for i in range(400)]
    assert 70 < sum(whole) < 130


def test_strokes_differ_and_are_no_boxes():
    masks = [random_mask(np.random.default_rng(i), 64, 64, {"strokes": 1}) for i in range(8)]
    assert len({mask.tobytes() for mask in masks}) == 8
    assert any(len({tuple(row) for row in mask[..., 0]}) > 12 for mask in masks), "round ends give many different rows"


def test_the_masked_image_is_gray_under_the_mask():
    item = ShapesDataset(size=1, image_size=64)[0]
    with seeded(3):
        made = AddMask()(item)
    hole = made["mask"][..., 0] == 1
    assert 0 < hole.mean() < 1 and (made["masked_image"][hole] == 0).all()
    assert np.array_equal(made["masked_image"][~hole], item["image"][~hole]) and made["masked_image"].dtype == np.float32
    assert set(made) == {"image", "caption", "mask", "masked_image"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": {"stroke": 1}}, "kinds of masks are strokes, boxes, whole, not stroke"),
        ({"kinds": {"boxes": 0}}, "one of them above 0"),
        ({"area": [0.5, 0.2]}, "smallest and the largest share"),
    ],
)
def test_wrong_masks(options, message):
    with pytest.raises(ConfigError, match=message):
        AddMask(**options)


def test_masks_by_the_published_name():
    item = {"jpg": ShapesDataset(size=1, image_size=64)[0]["image"]}
    areas = {}
    for mode in ("512narrow", "512train", "512train-large"):
        masks = []
        for i in range(40):
            with seeded(i):
                masks.append(PublishedMask(mode)(item)["mask"].mean())
        areas[mode] = np.mean(masks)
    assert areas["512narrow"] < areas["512train"] < areas["512train-large"]
    with seeded(0):
        assert PublishedMask("256train", p_drop=1.0)(item)["mask"].all()
    with pytest.raises(ConfigError, match="mode '512' is unknown; it is one of 256train"):
        PublishedMask("512")
    with pytest.raises(ConfigError, match="p_drop"):
        PublishedMask("512train", p_drop=2)


def test_small_copies():
    item = ShapesDataset(size=1, image_size=64)[0]
    small = AddLowResolution(downscale_f=4, key="lr")(item)["lr"]
    assert small.shape == (16, 16, 3) and small.dtype == np.float32 and -1 <= small.min() < small.max() <= 1
    average = item["image"].reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(AddLowResolution(4, "pil_box")(item)["LR_image"] - average).max() < 0.01
    with pytest.raises(ConfigError, match="cannot be divided by downscale_f 5"):
        AddLowResolution(5)(item)
    with pytest.raises(ConfigError, match=r"no picture .* under 'jpg'; it has caption, image"):
        AddLowResolution(4, image_key="jpg")(item)


def test_labels_out_of_captions():
    add = AddLabelFromCaption(["red", "blue"])
    item = add({"caption": "a blue ring"})
    assert item["class_label"] == 1 and item["human_label"] == "blue"
    for caption in ("a ring", "a red and a blue ring"):
        with pytest.raises(ConfigError, match=r"has \d of the names red, blue, not one"):
            add({"caption": caption})


# ---------------------------------------------------------------------- the data set
def test_items_are_a_function_of_seed_epoch_and_index():
    def masks(seed=0, epoch=0, **options):
        data = WrappedItems(SHAPES, MASKED, seed=seed, **options)
        data.set_epoch(epoch)
        return [data[i]["mask"].tobytes() for i in range(len(data))]

    first = masks()
    np.random.seed(1)
    assert masks() == first and len(set(first)) == 6
    assert masks(epoch=1) != first and masks(seed=1) != first
    assert masks(epoch=1, fixed=True) == first
    data = WrappedItems(SHAPES, MASKED)
    assert data[-1]["mask"].tobytes() == first[-1]
    with pytest.raises(IndexError):
        data[6]


def test_the_outer_generator_is_left_alone():
    data = WrappedItems(SHAPES, MASKED)
    np.random.seed(5)
    expected = np.random.random()
    np.random.seed(5)
    data[0]
    assert np.random.random() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_workers(workers):
    loader = ResumableLoader(WrappedItems(SHAPES, MASKED, seed=3), 2, shuffle=True, seed=1, num_workers=workers)
    epochs = [[batch["mask"].numpy().tobytes() for batch in loader] for _ in range(2)]
    reference = ResumableLoader(WrappedItems(SHAPES, MASKED, seed=3), 2, shuffle=True, seed=1)
    assert epochs == [[batch["mask"].numpy().tobytes() for batch in reference] for _ in range(2)]


def test_what_the_data_set_says_of_itself_goes_on():
    class Buckets(Dataset):
        bucket_of = np.array([0, 1])
        epoch = None

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return {"image": np.zeros((8, 8, 3), np.float32)}

        def set_epoch(self, epoch):
            self.epoch = epoch

    inner = Buckets()
    data = WrappedItems(inner, [AddLowResolution(2), {"target": "ldm.data.masks.AddMask"}])
    data.set_epoch(7)
    assert data.bucket_of is inner.bucket_of and inner.epoch == 7 and len(data) == 2
    assert set(data[0]) == {"image", "LR_image", "mask", "masked_image"}


def test_something_that_adds_nothing():
    with pytest.raises(ConfigError, match="additions: int cannot be called"):
        WrappedItems(SHAPES, [3])
