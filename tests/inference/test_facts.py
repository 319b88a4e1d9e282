"""What is read from a model's YAML, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ldm.inference.facts import ModelFacts, read_facts
from ldm.util import ConfigError
from tests.inference.tiny import DATA

TINY = DATA / "tiny_text2image.yaml"


def test_facts_of_published_configs():
    unet = {"params": {"channel_mult": [1, 2, 4, 4], "out_channels": 4}}
    stage = {"params": {"ddconfig": {"ch_mult": [1, 2, 4, 4]}}}
    assert _facts(image_size=64, channels=4, unet_config=unet, first_stage_config=stage).multiple == 64
    assert _facts(image_size=[32, 32], channels=4, unet_config=unet, first_stage_config=stage).image_size == 32
    patched = {"params": {"ddconfig": {"ch_mult": [1, 2, 2], "patch_size": 4}}}
    assert _facts(image_size=16, unet_config=unet, first_stage_config=patched).factor == 16
    assert _facts(image_size=16, unet_config=unet, first_stage_config={"target": "IdentityFirstStage"}).factor == 1


def _facts(**params: object) -> ModelFacts:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(yaml.safe_dump({"model": {"target": "x", "params": params}}))
        file.flush()
        return read_facts(file.name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "model: 3",
        "model: {params: {}}",
        "model: {",
        "a: ${b}",
        "sampling: {stepz: 3}",
        "sampling: {steps: x}",
        "sampling: {scale: true}",
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path: Path, text: str):
    if text.startswith("sampling"):
        text += "\n" + TINY.read_text().partition("sampling:")[0]
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        read_facts(tmp_path / "c.yaml")
