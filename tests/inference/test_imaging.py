from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.imaging import fit_image, from_uint8, image_grid, legal_neighbours, load_image, nearest_legal, to_tensor, to_uint8
from ldm.inference.conditions import binary_mask
from ldm.inference.tasks.inpaint import load_mask
from ldm.util import UserError


def test_every_level_survives_the_round_trip():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert np.array_equal(to_uint8(to_tensor(levels))[0], levels)
    assert from_uint8(levels).min() == -1.0 and from_uint8(levels).max() == 1.0


def test_values_outside_the_range_are_clamped_and_the_rest_rounded():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 5)
    assert to_uint8(x)[0, :, 0].tolist() == [0, 0, 128, 255, 255]  # 127.5 rounds to even


def test_grid_is_filled_row_by_row_and_padded_with_black():
    tiles = [np.full((4, 6, 3), 10 * (i + 1), np.uint8) for i in range(5)]
    grid = image_grid(tiles, columns=3)
    assert grid.shape == (2 * (4 + 2) + 2, 3 * (6 + 2) + 2, 3)
    assert grid[2, 2, 0] == 10 and grid[2, 2 + 2 * 8, 0] == 30 and grid[2 + 6, 2, 0] == 40 and grid[2 + 6, 2 + 2 * 8, 0] == 0


def test_pictures_of_several_sizes_share_a_grid():
    grid = image_grid([np.full((4, 6, 3), 10, np.uint8), np.full((8, 2, 3), 20, np.uint8)], columns=2)
    assert grid.shape == (8 + 4, 2 * (6 + 2) + 2, 3)
    assert grid[2:6, 2:8].min() == 10 and grid[2:10, 10:12].min() == 20
    assert grid.astype(int).sum() == 3 * (24 * 10 + 16 * 20)


def test_a_grid_is_no_wider_than_its_pictures():
    assert image_grid([np.zeros((4, 4, 3), np.uint8)], columns=8).shape == (8, 8, 3)


@pytest.mark.parametrize(("size", "near"), [(250, (192, 256)), (256, (256,)), (3, (64,)), (-5, (64,)), (0, (64,))])
def test_legal_neighbours(size, near):
    assert legal_neighbours(size, 64) == near


def test_nearest_legal():
    assert [nearest_legal(n, 64) for n in (1, 96, 97, 500)] == [64, 64, 128, 512]


def test_exif_rotation_is_obeyed(tmp_path: Path):
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (0, 0, 20, 20))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to show
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0) and upright.getpixel((10, 35)) == (255, 255, 255)


def test_transparency_is_laid_on_white(tmp_path: Path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png", transparency=3)
    for name in ("clear.png", "palette.png"):
        assert load_image(tmp_path / name).getpixel((4, 4)) == (255, 255, 255)


def test_what_is_transparent_in_a_mask_is_kept(tmp_path: Path):
    strokes = np.zeros((8, 8, 4), np.uint8)
    strokes[2:5, 3:6] = 255  # white strokes on a layer of their own
    Image.fromarray(strokes).save(tmp_path / "strokes.png")
    assert np.array_equal(binary_mask(np.asarray(load_mask(str(tmp_path / "strokes.png")))), strokes[..., 3] == 255)


def test_sixteen_bit_gray_is_scaled(tmp_path: Path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_picture_is_told_in_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.png") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_picture_a_folder_and_nothing_are_told(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    for name, words in (("cut.png", "damaged"), (".", "folder"), ("none.png", "does not exist")):
        with pytest.raises(UserError, match=words):
            load_image(tmp_path / name)


def test_fit_modes():
    wide = Image.new("RGB", (200, 100), "white")
    wide.paste("red", (50, 0, 150, 100))  # the middle square
    crop, pad, stretch = (fit_image(wide, 64, 64, mode) for mode in ("crop", "pad", "stretch"))
    assert crop.size == pad.size == stretch.size == (64, 64)
    assert crop.getpixel((8, 32)) == (255, 0, 0)
    assert pad.getpixel((32, 2)) == (128, 128, 128)
    assert stretch.getpixel((2, 32)) == (255, 255, 255) and stretch.getpixel((32, 32)) == (255, 0, 0)
    with pytest.raises(UserError, match="crop, pad, stretch"):
        fit_image(wide, 64, 64, "tile")
