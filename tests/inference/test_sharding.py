"""A prompt file drawn by several processes, and a run that goes on: the files of one undisturbed process, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.inference import record
from ldm.inference.cli import main
from ldm.inference.noise import threads
from ldm.inference.options import Options
from ldm.inference.output import metadata_texts, png_bytes
from ldm.inference.session import input_hashes
from ldm.inference.sharding import share_of
from ldm.inference.tasks import get_task
from ldm.util import UserError
from tests.inference.conftest import lenient, tiny_ckpt  # noqa: F401
from tests.training.spread import run_processes, torchrun_variables

LINES = ["a red circle", "a blue square", "two rings", "a star", "a heart", "a cross", "five dots"]
FLAGS = ["--from_file", "prompts.txt", "--n_samples", "2", "--steps", "2", "--skip_grid", "--seed", "5"]


@pytest.fixture
def model(tiny_ckpt: Path, lenient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: F811
    """Flags that name the tiny model; the folder is a new one with a prompt file."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(LINES))
    return ["--ckpt", str(tiny_ckpt), "--safety_ckpt", str(lenient)]


@pytest.fixture
def draw(model: list[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """draw(*flags, rank, world) in this process."""

    def call(*flags: str, rank: int = 0, world: int = 1) -> int:
        with monkeypatch.context() as patch:
            for name, value in torchrun_variables(rank, world, 1).items() if world > 1 else ():
                patch.setenv(name, value)
            return main("txt2img", [*model, *FLAGS, *flags])

    return call


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder, "samples").iterdir()}


