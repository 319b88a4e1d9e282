from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.inference import output
from ldm.inference.output import OutputFolder, command_line, metadata_texts, parameters_text, read_metadata
from ldm.util import UserError

PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def record(**changes: Any) -> dict[str, Any]:
    made = {
        "prompt": "a red circle, \u00fcber a blue square",
        "negative_prompt": "green: all of it",
        "seed": 7,
        "options": {"steps": 20, "sampler": "ddim", "scale": 7.5, "W": 64, "H": 32, "ddim_eta": 0.0},
        "model": {"sha256": "0123456789abcdef", "ckpt": "some/model, v2.safetensors"},
        "batch": {"index": 0},
        "versions": {"ldm": "1"},
    }
    return made | changes


def test_numbers_go_on_after_the_highest(tmp_path: Path):
    folder = OutputFolder(tmp_path / "out")
    assert [folder.save_sample(PICTURE).name for _ in range(3)] == ["00000.png", "00001.png", "00002.png"]
    (tmp_path / "out/samples/00000.png").unlink()  # counting files would now give 00002 again
    (tmp_path / "out/samples/00041.jpg").write_bytes(b"")
    (tmp_path / "out/samples/notes-99.png").write_bytes(b"")
    assert folder.save_sample(PICTURE).name == "00042.png"
    assert [folder.save_grid(PICTURE).name for _ in range(2)] == ["grid-0000.png", "grid-0001.png"]


def test_numbers_beyond_the_digits(tmp_path: Path):
    folder = OutputFolder(tmp_path)
    (tmp_path / "samples/99999.png").write_bytes(b"")
    assert folder.save_sample(PICTURE).name == "100000.png"


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool):
    folder = OutputFolder(tmp_path)
    (tmp_path / "samples/00000.png").write_bytes(b"another's")
    monkeypatch.setattr(output, "_next_number", lambda folder, prefix: 0)  # as another process would have seen it
    if not links:
        monkeypatch.setattr(output.os, "link", _no_links)
    assert folder.save_sample(PICTURE).name == "00001.png"
    assert (tmp_path / "samples/00000.png").read_bytes() == b"another's"
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples/00001.png")), PICTURE)
    assert not list(tmp_path.rglob(".part-*"))


def _no_links(*args: Any) -> None:
    raise PermissionError(1, "no hard links here")


def test_a_full_disk_is_told_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = OutputFolder(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.os, "fsync", full)
    for attempt in (lambda: folder.check(100), lambda: folder.save_sample(PICTURE)):
        with pytest.raises(UserError, match=r"No space left on device; choose another by --outdir"):
            attempt()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_room_for_a_giant_picture_is_not_found_by_writing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[int] = []
    monkeypatch.setattr(output, "_MOST_TRIED", 100)
    whole = output._write_temporary
    monkeypatch.setattr(output, "_write_temporary", lambda folder, data: written.append(len(data)) or whole(folder, data))
    OutputFolder(tmp_path).check(1000)
    assert written == [100, 100] and not [p for p in tmp_path.rglob("*") if p.is_file()]
    with pytest.raises(UserError, match="No space left on device"):
        OutputFolder(tmp_path).check(2**62)


def test_text_that_is_no_unicode_is_kept(tmp_path: Path):
    """Bytes of a command line that are no UTF-8 come as lone surrogates."""
    path = OutputFolder(tmp_path).save_sample(PICTURE, metadata_texts(record(prompt="red \udcff")))
    text = Image.open(path).text  # type: ignore[attr-defined]
    assert json.loads(text[output.METADATA_KEY])["prompt"] == "red \udcff" and text["parameters"].startswith("red \\udcff\n")


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be made"):
        OutputFolder(tmp_path / "file" / "out")


def test_metadata_round_trip(tmp_path: Path):
    path = OutputFolder(tmp_path).save_sample(PICTURE, metadata_texts(record()))
    back = read_metadata(path)
    assert {key: back[key] for key in record()} == record()
    assert Image.open(path).text["parameters"] == parameters_text(record())  # type: ignore[attr-defined]


def test_parameters_read_like_those_of_other_programs():
    text = parameters_text(record(options={**record()["options"], "strength": 0.5, "ddim_eta": 0.25}))
    prompt, negative, last = text.split("\n")
    assert prompt == record()["prompt"] and negative == "Negative prompt: green: all of it"
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)  # the reader's rule of the A1111 web UI
    values = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}
    assert values == {
        "Steps": "20",
        "Sampler": "DDIM",
        "CFG scale": "7.5",
        "Seed": "7",
        "Size": "64x32",
        "Model hash": "0123456789",
        "Model": "model, v2",
        "Denoising strength": "0.5",
        "Eta": "0.25",
        "RNG": "CPU",
        "Version": "ldm 1",
    }


HUGE = '{"format": 1, "options": {"seed": 1' + 5000 * "0" + '}, "batch": 3}'
DEEP = '{"format": 1, "options": ' + 100_000 * "[" + 100_000 * "]" + ', "batch": {}}'


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "3",
        '{"format": 1}',
        '{"options": {}, "batch": {}}',
        '{"format": 1, "options": 3, "batch": {}}',
        '{"format": 99}',
        HUGE,
        DEEP,
    ],
    ids=lambda text: str(text)[:50],
)
def test_pictures_without_a_usable_record_are_refused(tmp_path: Path, text: str | None):
    path = OutputFolder(tmp_path).save_sample(PICTURE, {} if text is None else {"ldm_metadata": text})
    with pytest.raises(UserError, match=r"00000\.png"):
        read_metadata(path)
    with pytest.raises(UserError, match="does not exist"):
        read_metadata(tmp_path / "none.png")


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = OutputFolder(tmp_path).save_sample(PICTURE, metadata_texts(record()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"00000\.png' cannot be read: .*decompression bomb"):
        read_metadata(path)


def test_the_command_line_can_be_pasted():
    line = command_line("scripts/txt2img.py", {"prompt": 'it\'s "red"', "seed": 3, "skip_grid": True, "plms": False, "scale": -1.5})
    words = ["python", "scripts/txt2img.py", "--prompt", 'it\'s "red"', "--seed", "3", "--skip_grid", "--scale=-1.5"]
    assert shlex.split(line) == words


def test_what_other_programs_read_of_samplers_and_second_models():
    options = {"steps": 5, "sampler": "dpmpp_2m_karras", "scale": 3.0, "W": 8, "H": 8, "clip_skip": 2, "refiner_start": 0.8}
    record = {
        "prompt": "x",
        "seed": 1,
        "options": options,
        "model": {"sha256": "0" * 64, "ckpt": "m.safetensors"},
        "versions": {"ldm": "1"},
    }
    record |= {"vae": {"ckpt": "some/vae.safetensors"}, "refiner": {"ckpt": "refiner.safetensors"}}
    said = parameters_text(record)
    for pair in ("Sampler: DPM++ 2M", "Schedule type: Karras", "Clip skip: 2", "VAE: vae", "Refiner: refiner", "Refiner switch at: 0.8"):
        assert pair in said


def test_a_flag_of_several_numbers_is_one_flag():
    assert shlex.split(command_line("s.py", {"crop": [1, 2], "trust": ["a", "b"]})) == [
        "python", "s.py", "--crop", "1", "2", "--trust", "a", "--trust", "b",
    ]  # fmt: skip
