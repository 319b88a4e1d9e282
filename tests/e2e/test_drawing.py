"""What the scripts can do beyond the originals' flags, run with tiny random models; each picture is drawn again to the bit."""

from __future__ import annotations

import io
import json
import logging
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ldm.inference import cli
from ldm.inference.cli import main
from ldm.inference.output import write_new_png
from ldm.inference.pipeline import Pipeline
from ldm.models.diffusion.registry import SAMPLERS
from tests.inference.conftest import lenient, sdxl, strict, tiny_ckpt  # noqa: F401
from tests.inference.tiny import write_model


@pytest.fixture
def run(tiny_ckpt: Path, lenient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    """Run a task in this process, in an empty folder, from a model and a safety folder; gives the exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: str, task: str = "txt2img", ckpt: Path = tiny_ckpt, safety: Path = lenient) -> int:
        model = ["--ckpt", str(ckpt), "--safety_ckpt", str(safety)]
        return main(task, [*(model if "--reproduce" not in flags else []), *flags])

    return call


def names(folder: str) -> list[str]:
    return sorted(p.name for p in Path(folder, "samples").iterdir())


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def record(path: str | Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text["ldm_metadata"])  # type: ignore[attr-defined]


def again(run: Any, path: str, *flags: str, task: str = "txt2img") -> None:
    """The picture in `path` comes out the same, file and all, whatever the state of this process."""
    torch.manual_seed(99)
    out = f"again-{len(list(Path().glob('again-*')))}"
    assert run("--reproduce", path, "--outdir", out, *flags, task=task) == 0
    assert Path(out, "samples/00000.png").read_bytes() == Path(path).read_bytes()


# ---------------------------------------------------------------------- samplers
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_and_draws_again(run, name: str):
    flags = ["--prompt", "x", "--n_samples", "1", "--steps", "4", "--sampler", name, "--guidance_rescale", "0.5"]
    assert run(*flags, "--outdir", "out", "--skip_grid") == 0
    assert record("out/samples/00000.png")["options"]["sampler"] == name
    again(run, "out/samples/00000.png")


@pytest.mark.parametrize("name", ["euler", "heun_karras", "dpmpp_3s_full", "dpmpp_2m_sde", "unipc", "ddpm"])
def test_img2img_with_other_samplers(run, name: str):
    Image.new("RGB", (64, 64), "red").save("init.png")
    flags = ["--prompt", "x", "--n_samples", "1", "--steps", "6", "--strength", "0.5", "--init_img", "init.png", "--skip_grid"]
    assert run(*flags, "--sampler", name, "--outdir", "out", task="img2img") == 0
    again(run, "out/samples/00000.png", task="img2img")


def test_spacing_and_eta_change_the_picture_and_are_recorded(run):
    flags = ["--prompt", "x", "--n_samples", "1", "--skip_grid", "--steps", "4"]
    own = {"a": [], "b": ["--spacing", "trailing"], "c": ["--grid", "karras"], "d": ["--ddim_eta", "1"]}
    for out, extra in own.items():
        assert run(*flags, *extra, "--outdir", out) == 0
        again(run, f"{out}/samples/00000.png")
    pictures = [pixels(f"{out}/samples/00000.png").tobytes() for out in own]
    assert len(set(pictures)) == len(own)
    assert record("c/samples/00000.png")["options"]["spacing"] == "karras"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sampler", "dpmpp_2m", "--spacing", "quad"], "'quad' is unknown to DPM-Solver"),
        (["--sampler", "dpmpp_2m_sde", "--ddim_eta", "0"], "eta 0.0 is out of range for sde-dpmsolver++"),
        (["--sampler", "euler", "--ddim_eta", "1"], "--ddim_eta 1 has no meaning for sampler euler"),
        (["--spacing", "quadratic"], "--spacing 'quadratic' is unknown: use one of uniform, quad,"),
        (["--sampler", "dpm++ 2m karas"], "did you mean dpmpp_2m_karras"),
        (["--guidance_rescale", "2"], "--guidance_rescale 2.0 must lie in 0 to 1"),
        (["--vae", "nowhere"], "--vae 'nowhere' does not exist"),
        (["--refiner_start", "0.5"], "--refiner_start says nothing without --refiner"),
        (["--original_size", "64", "64"], "--original_size means nothing to this model"),
        (["--tile_overlap", "8"], "--tile_overlap says nothing without --tile"),
        (["--tile", "40"], "--tile 40 must be a multiple of 16: use 32 or 48"),
        (["--tile", "32", "--tile_overlap", "32"], "--tile_overlap 32 must be a multiple of 8 from 0 to below --tile 32"),
        (["--save_progress", "--skip_save"], "--save_progress saves beside the pictures"),
        (["--progress_every", "0"], "--progress_every 0 must be at least 1"),
        (["--clip_skip", "0"], "--clip_skip 0 must be at least 1"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_honoured_is_told_before_weights_are_read(
    run, flags: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from ldm.inference import session

    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("weights were read"))
    assert run("--prompt", "x", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_the_table_of_samplers(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main("txt2img", ["--list_samplers"])
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0 and lines[0].split()[:3] == ["name", "order", "random"]
    assert [line.split()[0] for line in lines[1 : len(SAMPLERS) + 1]] == list(SAMPLERS)


# ---------------------------------------------------------------------- weights
def test_another_first_stage(run, tmp_path_factory: pytest.TempPathFactory):
    other = write_model(tmp_path_factory.mktemp("other"), seed=3)
    flags = ["--prompt", "x", "--n_samples", "1", "--skip_grid"]
    assert run(*flags, "--outdir", "a") == 0
    assert run(*flags, "--outdir", "b", "--vae", str(other)) == 0
    assert not np.array_equal(pixels("a/samples/00000.png"), pixels("b/samples/00000.png"))
    again(run, "b/samples/00000.png")
    assert run("--reproduce", "b/samples/00000.png", "--vae", str(write_model(Path("third"), seed=4))) == 2


def test_a_checkpoint_alone_draws_without_a_network(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No config beside it: family, sizes and prediction are found in the file, the vocabulary in installed packages."""
    from tests.inference.diffusers_models import parts, save

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    folder = save(tmp_path / "model", parts("sd1"))
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    flags = ["--prompt", "a red circle", "--n_samples", "1", "--steps", "2", "--skip_grid", "--H", "64", "--W", "64"]
    assert run(*flags, "--outdir", "out", ckpt=folder) == 0
    assert record("out/samples/00000.png")["model"]["config"] == "found from the weights"
    again(run, "out/samples/00000.png")
    assert run(*flags, "--clip_skip", "2", "--outdir", "skip", ckpt=folder) == 0
    again(run, "skip/samples/00000.png")
    assert not np.array_equal(pixels("out/samples/00000.png"), pixels("skip/samples/00000.png"))


def test_the_flag_says_what_the_network_predicts(run):
    """It wins over the config beside the weights, which says v; where neither knows, it is asked for (tests of families)."""
    flags = ["--prompt", "x", "--n_samples", "1", "--skip_grid"]
    for out, extra in (("config", []), ("v", ["--prediction", "v"]), ("eps", ["--prediction", "eps"])):
        assert run(*flags, *extra, "--outdir", out) == 0
        again(run, f"{out}/samples/00000.png")
    config, v, eps = (pixels(f"{out}/samples/00000.png") for out in ("config", "v", "eps"))
    assert np.array_equal(config, v) and not np.array_equal(v, eps)
    assert record("eps/samples/00000.png")["options"]["prediction"] == "eps"


# ---------------------------------------------------------------------- records of the first version
def as_first_version(path: str, out: str) -> str:
    """The picture with a record as the first version wrote it."""
    said = record(path)
    new = {"spacing", "guidance_rescale", "prompt_syntax", "refiner_start", "aesthetic_score", "negative_aesthetic_score"}
    said["options"] = {name: value for name, value in said["options"].items() if name not in new} | {"ddim_eta": 0.0}
    if "inputs" in said:
        said["init_image"] = {"sha256": said.pop("inputs")["init_img"]}
    write_new_png(Path(out), pixels(path), {"parameters": "", "ldm_metadata": json.dumps(said)})
    return out


@pytest.mark.parametrize("task", ["txt2img", "img2img"])
@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_solver"])
def test_pictures_of_the_first_version_come_out_the_same(run, task: str, name: str, monkeypatch: pytest.MonkeyPatch):
    from ldm.models.diffusion.sampler import Sampler

    Image.new("RGB", (64, 64), "red").save("init.png")
    flags = ["--prompt", "x", "--n_samples", "1", "--steps", "6", "--sampler", name, "--skip_grid"]
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "shifted_levels", True)  # the first version noised an init image one level further with every sampler
        extra = ["--init_img", "init.png", "--strength", "0.5"] if task == "img2img" else []
        assert run(*flags, *extra, "--outdir", "a", task=task) == 0
    old = as_first_version("a/samples/00000.png", "old.png")
    assert run("--reproduce", old, "--outdir", "b", task=task) == 0
    assert np.array_equal(pixels("b/samples/00000.png"), pixels(old))


