"""Names and shapes of published checkpoints: latent diffusion, Stable Diffusion, their autoencoders; and the configs that ship for them.

`tests/reference/manifests` holds, for each, the config's values (`*.config.json`) and what the published code has in its state
dict for it (`*.keys.json.gz`: name -> shape; `*.keys-with-loss.json.gz`: with the discriminator and the perceptual loss).
"""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from ldm.inference.weights.key_names import published
from ldm.inference.zoo import build_on_meta
from tests.contracts.shipped import ROOT, Shapes, built, load, summarise

MANIFESTS = ROOT / "tests" / "reference" / "manifests"
SHIPPED = {
    "v1-inference": "configs/stable-diffusion/v1-inference.yaml",
    "v2-inference": "configs/stable-diffusion/v2-inference.yaml",
    "v2-inference-v": "configs/stable-diffusion/v2-inference-v.yaml",
    "v2-inpainting-inference": "configs/stable-diffusion/v2-inpainting-inference.yaml",
    "v2-1-stable-unclip-h-inference": "configs/stable-diffusion/v2-1-stable-unclip-h-inference.yaml",
    "autoencoder_kl_32x32x4": "configs/autoencoder/autoencoder_kl_32x32x4.yaml",
    "autoencoder_kl_64x64x3": "configs/autoencoder/autoencoder_kl_64x64x3.yaml",
    "kl-f16": "models/first_stage_models/kl-f16/config.yaml",
    "vq-f4-noattn": "models/first_stage_models/vq-f4-noattn/config.yaml",
    "vq-f8": "models/first_stage_models/vq-f8/config.yaml",
    "celebahq-ldm-vq-4": "configs/latent-diffusion/celebahq-ldm-vq-4.yaml",
    "cin256-v2": "configs/latent-diffusion/cin256-v2.yaml",
    "txt2img-1p4B-eval": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "inpainting_big": "models/ldm/inpainting_big/config.yaml",
    "lsun_churches256": "models/ldm/lsun_churches256/config.yaml",
}
AUTOENCODERS = [name for name, path in SHIPPED.items() if path.startswith(("configs/autoencoder/", "models/first_stage_models/"))]
DIFFUSION = [name for name in SHIPPED if name not in AUTOENCODERS]


def config_of(name: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f"{name}.config.json").read_text())


def manifest(name: str, kind: str = "keys") -> Shapes:
    with gzip.open(MANIFESTS / f"{name}.{kind}.json.gz", "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file).items()}


def assert_same(shapes: Shapes, expected: Shapes) -> None:
    """Same names, same shapes. CLIP's position_ids are a constant that the installed transformers no longer stores."""
    got = {published(key): shape for key, shape in shapes.items()}
    optional = {key for key in expected if key.endswith(".position_ids")}
    wanted = {key: shape for key, shape in expected.items() if key not in optional}
    got = {key: shape for key, shape in got.items() if key not in optional}
    assert sorted(wanted.keys() - got.keys()) == [], "missing"
    assert sorted(got.keys() - wanted.keys()) == [], "unexpected"
    assert {key: shape for key, shape in got.items() if shape != wanted[key]} == {}, "other shapes"


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_model(name):
    assert_same(built(SHIPPED[name]).shapes, manifest(name))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_with_its_loss(name):
    assert_same(built(SHIPPED[name]).shapes, manifest(name, "keys-with-loss"))


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_autoencoder_without_a_loss(name):
    model = config_of(name)["model"]
    model["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
    assert_same(summarise(build_on_meta(model)).shapes, manifest(name))


def test_first_stage_names_are_those_of_the_autoencoder():
    """So an autoencoder's file can be taken out of a Stable Diffusion checkpoint, and put in."""
    first = {
        key.removeprefix("first_stage_model."): s for key, s in manifest("v1-inference").items() if key.startswith("first_stage_model.")
    }
    assert first == manifest("autoencoder_kl_32x32x4")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_have_the_published_values(name):
    assert load(SHIPPED[name])["model"] == config_of(name)["model"]


def test_every_manifest_is_held_by_a_test():
    names = {path.name.partition(".")[0] for path in MANIFESTS.iterdir()}
    assert names == set(SHIPPED)
