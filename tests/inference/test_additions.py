"""--lora and --embedding from the command line to the picture's record, and from there to the same picture again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.inference.additions import check_additions, check_word, embedding_spec, lora_spec, moved, split_spec
from ldm.inference.checkpoint import read_state_dict
from ldm.inference.cli import main
from ldm.inference.output import read_metadata
from ldm.inference.weights.embedding_files import Embedding, write_embedding
from ldm.inference.weights.lora_files import write_lora
from ldm.modules.lora import LowRank
from ldm.util import UserError


@pytest.fixture
def files(tmp_path: Path, tiny_ckpt: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two LoRAs and a word for the tiny model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    state = read_state_dict(tiny_ckpt)
    generator = torch.Generator().manual_seed(0)
    for file, scale in (("one.safetensors", 0.5), ("two.safetensors", -0.5)):
        layers = {}
        for name in (n for n in state if ".attn2.to_" in n and n.endswith(".weight")):
            rows, columns = state[name].shape
            down, up = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
            layers[name] = LowRank(down, scale * up)
        write_lora(file, layers, state)
    write_embedding("mine.safetensors", Embedding("<mine>", (torch.randn(3, 32, generator=generator),)))
    return tmp_path


@pytest.fixture
def draw(files: Path, tiny_ckpt: Path, lenient: Path):
    """Draw with the tiny model; gives the pictures that were added."""

    def call(*flags: str, code: int = 0, model: bool = True) -> list[Path]:
        before = set(Path("out/samples").glob("*.png"))
        own = ["--ckpt", str(tiny_ckpt), "--n_samples", "1", "--n_iter", "1", "--skip_grid"] if model else ["--ckpt", str(tiny_ckpt)]
        assert main("txt2img", [*own, "--safety_ckpt", str(lenient), "--outdir", "out", *flags]) == code
        return sorted(set(Path("out/samples").glob("*.png")) - before)

    return call


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_both_change_the_picture_and_it_can_be_drawn_again_elsewhere(draw, files):
    prompt = ["--prompt", "a <mine> on red"]
    (plain,) = draw(*prompt)
    (one,) = draw(*prompt, "--lora", "one.safetensors:0.7")
    (both,) = draw(*prompt, "--lora", "one.safetensors:0.7", "two.safetensors", "--embedding", "mine.safetensors")
    assert len({pixels(path).tobytes() for path in (plain, one, both)}) == 3
    (same,) = draw(*prompt, "--embedding", "mine.safetensors", "--lora", "two.safetensors:1.0", "--lora", "one.safetensors:0.7")
    assert np.abs(pixels(same).astype(int) - pixels(both)).max() <= 1, "changes are added up, in any order but for rounding"

    record = read_metadata(both)
    assert record["options"]["lora"] == ["one.safetensors:0.7", "two.safetensors:1.0"]
    assert record["options"]["embedding"] == ["mine.safetensors:<mine>"]
    assert {"lora1", "lora2", "embedding1"} <= set(record) and len(record["lora2"]["sha256"]) == 64
    assert "lora" not in read_metadata(plain)["options"]
    told = Image.open(both).text["parameters"]
    assert 'Lora hashes: "one: ' in told and 'TI hashes: "mine: ' in told

    (again,) = draw("--reproduce", str(both), model=False)
    assert np.array_equal(pixels(again), pixels(both))
    Path("there").mkdir()
    for name in ("one", "two", "mine"):
        shutil.move(f"{name}.safetensors", f"there/other-{name}.safetensors")
    places = ["--lora", "there/other-one.safetensors", "there/other-two.safetensors", "--embedding", "there/other-mine.safetensors"]
    (moved_,) = draw("--reproduce", str(both), *places, model=False)
    assert np.array_equal(pixels(moved_), pixels(both))


def test_other_files_or_weights_are_not_the_same_picture(draw, files, capsys):
    (first,) = draw("--prompt", "a ring", "--lora", "one.safetensors:0.7")
    cases = {
        ("--lora", "two.safetensors"): "was drawn with another file for --lora",
        ("--lora", "one.safetensors:0.5"): "the picture was drawn with 0.7: leave out",
        ("--lora", "one.safetensors", "two.safetensors"): "was drawn with 1 --lora, and 2 are given",
        ("--embedding", "mine.safetensors"): "was drawn with 0 --embedding, and 1 are given",
    }
    for flags, message in cases.items():
        assert draw("--reproduce", str(first), *flags, code=2, model=False) == []
        assert message in capsys.readouterr().err


def test_what_is_wrong_is_told_before_anything_is_drawn(draw, files, capsys):
    flags = ["--lora", "no.safetensors", "one.safetensors:much", "--embedding", "mine.safetensors:two words", "no.pt"]
    draw("--prompt", "a ring", *flags, code=2)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for part in (
        "--lora 'no.safetensors' does not exist",
        "'much' is no number: give FILE:WEIGHT",
        "'two words' is no word",
        "'no.pt' does",
    ):
        assert part in told
    draw("--prompt", "a ring", "--embedding", "mine.safetensors", "there/mine.safetensors", code=2)
    assert "is the word of several files" in capsys.readouterr().err
    draw("--prompt", "a ring", "--lora", "mine.safetensors", code=2)
    assert "no layer of a LoRA is called that" in capsys.readouterr().err
    draw("--prompt", "a ring", "--embedding", "one.safetensors", code=2)
    assert "name a LoRA by --lora" in capsys.readouterr().err


def test_a_word_that_no_prompt_has_is_told(draw, files, caplog):
    draw("--prompt", "a ring", "--embedding", "mine.safetensors:<yours>")
    assert "no prompt has the word '<yours>'" in caplog.text


def test_a_word_with_a_colon_is_refused_before_weights_are_read(draw, files, capsys, monkeypatch):
    """Whoever says it, the file's contents, its name or the flag: `FILE:WORD` of the record could not be read back."""
    from ldm.inference import session

    vectors = (torch.zeros(1, 32),)
    write_embedding("said.safetensors", Embedding("a:b", vectors))
    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("weights were read"))
    for flag in ("said.safetensors", "mine.safetensors:a:b"):
        draw("--prompt", "a ring", "--embedding", flag, code=2)
        told, path = capsys.readouterr().err, flag.partition(":")[0]
        assert f"--embedding '{path}': its word 'a:b' has a colon: name another one by --embedding {path}:ab" in told
    with pytest.raises(UserError, match="has a colon"):
        check_word("a:b.safetensors", "a:b")
    Path("a:b.safetensors").touch()
    assert embedding_spec("a:b.safetensors:<x>") == ("a:b.safetensors", "<x>")