# ---------------------------------------------------------------------- progress
@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_pictures_way_from_noise(run, kind: str):
    flags = ["--prompt", "x", "--n_samples", "2", "--steps", "6", "--skip_grid"]
    assert run(*flags, "--outdir", "a", "--save_progress", kind, "--progress_every", "2") == 0
    assert run(*flags, "--outdir", "b") == 0
    assert names("a") == [f"0000{i}.{end}" for i in range(2) for end in sorted([kind, "png"])]
    film = Image.open(f"a/samples/00001.{kind}")
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    last = pixels("a/samples/00001.png")
    assert len(frames) == 4 and np.array_equal(last, pixels("b/samples/00001.png"))  # steps 0, 2, 4, and the picture
    assert np.abs(frames[-1].astype(int) - last).mean() < (12 if kind == "gif" else 1e-9)  # random weights draw more than 256 colours
    assert np.abs(frames[0].astype(int) - last).mean() > np.abs(frames[2].astype(int) - last).mean()
    again(run, "a/samples/00001.png", "--save_progress", kind)
    text = film.info["comment"].decode() if kind == "gif" else film.getexif()[0x010E]
    assert text == Image.open("a/samples/00001.png").text["parameters"]  # type: ignore[attr-defined]


def test_a_replaced_picture_shows_no_progress(run, strict: Path):  # noqa: F811
    assert run("--prompt", "x", "--n_samples", "1", "--outdir", "out", "--save_progress", safety=strict) == 0
    assert names("out") == ["00000.png"]


