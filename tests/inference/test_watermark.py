from __future__ import annotations

import numpy as np
import pytest

from ldm.data.shapes import render, sample_scene
from ldm.inference.watermark import LEGACY_TEXT, Watermarker, check_text, decode, detect
from ldm.util import UserError


def scenes(n: int) -> list[np.ndarray]:
    """Flat pictures, all four backgrounds: the hard case for a watermark."""
    rng = np.random.default_rng(3)
    return [render(sample_scene(rng)) for _ in range(n)]


def test_the_default_mark_reads_back_from_every_flat_scene():
    mark = Watermarker()
    for image in scenes(12):
        marked = mark(image)
        found = detect(marked.image)
        assert marked.status == "ok" and found is not None
        assert (found.method, found.text) == ("dwtDctSvd", "LDM1")
        assert marked.image.dtype == np.uint8 and marked.image.shape == image.shape


def test_colours_stay_where_they_are():
    """Swapped channels would move the means of a red picture by 180 levels; the mark itself moves them by 4 at most."""
    for image in [np.full((256, 256, 3), (220, 40, 40), np.uint8), *scenes(6)]:
        marked = Watermarker()(image).image
        assert np.abs(marked.mean((0, 1)) - image.mean((0, 1))).max() < 4
        assert np.abs(marked.astype(int) - image).max() <= 16


def test_edges_stay_clean_where_the_library_smears_them():
    from imwatermark import WatermarkEncoder

    image = scenes(1)[0]
    encoder = WatermarkEncoder()
    encoder.set_watermark("bytes", check_text("dwtDctSvd", None))
    theirs = encoder.encode(image[:, :, ::-1].copy(), "dwtDctSvd")[:, :, ::-1]
    ours = Watermarker()(image).image
    errors = [np.square(marked.astype(float) - image).mean() for marked in (ours, theirs)]
    assert errors[0] < 0.7 * errors[1]
    assert decode(ours, "dwtDctSvd", 6) == decode(theirs, "dwtDctSvd", 6)


@pytest.mark.parametrize("level", [0, 255])
def test_pure_white_and_black_are_given_room(level: int):
    marked = Watermarker()(np.full((256, 256, 3), level, np.uint8))
    assert marked.status == "ok" and detect(marked.image) is not None


def test_a_picture_without_a_mark_has_none():
    assert [detect(image) for image in scenes(6)] == [None] * 6


def test_another_text_is_read_without_knowing_it():
    found = detect(Watermarker(text="ab")(scenes(1)[0]).image)
    assert found is not None and found.text == "ab"


def test_the_originals_mark_by_flag():
    noise = np.random.default_rng(0).normal(128, 40, (256, 256, 3)).clip(20, 235).astype(np.uint8)
    marked = Watermarker("dwtDct")(noise).image
    assert not np.array_equal(marked, noise)
    found = detect(marked)
    assert found is not None and found.text == LEGACY_TEXT and found.agreement >= 0.9


def test_an_unreadable_mark_is_reported():
    white = np.full((256, 256, 3), 250, np.uint8)
    assert Watermarker("dwtDct")(white).status == "unreadable"  # dwtDct has nothing to hold on to in a flat picture


def test_small_pictures_are_left_alone():
    small = scenes(1)[0][:255, :255].copy()
    marked = Watermarker()(small)
    assert marked.status == "too small" and np.array_equal(marked.image, small)
    assert detect(small) is None
    assert Watermarker("none")(small).status == "none"


def test_the_payload_is_48_bits_with_a_checksum():
    assert len(check_text("dwtDctSvd", None)) == 6
    assert check_text("dwtDct", None) == b"StableDiffusionV1"
    assert decode(Watermarker()(scenes(1)[0]).image, "dwtDctSvd", 6) == check_text("dwtDctSvd", "LDM1")


@pytest.mark.parametrize(
    ("method", "text"), [("dwtDctSvd", "toolong"), ("dwtDctSvd", ""), ("dwtDctSvd", "\u00e9"), ("dwtDct", "x" * 40), ("rivaGan", None)]
)
def test_what_cannot_be_embedded_is_refused(method: str, text: str | None):
    with pytest.raises(UserError):
        check_text(method, text)
