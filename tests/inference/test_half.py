"""Weights held in the type that autocast computes in: the same pictures to the bit, in half of the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.inference import session as sessions
from ldm.inference.args import parse
from ldm.inference.models import half_type
from ldm.inference.session import Session


def flags(ckpt: Path, *more: str) -> list[str]:
    return ["--prompt", "a red ring", "--ckpt", str(ckpt), "--safety", "off", "--steps", "3", "--n_samples", "2", "--device", "cpu", *more]


def weights(session: Session) -> dict[torch.dtype, int]:
    counts: dict[torch.dtype, int] = {}
    for parameter in session.model.model.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return counts


def draw(session: Session) -> list[np.ndarray]:
    return [picture.image for batch in session.batches() for picture in session.pictures(batch)]


@pytest.mark.parametrize("more", [(), ("--H", "128", "--tile", "64")], ids=["whole", "tiles"])
def test_the_same_pictures(tiny_ckpt: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]) -> None:
    options = parse("txt2img", flags(tiny_ckpt, "--precision", "bf16", *more))
    half = Session(options)
    found = draw(half)
    monkeypatch.setattr(sessions, "store_in_half", lambda network, dtype: None)
    full = Session(options)
    assert all(np.array_equal(a, b) for a, b in zip(found, draw(full), strict=True))
    assert set(weights(full)) == {torch.float32}
    assert weights(half)[torch.bfloat16] > 5 * weights(half)[torch.float32]
    assert next(half.model.model.parameters()).dtype == torch.float32
    first_stage = half.model.first_stage_model
    assert {p.dtype for p in first_stage.parameters()} == {torch.float32}
    assert first_stage.decoder.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


def test_full_precision_stays_full(tiny_ckpt: Path) -> None:
    assert set(weights(Session(parse("txt2img", flags(tiny_ckpt, "--precision", "full"))))) == {torch.float32}


def test_what_a_precision_computes_in() -> None:
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert [half_type(cpu, p) for p in ("full", "autocast", "bf16")] == [None, None, torch.bfloat16]
    assert [half_type(other, p) for p in ("full", "autocast", "bf16")] == [None, torch.float16, torch.bfloat16]