# ---------------------------------------------------------------------- limits of the machine
def test_pictures_too_many_for_a_grid_are_saved_all_the_same(run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli, "_LARGEST_GRID", 2 * 64 * 64 * 3)
    assert run("--prompt", "x", "--n_samples", "2", "--outdir", "out") == 0 and Path("out/grid-0000.png").is_file()
    assert "no grid" not in capsys.readouterr().out
    assert run("--prompt", "x", "--n_samples", "3", "--outdir", "more") == 0
    assert len(names("more")) == 3 and not Path("more/grid-0000.png").exists()
    assert "no grid: the pictures are too many" in capsys.readouterr().out


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), ValueError("x")])
def test_out_of_memory_is_told_in_one_line(run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "_sample", fail)
    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="x"):
            run("--prompt", "x", "--n_samples", "1")
        return
    assert run("--prompt", "x", "--n_samples", "1") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: out of memory: draw fewer at once")


def test_what_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli.say("red \u2603 \udcff")
    assert raw.getvalue() == b"red \\u2603 \\udcff\n"


def test_nobody_need_read_what_is_said():
    """`| head -1` closes the pipe after the first line; the pictures are drawn to the end."""
    code = "import sys, time; from ldm.inference.cli import say; say('a'); time.sleep(0.5); say('b'); say('c'); sys.stderr.write('done')"
    command = f'{shlex.quote(sys.executable)} -c "{code}" | head -1'
    ran = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "a\n", "done")


