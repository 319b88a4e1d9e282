"""The scripts as a user runs them, with tiny random models."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.inference.cli import main
from ldm.inference.safety import safety_card
from ldm.inference.watermark import detect
from tests.inference.conftest import lenient, strict, tiny_ckpt  # noqa: F401

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def run(tiny_ckpt: Path, lenient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """Run a task in this process, in an empty folder; gives the exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str, task: str = "txt2img", safety: Path | None = lenient) -> int:
        model = ["--ckpt", str(tiny_ckpt)] + (["--safety_ckpt", str(safety)] if safety else [])
        return main(task, [*(model if "--reproduce" not in flags else []), *flags])

    return call


def pictures(folder: str | Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(Path(folder, "samples").glob("*.png"))]


def script(name: str, *flags: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPTS / name), *flags]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **kwargs)  # type: ignore[call-overload]


# ---------------------------------------------------------------------- txt2img
def test_pictures_a_grid_and_closing_lines(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("--prompt", "a red circle", "--n_samples", "3", "--n_iter", "2", "--outdir", "out", "--H", "48") == 0
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == [*(f"0000{i}.png" for i in range(6)), "grid-0000.png"]
    assert Image.open("out/grid-0000.png").size == (3 * 66 + 2, 2 * 50 + 2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "samples: out/samples/00000.png ... 00005.png" and said[1] == "grid: out/grid-0000.png"
    assert said[2].startswith("6 pictures in ") and "0 flagged by the safety check" in said[2]
    assert said[3].startswith("again: python scripts/txt2img.py --prompt 'a red circle' ")
    before = {p.name: p.read_bytes() for p in Path("out").rglob("*.png")}
    assert run("--prompt", "b", "--n_samples", "1", "--outdir", "out") == 0
    assert all(p.read_bytes() == before[p.name] for p in Path("out").rglob("*.png") if p.name in before)
    assert Path("out/samples/00006.png").is_file() and Path("out/grid-0001.png").is_file()


def test_the_closing_command_draws_the_same(run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    import shlex

    assert run("--prompt", 'it\'s "red"', "--negative-prompt", "blue", "--n_samples", "2", "--seed", "5", "--outdir", "a") == 0
    again = capsys.readouterr().out.splitlines()[-1].removeprefix("again: ")
    words = shlex.split(again)[2:]
    assert main("txt2img", ["b" if word == "a" else word for word in words]) == 0
    assert all(np.array_equal(x, y) for x, y in zip(pictures("a"), pictures("b"), strict=True))


def test_one_by_one_or_all_at_once(run):
    assert run("--prompt", "x", "--n_samples", "1", "--n_iter", "4", "--outdir", "one") == 0
    assert run("--prompt", "x", "--n_samples", "4", "--n_iter", "1", "--outdir", "four") == 0
    one, four = pictures("one"), pictures("four")
    assert len(one) == len(four) == 4
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(one, four, strict=True))
    assert np.abs(one[0].astype(int) - one[1]).max() > 1


def test_a_prompt_file_in_order_with_a_ragged_last_batch(run, tmp_path: Path):
    Path("p.txt").write_text("a red circle\n\n# no\ntwo blue stars\n   \nthree rings\n")
    assert run("--from-file", "p.txt", "--n_samples", "2", "--n_iter", "2", "--outdir", "out") == 0
    said = [json.loads(Image.open(p).text["ldm_metadata"]) for p in sorted(Path("out/samples").glob("*.png"))]  # type: ignore[attr-defined]
    assert [m["prompt"] for m in said] == ["a red circle", "two blue stars", "three rings"] * 2
    assert [m["seed"] for m in said] == list(range(42, 48))


def test_skipping(run):
    assert run("--prompt", "x", "--n_samples", "1", "--skip_grid", "--outdir", "a") == 0
    assert run("--prompt", "x", "--n_samples", "1", "--skip_save", "--outdir", "b") == 0
    assert [p.name for p in Path("a").rglob("*.png")] == ["00000.png"]
    assert [p.name for p in Path("b").rglob("*.png")] == ["grid-0000.png"]


def test_flagged_pictures_become_cards(run, strict: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    assert run("--prompt", "x", "--n_samples", "2", "--outdir", "out", safety=strict) == 0
    assert all(np.array_equal(picture, safety_card(64, 64)) for picture in pictures("out"))
    assert "2 flagged by the safety check and replaced" in capsys.readouterr().out
    assert run("--prompt", "x", "--n_samples", "1", "--outdir", "warn", "--safety", "warn", safety=strict) == 0
    assert run("--prompt", "x", "--n_samples", "1", "--outdir", "off", "--safety", "off", safety=None) == 0
    assert np.array_equal(pictures("warn")[0], pictures("off")[0])
    said = capsys.readouterr().out
    assert "1 flagged by the safety check," in said and "no safety check" in said


def test_pictures_carry_the_watermark(run, caplog: pytest.LogCaptureFixture):
    assert run("--prompt", "x", "--n_samples", "1", "--H", "256", "--W", "256", "--outdir", "large", "--watermark_text", "me") == 0
    found = detect(pictures("large")[0])
    assert found is not None and found.text == "me"
    with caplog.at_level(logging.WARNING):
        assert run("--prompt", "x", "--n_samples", "3", "--outdir", "small") == 0
    assert sum("at least 256x256" in message for message in caplog.messages) == 1


# ---------------------------------------------------------------------- --reproduce
@pytest.mark.parametrize("flags", [[], ["--rng", "legacy", "--ddim_eta", "0.5"], ["--plms", "--fixed_code"], ["--bf16"]], ids=str)
def test_reproduce_is_exact_to_the_bit(run, flags: list[str], monkeypatch: pytest.MonkeyPatch):
    assert run("--prompt", "x", "--n_samples", "3", "--n_iter", "2", "--outdir", "out", "--negative_prompt", "y", *flags) == 0
    torch.manual_seed(99)  # nothing of this run's state helps
    assert run("--reproduce", "out/samples/00004.png", "--outdir", "again") == 0
    assert Path("again/samples/00000.png").read_bytes() == Path("out/samples/00004.png").read_bytes()
    assert [p.name for p in Path("again").rglob("*.png")] == ["00000.png"]


def test_reproduce_from_a_prompt_file_needs_no_file(run):
    Path("p.txt").write_text("a\nb\nc\n")
    assert run("--from_file", "p.txt", "--n_samples", "2", "--outdir", "out", "--H", "256", "--W", "256", "--steps", "1") == 0
    Path("p.txt").unlink()
    assert run("--reproduce", "out/samples/00001.png", "--outdir", "again") == 0
    assert Path("again/samples/00000.png").read_bytes() == Path("out/samples/00001.png").read_bytes()


def test_reproduce_refuses_other_weights_and_pictures_without_a_record(
    run,
    lenient: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
):
    from tests.inference.tiny import write_model

    assert run("--prompt", "x", "--n_samples", "1", "--outdir", "out") == 0
    other = write_model(tmp_path_factory.mktemp("other"), seed=1)
    assert run("--reproduce", "out/samples/00000.png", "--ckpt", str(other)) == 2
    assert run("--reproduce", "out/grid-0000.png") == 2
    errors = capsys.readouterr().err.splitlines()
    assert any(line.startswith("error: ") and "other weights" in line for line in errors)
    assert any(line.startswith("error: ") and "has no ldm_metadata" in line for line in errors)


# ---------------------------------------------------------------------- img2img
def test_img2img_finishes_its_pictures_too(run, strict: Path):  # noqa: F811
    Image.new("RGB", (100, 70), "red").save("init.png")
    flags = ["--prompt", "x", "--init-img", "init.png", "--n_samples", "2"]
    assert run(*flags, "--strength", "0.5", "--outdir", "a", task="img2img") == 0
    assert [p.shape for p in pictures("a")] == [(64, 64, 3)] * 2
    assert run("--reproduce", "a/samples/00001.png", "--outdir", "again", task="img2img") == 0
    assert Path("again/samples/00000.png").read_bytes() == Path("a/samples/00001.png").read_bytes()
    assert run(*flags, "--outdir", "b", task="img2img", safety=strict) == 0
    assert np.array_equal(pictures("b")[0], safety_card(64, 64))
    assert run(*flags, "--H", "256", "--W", "256", "--outdir", "c", "--strength", "0", task="img2img") == 0
    assert detect(pictures("c")[0]) is not None
    Image.new("RGB", (100, 70), "blue").save("init.png")
    assert run("--reproduce", "a/samples/00001.png", task="img2img") == 2


# ---------------------------------------------------------------------- wrong input, one line each
@pytest.mark.parametrize(
    "flags",
    [
        ["--prompt", "x", "--H", "250"],
        ["--prompt", "x", "--ddim_steps", "0"],
        ["--prompt", "x", "--sampler", "unknown"],
        ["--prompt", "x", "--ckpt", "nowhere.ckpt"],
        ["--from-file", "empty.txt"],
        ["--prompt", "x", "--outdir", "file"],
        ["--prompt", "x", "--dpm", "--laion400m"],
        ["--prompt", "x", "--safety_ckpt", "."],
        ["--prompt", "x", "--device", "mps"],
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_code_2(run, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from ldm.inference import session

    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("weights were read"))
    Path("empty.txt").write_text("\n# nothing\n")
    Path("file").write_text("not a folder")
    assert run(*flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_damaged_checkpoint_is_one_line(run, tiny_ckpt: Path, capsys: pytest.CaptureFixture[str]):  # noqa: F811
    Path("config.yaml").write_text((tiny_ckpt.parent / "config.yaml").read_text())
    Path("cut.safetensors").write_bytes(tiny_ckpt.read_bytes()[:100000])
    assert run("--prompt", "x", "--ckpt", "cut.safetensors") == 2
    assert capsys.readouterr().err.startswith("error: cut.safetensors")


def test_a_disk_that_takes_no_more_is_found_before_weights_are_read(tmp_path: Path, tiny_ckpt: Path):  # noqa: F811
    """Files of more than 4 KB cannot be written, as on a full disk; run as a process of its own."""
    flags = ["--prompt", "x", "--ckpt", str(tiny_ckpt), "--safety", "off", "--outdir", str(tmp_path / "out")]
    ran = script("txt2img.py", *flags, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("error: output folder ") and "cannot be written" in ran.stderr and ran.stderr.count("\n") == 1
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


# ---------------------------------------------------------------------- the scripts themselves
DRAWING = ["txt2img.py", "img2img.py", "inpaint.py", "depth2img.py", "upscale.py", "unclip.py", "sample_diffusion.py", "reconstruct.py"]


@pytest.mark.parametrize("name", [*DRAWING, "watermark.py", "evaluate_shapes.py", "make_safety.py"])
def test_help_from_anywhere(name: str, tmp_path: Path):
    ran = script(name, "--help", cwd=tmp_path)
    assert ran.returncode == 0 and ran.stdout.startswith("usage: ") and ran.stderr == ""


def test_txt2img_as_a_process_from_anywhere(tmp_path: Path, tiny_ckpt: Path, lenient: Path):  # noqa: F811
    flags = ["--ckpt", str(tiny_ckpt), "--safety_ckpt", str(lenient), "--prompt", "x", "--n_samples", "1", "--outdir", "out"]
    ran = script("txt2img.py", *flags, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out/samples/00000.png").is_file()


def test_watermark_script(tmp_path: Path):
    from ldm.data.shapes import render, sample_scene

    Image.fromarray(render(sample_scene(np.random.default_rng(0)))).save(tmp_path / "plain.png")
    embedded = script("watermark.py", "embed", str(tmp_path / "plain.png"), "--text", "abcd")
    assert embedded.returncode == 0 and embedded.stdout.strip() == str(tmp_path / "plain-marked.png")
    assert script("watermark.py", "embed", str(tmp_path / "plain.png")).returncode == 2  # never over an existing file
    ran = script("watermark.py", "detect", str(tmp_path / "plain-marked.png"), str(tmp_path / "plain.png"))
    lines = ran.stdout.splitlines()
    assert ran.returncode == 1 and "dwtDctSvd 'abcd'" in lines[0] and "no watermark" in lines[1]
    assert script("watermark.py", "detect", str(tmp_path / "none.png")).returncode == 2


def test_evaluate_shapes_script(tmp_path: Path, tiny_ckpt: Path, lenient: Path):  # noqa: F811
    out = tmp_path / "report"
    own = ["--n", "8", "--n_unseen", "4", "--outdir", str(out)]
    ran = script("evaluate_shapes.py", *own, "--ckpt", str(tiny_ckpt), "--safety_ckpt", str(lenient), "--steps", "1")
    assert ran.returncode == 0, ran.stderr
    assert "| **overall** (mean of kinds) |" in (out / "table.md").read_text() and "unseen combinations" in ran.stdout
    results = json.loads((out / "results.json").read_text())
    assert len(results["pictures"]) == 12 and results["settings"]["steps"] == 1
    assert Image.open(out / "contact-sheet.png").width == 8 * 136


def test_make_safety_script(tmp_path: Path, lenient: Path):  # noqa: F811
    from ldm.inference.safety import load_safety

    for name in ("clip.yaml", "clip.safetensors"):
        (tmp_path / name).write_bytes((lenient / name).read_bytes())
    ran = script("make_safety.py", "--folder", str(tmp_path), "--n", "100")
    assert ran.returncode == 0, ran.stderr
    assert "| emblem: red cross on white, alone (" in ran.stdout
    checker = load_safety(tmp_path)
    assert checker.concept_embeds.shape == (10, 16) and len(checker.special_care_embeds) == 0
    refused = script("make_safety.py", "--folder", str(tmp_path), "--n", "100")
    assert refused.returncode == 2 and "--overwrite" in refused.stderr
