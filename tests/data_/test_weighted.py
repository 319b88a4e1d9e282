"""Some items more often than others."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ldm.data.latents import CachedLatents
from ldm.data.shapes import ShapesDataset
from ldm.data.weighted import WeightedDataset
from ldm.util import ConfigError, instantiate_from_config, trust

SHAPES = {"target": "ldm.data.shapes.ShapesDataset", "params": {"size": 60, "image_size": 64, "seed": 3}}


def weighted(**params):
    return instantiate_from_config({"target": "ldm.data.weighted.WeightedDataset", "params": {"dataset": SHAPES, "key": "kind", **params}})


def test_items_come_as_often_as_their_weight_says():
    plain = ShapesDataset(size=60, image_size=64, seed=3)
    kinds = Counter(plain.scene(i).kind for i in range(60))
    assert Counter(plain.facts(i)["kind"] for i in range(60)) == kinds
    data = weighted(weights={"relation": 3, "count": 2, "single": 0})
    assert len(data) == 3 * kinds["relation"] + 2 * kinds["count"] + kinds["pair"]
    counted = Counter(int(i) for i in data.index)
    for i in range(60):
        assert counted[i] == {"relation": 3, "count": 2, "pair": 1, "single": 0}[plain.scene(i).kind]
    np.testing.assert_array_equal(data[len(data) - 1]["image"], plain[int(data.index[-1])]["image"])
    assert len(weighted(weights={"pair": 2}, default=0)) == 2 * kinds["pair"]


def test_captions_change_with_the_epoch():
    data = weighted(weights={"relation": 2})
    before = [data[i]["caption"] for i in range(20)]
    data.set_epoch(1)
    assert before != [data[i]["caption"] for i in range(20)]


def test_buckets_go_along():
    class Bucketed(ShapesDataset):
        bucket_of = np.arange(60) % 2

    data = WeightedDataset(Bucketed(size=60, image_size=64, seed=3), "kind", {"single": 0})
    np.testing.assert_array_equal(data.bucket_of, data.index % 2)


def test_the_facts_of_cached_latents_are_those_of_their_data_set(tmp_path):
    trust("tests")
    (tmp_path / "vae").write_text("2.0")
    first = {"target": "tests.data_.test_general.Half", "params": {"ckpt_path": str(tmp_path / "vae")}}
    cached = CachedLatents(SHAPES, first, str(tmp_path), workers=0, device="cpu")
    data = WeightedDataset(cached, "kind", {"relation": 1}, default=0)
    assert len(data) and {data[i]["kind"] for i in range(len(data))} == {"relation"} and data[0]["z"].ndim == 3


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"weights": {"relation": -1}}, "whole number from 0"),
        ({"weights": {"relation": 1.5}}, "whole number from 0"),
        ({"weights": {"relatoin": 2}}, "no item has kind relatoin; the data set has count, pair, relation, single"),
        ({"weights": {}, "default": 0}, "leave no item"),
        ({"key": "colour", "weights": {}}, "no fact 'colour'; it has kind"),
        ({"dataset": {"target": "torch.utils.data.StackDataset", "params": {"x": [1, 2]}}, "weights": {}}, "tells no facts"),
    ],
)
def test_what_cannot_be_weighted_is_said(params, words):
    with pytest.raises(ConfigError, match=words):
        weighted(**params)