# ---------------------------------------------------------------------- prompt files
def test_a_jsonl_file_with_flags_a_line(run):
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "two blue stars", "seed": 7, "negative_prompt": "green"},
        {"prompt": "a ring", "steps": 3, "sampler": "euler", "scale": 4},
        {"prompt": "a heart", "steps": 3, "sampler": "euler", "scale": 4, "H": 48},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run("--from_file", "p.jsonl", "--n_samples", "4", "--outdir", "out", "--H", "64", "--W", "64") == 0
    said = [record(f"out/samples/{i:05}.png") for i in range(4)]
    assert [m["prompt"] for m in said] == [line["prompt"] for line in lines]
    assert [m["seed"] for m in said] == [42, 7, 44, 45]
    assert [m["negative_prompt"] for m in said] == ["", "green", "", ""]
    assert [len(m["batch"]["seeds"]) for m in said] == [2, 2, 1, 1]
    assert [(m["options"]["steps"], m["options"]["sampler"], m["options"]["H"]) for m in said[1:]] == [
        (4, "ddim", 64),
        (3, "euler", 64),
        (3, "euler", 48),
    ]
    assert pixels("out/samples/00003.png").shape == (48, 64, 3) and Path("out/grid-0000.png").is_file()
    Path("p.jsonl").unlink()
    for i in range(4):
        again(run, f"out/samples/{i:05}.png")