def test_two_processes_at_once(draw: Callable[..., int], model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums are split among threads: bits are the same for the same number of them
    with threads(1):
        assert draw("--outdir", "one") == 0
    arguments = ["txt2img", [*model, *FLAGS, "--outdir", str(tmp_path / "two"), "--from_file", str(tmp_path / "prompts.txt")]]
    codes, said = run_processes(tmp_path / "said", "ldm.inference.cli.main", arguments)
    assert codes == [0, 0], said
    assert "process 0 of 2: 4 pictures to draw, 0 there; no grid" in said[0] and "process 1 of 2: 3 pictures" in said[1]
    assert files("two") == files("one")
    assert sorted(path.name for path in Path("two").iterdir()) == ["samples"]


def test_shares_make_the_whole_and_can_be_resumed(draw: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """A share that was lost in part is filled up by any number of processes; what is there keeps its bytes and its time."""
    assert draw("--outdir", "one") == 0
    for rank in range(3):
        assert draw("--outdir", "three", rank=rank, world=3) == 0
    assert files("three") == files("one")
    for number in (1, 4):
        Path(f"three/samples/0000{number}.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in Path("three/samples").iterdir()}
    capsys.readouterr()
    assert draw("--outdir", "three", "--skip_existing") == 0
    assert "4 pictures to draw, 3 there; no grid" in capsys.readouterr().out
    assert files("three") == files("one")
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert draw("--outdir", "three", "--continue") == 0
    assert "0 pictures to draw, 7 there" in capsys.readouterr().out


def test_a_folder_of_another_run_is_left_alone(draw: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert draw("--outdir", "out") == 0
    before = files("out")
    assert draw("--outdir", "out", rank=1, world=2) == 2
    assert "error (process 1): 'out/samples/00002.png' exists already: go on with that run by --skip_existing" in capsys.readouterr().err
    assert draw("--outdir", "out", "--skip_existing", "--seed", "6") == 2
    assert "is a picture of another run (seed 5, not 6)" in capsys.readouterr().err
    assert draw("--outdir", "out", "--skip_existing", "--scale", "3") == 2
    assert "scale 2.0, not 3.0" in capsys.readouterr().err
    assert files("out") == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rng": "legacy"}, "--rng legacy makes every picture depend"),
        ({"skip_save": True}, "--skip_save leaves nothing"),
        ({"reproduce": "a.png"}, "--reproduce draws one"),
        ({"skip_existing": True, "save_progress": "gif"}, "--save_progress writes films"),
    ],
)
def test_what_cannot_be_shared(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"2 processes: {message}"):
        share_of(Options("txt2img", "", "", False, **options), torchrun_variables(0, 2, 1))


# ---------------------------------------------------------------------- whose pictures are there
@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """left(**options): two pictures of a run with them, and files for it, in a new folder; gives the options."""
    monkeypatch.chdir(tmp_path)
    for name in ("model", "vae", "one", "two"):
        Path(f"{name}.safetensors").write_bytes(name.encode())
    Path("config.yaml").write_text("model: {target: some.Model}")
    Image.new("RGB", (64, 64), "red").save("init.png")

    def write(recorded: dict[str, Any] | None = None, task: str = "txt2img", **given: Any) -> dict[str, Any]:
        fields = {"prompts": ["a"] * 2, "prompt": "a", "H": 64, "W": 64, "outdir": "out", "skip_existing": True, **given}
        options = get_task(task).options(task, "config.yaml", "model.safetensors", True, **fields, **(recorded or {}))
        share = share_of(options)
        assert share is not None
        for batch in share.batches:
            facts = {"weights": record.weights_hashes(options), "inputs": input_hashes(get_task(task).read(options))}
            texts = metadata_texts(record.describe(options, batch, 0, **facts, device="cpu", threads=1, rng_state=None))
            share.path(batch, 0).parent.mkdir(parents=True, exist_ok=True)
            share.path(batch, 0).write_bytes(png_bytes(np.zeros((64, 64, 3), np.uint8), texts))
        return {"task": task, "config": "config.yaml", "ckpt": "model.safetensors", "own_model": True, **fields}

    return write


def there(options: dict[str, Any], **changed: Any) -> int:
    share = share_of(get_task(options["task"]).options(**{**options, **changed}))
    assert share is not None and not share.batches
    return share.there


@pytest.mark.parametrize("part", ["model", "vae", "one"])
def test_pictures_of_changed_weights_are_of_another_run(left: Callable[..., dict[str, Any]], part: str) -> None:
    options = left(vae="vae.safetensors", lora=["one.safetensors:1.0"])
    assert there(options) == 2
    Path(f"{part}.safetensors").write_bytes(b"trained on")
    name = {"one": "lora1"}.get(part, part)
    with pytest.raises(
        UserError, match=f"00000.png' is a picture of another run .{name} '{part}.safetensors' had sha256 .*, now [0-9a-f]+"
    ):
        there(options)


def test_pictures_of_a_changed_config_are_of_another_run(left: Callable[..., dict[str, Any]]) -> None:
    options = left()
    Path("config.yaml").write_text("model: {target: another.Model}")
    with pytest.raises(UserError, match=r"another run \(config of model 'config.yaml' had sha256 "):
        there(options)


def test_weights_are_hashed_once_a_process(left: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    options, hashed, real = left(), [], record.weights_hash
    monkeypatch.setattr(record, "weights_hash", lambda path: (hashed.append(path), real(path))[1])
    assert there(options) == 2
    assert hashed == ["model.safetensors"]


def test_pictures_of_a_changed_init_image_are_of_another_run(left: Callable[..., dict[str, Any]]) -> None:
    options = left(task="img2img", init_img="init.png")
    assert there(options) == 2
    Image.new("RGB", (64, 64), "blue").save("init.png")
    with pytest.raises(UserError, match=r"another run \(init image 'init.png' had sha256 "):
        there(options)


def test_loras_and_embeddings_are_compared_by_what_they_mean(left: Callable[..., dict[str, Any]]) -> None:
    """A record has the weight and the word that were used, written out."""
    options = left({"lora": ["one.safetensors:1.0", "two.safetensors:0.5"], "embedding": ["one.safetensors:<mine>"]})
    same = {"lora": ["one.safetensors", "two.safetensors:.5"], "embedding": ["one.safetensors"]}
    assert there(options, **same) == 2
    assert there(options, **{**same, "embedding": ["one.safetensors:<mine>"]}) == 2
    for other in (
        {"lora": ["one.safetensors", "two.safetensors"]},
        {"lora": ["two.safetensors:.5", "one.safetensors"]},
        {"lora": ["one.safetensors"]},
        {"lora": []},
        {"embedding": ["one.safetensors:<other>"]},
        {"embedding": ["two.safetensors"]},
    ):
        with pytest.raises(UserError, match=rf"another run \({next(iter(other))} "):
            there(options, **{**same, **other})
