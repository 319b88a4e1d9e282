"""What a record says of the files it was drawn with, and what is refused or told when one differs."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ldm.inference import record
from ldm.inference.facts import read_config
from ldm.inference.options import Options
from ldm.inference.record import check_record, config_hash, weights_hashes
from ldm.util import UserError
from tests.inference.tiny import DATA

TINY = DATA / "tiny_text2image.yaml"


@pytest.fixture
def options(tmp_path: Path) -> Options:
    (tmp_path / "m.ckpt").write_bytes(b"weights")
    (tmp_path / "m.yaml").write_text(TINY.read_text())
    return Options("txt2img", str(tmp_path / "m.yaml"), str(tmp_path / "m.ckpt"), True)


def made(options: Options, **changes: Any) -> dict[str, Any]:
    """What of a record is checked."""
    said = {"batch": {"prompts": ["x"], "negatives": [""], "seeds": [1], "index": 0, "start": 0}}
    said |= {**weights_hashes(options), "machine": {"device": "cpu"}, "versions": {"ldm": record.version()}}
    return json.loads(json.dumps(said | changes))


def check(said: dict[str, Any], options: Options) -> None:
    check_record(said, "a.png", weights_hashes(options), {}, {}, "cpu")


def rewritten(options: Options, old: str, new: str) -> None:
    text = Path(options.config).read_text()
    assert old in text
    Path(options.config).write_text(text.replace(old, new))


def test_the_config_must_say_the_same_of_its_model(options: Options):
    said = made(options)
    check(said, options)
    rewritten(options, "steps: 4", "steps: 9")  # of `sampling:`, which the recorded flags stand above
    Path(options.config).write_text("# a remark\n" + Path(options.config).read_text())
    check(said, options)
    rewritten(options, "parameterization: v", "parameterization: eps")
    with pytest.raises(UserError, match=r"^'a\.png' was drawn with another config \(.*m\.yaml, sha256 .*\): name that one by --config$"):
        check(said, options)
    del said["model"]["config_sha256"]  # as older versions wrote it
    check(said, options)


def test_so_must_the_refiners(options: Options, tmp_path: Path):
    refined = copy.copy(options)
    (tmp_path / "r.yaml").write_text(TINY.read_text())
    refined.refiner, refined.refiner_config = options.ckpt, str(tmp_path / "r.yaml")
    said = made(refined)
    check(said, refined)
    (tmp_path / "r.yaml").write_text(TINY.read_text().replace("parameterization: v", "parameterization: eps"))
    with pytest.raises(UserError, match="name that one by --refiner_config"):
        check(said, refined)


def test_a_config_found_from_the_weights_may_change_with_the_version(options: Options, caplog: pytest.LogCaptureFixture):
    options.config = read_config(options.config)
    said = made(options)
    check(said, options)
    options.config["model"]["params"]["parameterization"] = "eps"
    with pytest.raises(UserError, match=r"found from the weights, .*leave out --config"):
        check(said, options)
    said["versions"]["ldm"] = "0.0.1"
    with caplog.at_level(logging.WARNING):
        check(said, options)
    assert "with ldm 0.0.1: with" in caplog.text


def test_hashes_of_configs():
    plain = {"model": {"target": "x", "params": {1: [0.5, None], "a": {"b": "out/model"}}}}
    other = {"model": {"params": {"a": {"b": "moved"}, "1": [0.5, None]}, "target": "x"}, "sampling": {"steps": 3}}
    assert config_hash(plain, "out/model/") == config_hash(other, "moved"), "a folder of weights may be moved"
    assert config_hash(plain, "m.ckpt") != config_hash(other, "m.ckpt")


@pytest.mark.parametrize("part", ["model", "machine", "versions", "inputs", "batch"])
@pytest.mark.parametrize("value", [5, "text", [1], None])
def test_a_damaged_record_is_no_traceback(options: Options, part: str, value: Any):
    said = made(options, **{part: value})
    if part in ("model", "batch"):
        with pytest.raises(UserError):
            check(said, options)
    else:
        check(said, options)