def test_files_are_hashed_before_anything_is_drawn(draw, files, capsys, monkeypatch):
    from ldm.inference import record
    from ldm.inference.pipeline import Pipeline

    def missing(options):
        raise UserError("cannot be hashed")

    monkeypatch.setattr(record, "weights_hashes", missing)
    monkeypatch.setattr(Pipeline, "draw", lambda *_: pytest.fail("a batch was drawn"))
    draw("--prompt", "a ring", code=2)
    assert "cannot be hashed" in capsys.readouterr().err


def test_spelling(files):
    Path("a:b.safetensors").touch()
    assert split_spec("a:b.safetensors") == ("a:b.safetensors", None) and split_spec("a:b.safetensors:2") == ("a:b.safetensors", "2")
    assert lora_spec("one.safetensors") == ("one.safetensors", 1.0) and lora_spec("one.safetensors:-0.5") == ("one.safetensors", -0.5)
    assert embedding_spec("mine.safetensors:<x>") == ("mine.safetensors", "<x>")
    for text in ("one.safetensors:nan", "one.safetensors:inf"):
        with pytest.raises(UserError, match="is no number"):
            lora_spec(text)
    assert moved("lora", ["gone.safetensors:0.25"], None) == ["gone.safetensors:0.25"]
    assert moved("lora", ["gone.safetensors:0.25"], ["one.safetensors:0.25"]) == ["one.safetensors:0.25"]
    with pytest.raises(UserError, match="was tampered with"):
        moved("lora", [3], None)
    assert check_additions(["one.safetensors"], ["mine.safetensors"]) == []


def test_a_run_with_additions_goes_on(draw):
    """What the flags leave open and the pictures record does not make them pictures of another run."""
    flags = [
        "--prompt",
        "a <mine> on red",
        "--lora",
        "one.safetensors",
        "two.safetensors:.5",
        "--embedding",
        "mine.safetensors",
        "--steps",
        "2",
    ]
    (picture,) = draw(*flags)
    assert read_metadata(picture)["options"]["lora"] == ["one.safetensors:1.0", "two.safetensors:0.5"]
    assert draw(*flags, "--continue") == []
    draw(*flags[:-4], "--embedding", "mine.safetensors:<other>", *flags[-2:], "--continue", code=2)