def test_lines_of_a_jsonl_file_are_checked_before_weights_are_read(
    run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from ldm.inference import session

    monkeypatch.setattr(session, "load_model", lambda *_: pytest.fail("weights were read"))
    wrong = {
        '{"prompt": "x", "H": 50}': "line 2: --H 50 must be a multiple of 16",
        '{"prompt": "x", "sampler": "eular"}': "line 2: unknown sampler 'eular'",
        '{"prompt": "x", "sampler": "dpmpp_2m", "spacing": "quad"}': "'quad' is unknown to DPM-Solver",
        '{"prompt": "x", "prompt_syntax": "wild"}': "line 2: prompt_syntax 'wild' is unknown: use one of plain, weighted",
        '{"prompt": "x", "strength": 0.5}': "unknown key 'strength'",
        '{"prompt": "x", "outdir": "y"}': "unknown key 'outdir'",
    }
    for line, message in wrong.items():
        Path("p.jsonl").write_text('{"prompt": "fine"}\n' + line)
        assert run("--from_file", "p.jsonl") == 2
        assert message in capsys.readouterr().err


def test_init_images_a_line(run):
    for color in ("red", "blue"):
        Image.new("RGB", (64, 64), color).save(f"{color}.png")
    lines = [{"prompt": "x", "init_img": f"{color}.png", "strength": 0.3} for color in ("red", "blue")]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run("--from_file", "p.jsonl", "--outdir", "out", task="img2img") == 0  # no picture for the run as a whole
    again(run, "out/samples/00001.png", task="img2img")
    assert record("out/samples/00001.png")["options"]["init_img"] == "blue.png"


# ---------------------------------------------------------------------- prompts
def test_weights_and_clip_skip_change_the_picture(run):
    flags = ["--n_samples", "1", "--skip_grid", "--H", "64", "--W", "64"]
    long = "a (red:1.5) circle, " + "very " * 90 + "large"
    own = {
        "plain": ["--prompt", "a red circle"],
        "weighted": ["--prompt", "a (red:2.5) circle", "--prompt_syntax", "weighted"],
        "long": ["--prompt", long, "--prompt_syntax", "weighted", "--negative_prompt", "blue"],
    }
    for out, extra in own.items():
        assert run(*flags, *extra, "--outdir", out) == 0
        again(run, f"{out}/samples/00000.png")
    assert len({pixels(f"{out}/samples/00000.png").tobytes() for out in own}) == len(own)


def test_what_is_cut_of_a_prompt_is_told(run, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert run("--prompt", "very " * 90 + "large", "--n_samples", "1", "--outdir", "out", "--skip_grid") == 0
    assert any("large" in message for message in caplog.messages)


# ---------------------------------------------------------------------- large canvases
def test_tiles_draw_a_large_canvas(run):
    flags = ["--prompt", "x", "--n_samples", "1", "--skip_grid", "--H", "96", "--W", "160", "--steps", "2"]
    assert run(*flags, "--tile", "64", "--outdir", "a") == 0
    assert record("a/samples/00000.png")["options"] | {"tile": 64, "tile_overlap": 16} == record("a/samples/00000.png")["options"]
    again(run, "a/samples/00000.png")
    assert run(*flags, "--outdir", "b") == 0
    assert run(*flags, "--tile", "160", "--outdir", "c") == 0
    assert not np.array_equal(pixels("a/samples/00000.png"), pixels("b/samples/00000.png"))
    assert np.array_equal(pixels("b/samples/00000.png"), pixels("c/samples/00000.png"))


# ---------------------------------------------------------------------- SDXL
def test_sdxl_and_its_refiner(run, sdxl: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):  # noqa: F811
    base, refiner = sdxl
    flags = ["--prompt", "a red circle", "--n_samples", "2", "--steps", "5", "--skip_grid", "--H", "64", "--W", "64"]
    own = {
        "plain": [],
        "sizes": ["--original_size", "512", "300", "--crop", "10", "20", "--target_size", "64", "64"],
        "refined": ["--refiner", str(refiner), "--refiner_start", "0.6", "--aesthetic_score", "7", "--sampler", "euler_a"],
    }
    for out, extra in own.items():
        assert run(*flags, *extra, "--outdir", out, ckpt=base) == 0
        again(run, f"{out}/samples/00001.png")
    assert len({pixels(f"{out}/samples/00001.png").tobytes() for out in own}) == len(own)
    assert record("refined/samples/00001.png")["refiner"]["ckpt"] == str(refiner)
    words = next(shlex.split(line)[3:] for line in capsys.readouterr().out.splitlines() if "--original_size" in line)
    assert main("txt2img", ["closing" if word == "sizes" else word for word in words]) == 0
    assert np.array_equal(pixels("closing/samples/00001.png"), pixels("sizes/samples/00001.png"))
    assert run(*flags, "--aesthetic_score", "3", ckpt=base) == 2
    assert run("--reproduce", "refined/samples/00001.png", "--refiner", str(base)) == 2


def test_sdxl_from_a_picture(run, sdxl: tuple[Path, Path]):  # noqa: F811
    Image.new("RGB", (64, 64), "red").save("init.png")
    flags = ["--prompt", "x", "--n_samples", "1", "--steps", "5", "--init_img", "init.png", "--skip_grid", "--H", "64", "--W", "64"]
    for out, extra, ckpt in (("a", ["--strength", "0.6", "--refiner", str(sdxl[1])], sdxl[0]), ("b", ["--strength", "0.3"], sdxl[1])):
        assert run(*flags, *extra, "--outdir", out, task="img2img", ckpt=ckpt) == 0
        again(run, f"{out}/samples/00000.png", task="img2img")


def test_sdxl_draws_a_part_anew(run, sdxl: tuple[Path, Path]):  # noqa: F811
    Image.new("RGB", (64, 64), "red").save("init.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save("mask.png")
    flags = ["--prompt", "x", "--n_samples", "1", "--steps", "5", "--init_img", "init.png", "--mask", "mask.png", "--mask_blur", "0"]
    sizes = ["--skip_grid", "--H", "64", "--W", "64", "--refiner", str(sdxl[1]), "--watermark", "none"]
    assert run(*flags, *sizes, "--outdir", "a", task="inpaint", ckpt=sdxl[0]) == 0
    drawn = pixels("a/samples/00000.png")
    assert (drawn[mask == 0] == (255, 0, 0)).all() and not (drawn[mask > 0] == (255, 0, 0)).all()
    again(run, "a/samples/00000.png", task="inpaint")
