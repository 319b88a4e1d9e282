"""The benchmark: both libraries do the same work, in turn, and what cannot be compared is refused. No time is asserted."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm.metrics import first_picture as processes
from ldm.metrics.against_diffusers import Contest, Work, check_diffusers, relative
from ldm.metrics.stopwatch import Pair, Row, alternate, markdown, measure
from ldm.util import UserError

ROOT = Path(__file__).resolve().parents[2]
TINY = Work(size="tiny", latent=8, steps=2)


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------------------- the clock
def test_the_median_of_the_rounds_ratios_and_its_quartiles() -> None:
    row = Row("x", ours=(1.0, 2.0, 1.0, 4.0, 1.0), theirs=(2.0, 2.0, 3.0, 4.0, 4.0), difference=0.0)
    assert row.ratios == [2.0, 1.0, 3.0, 1.0, 4.0]
    assert row.ratio == 2.0 and row.spread == (1.0, 3.0)
    assert Row("x", (2.0,), (3.0,), 0.0).spread == (1.5, 1.5)


def test_the_sides_take_turns_at_being_first() -> None:
    order: list[str] = []
    ours, theirs = alternate(3, lambda: order.append("o") or len(order), lambda: order.append("t") or len(order))
    assert "".join(order) == "ottoot"
    assert (ours, theirs) == ([1, 4, 5], [2, 3, 6])


def test_only_the_call_is_timed_and_the_device_is_waited_for() -> None:
    ticks, events = iter(range(100)), []
    pair = Pair("x", lambda: events.append("o"), lambda: events.append("t"), lambda a, b: 0.0)
    row = measure(pair, 2, warmup=3, clock=lambda: float(next(ticks)), synchronize=lambda: events.append("s"))
    assert row.ours == row.theirs == (1.0, 1.0)
    assert "".join(events) == "ototot" + "sosstsstssos"


def test_different_work_is_not_timed() -> None:
    pair = Pair("x", lambda: torch.ones(2), lambda: torch.tensor([1.0, 1.1]), relative)
    assert measure(pair, 1, tolerance=0.1).difference == pytest.approx(0.0673, abs=1e-3)
    with pytest.raises(UserError, match=r"x: the results differ by 0.067, more than 0.01: not the same work"):
        measure(pair, 1, tolerance=0.01)
    with pytest.raises(UserError, match="differ by nan"):
        measure(Pair("x", lambda: torch.tensor([float("nan")]), lambda: torch.ones(1), relative), 1, tolerance=0.1)
    with pytest.raises(UserError, match="shapes"):
        measure(Pair("x", lambda: torch.ones(1), lambda: torch.ones(2), relative), 1)
    with pytest.raises(UserError, match="0 rounds"):
        measure(pair, 0)


def test_the_table() -> None:
    rows = [Row("a", (0.5, 0.25), (0.5, 1.0), 2e-6), Row("b", (1234.0,), (2468.0,), 0.0, "MB")]
    assert markdown(rows).splitlines()[2:] == [
        "| a | 375 ms | 750 ms | **2.50** (1.75 to 3.25) | 2e-06 |",
        "| b | 1,234 MB | 2,468 MB | **2.00** (2.00 to 2.00) | 0 |",
    ]


# ---------------------------------------------------------------------------------------------------------------- the work
@pytest.mark.parametrize("name", ["unet", "txt2img", "decode", "encode", "training"])
def test_both_libraries_do_the_same(name: str) -> None:
    pair = getattr(Contest(TINY), name)()
    for _ in range(2):  # the second training step sees what the first has changed
        ours, theirs = pair.ours(), pair.theirs()
        assert torch.isfinite(torch.as_tensor(ours)).all()
        assert relative(ours, theirs) < 1e-4


def test_training_moves_its_own_weights_only() -> None:
    contest = Contest(TINY)
    before = {name: value.clone() for name, value in contest.unets[0].state_dict().items()}
    pair = contest.training()
    losses = [(float(pair.ours()), float(pair.theirs())) for _ in range(3)]
    assert losses[0][0] != losses[2][0]
    assert all(torch.equal(value, before[name]) for name, value in contest.unets[0].state_dict().items())


def test_the_networks_share_their_weights() -> None:
    ours, theirs = Contest(TINY).unets
    places = {p.untyped_storage().data_ptr() for p in theirs.parameters()}
    assert {p.untyped_storage().data_ptr() for p in ours.parameters()} == places


def test_one_folder_gives_both_libraries_the_same_picture(tmp_path: Path) -> None:
    folder = processes.write_folder(TINY, tmp_path)
    options = {"latent": 8, "steps": 2, "scale": 3.0, "device": "cpu", "dtype": "float32"}
    ours, theirs = processes.draw_ours(str(folder), options), processes.draw_theirs(str(folder), options)
    assert ours.shape == (64, 64, 3) and ours.dtype == np.uint8 and ours.std() > 1
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


# ------------------------------------------------------------------------------------------------------------- the program
def run(script: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    return script.main()


def test_the_program_prints_a_table_and_how_it_was_made(script, monkeypatch, capsys) -> None:
    assert run(script, monkeypatch, "unet", "--size", "tiny", "--latent", "8", "--rounds", "1", "--warmup", "1", "--device", "cpu") == 0
    header, _, row, _, made = capsys.readouterr().out.strip().splitlines()
    assert header.startswith("| what | ours | diffusers |") and row.startswith("| UNet, 2 x (4, 8, 8) |")
    assert made.startswith(f"torch {torch.__version__}, diffusers ") and "latent 8x8, batch 1, 1 rounds, wall clock" in made


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("vae",), "'vae' is unknown: choose from unet, txt2img"),
        (("--size", "large"), "size 'large' is unknown: use small, sd1"),
        (("--latent", "30"), "latent 30 must be a multiple of 8"),
        (("--steps", "7"), "7 steps divide 1000"),
        (("--threads", "0"), "--threads 0 must be 1 or more"),
        (("--device", "nonsense"), "device 'nonsense' is not available here"),
    ],
)
def test_what_cannot_be_measured_is_refused(script, monkeypatch, capsys, words, told) -> None:
    assert run(script, monkeypatch, *words) == 2
    assert told in capsys.readouterr().err


def test_without_diffusers_the_extra_is_named(script, monkeypatch, capsys) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "diffusers" else found(name, *rest))
    with pytest.raises(UserError, match=r'pip install -e "\.\[test\]"'):
        check_diffusers()
    assert run(script, monkeypatch, "unet", "--device", "cpu") == 2
    assert "diffusers is not installed" in capsys.readouterr().err
