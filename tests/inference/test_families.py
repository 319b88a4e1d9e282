"""What a file holds and which config draws with it, found without opening more than its header."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.inference.checkpoint import load_weights, read_state_dict, save_weights
from ldm.inference.facts import REPO, SHIPPED_CONFIG, SHIPPED_WEIGHTS, read_config, read_facts
from ldm.inference.models import drawing_config
from ldm.inference.weights.families import Found, config_prediction, identify, resolve_model
from ldm.inference.weights.inspection import describe
from ldm.util import CheckpointError, ConfigError, UserError, instantiate_from_config
from tests.inference.diffusers_models import parts, save

SD = "configs/stable-diffusion/"
# Config whose model is looked at -> family, prediction, and the config that is found.
KNOWN = {
    SD + "v1-inference.yaml": ("sd1", "eps", SD + "v1-inference.yaml"),
    SD + "v1-inpainting-inference.yaml": ("sd1-inpainting", "eps", SD + "v1-inpainting-inference.yaml"),
    SD + "v2-inference.yaml": ("sd2", None, None),
    SD + "v2-inpainting-inference.yaml": ("sd2-inpainting", "eps", SD + "v2-inpainting-inference.yaml"),
    SD + "v2-midas-inference.yaml": ("sd2-depth", "eps", SD + "v2-midas-inference.yaml"),
    SD + "x4-upscaling.yaml": ("x4-upscaler", "v", SD + "x4-upscaling.yaml"),
    SD + "v2-1-stable-unclip-h-inference.yaml": ("unclip-h", "v", SD + "v2-1-stable-unclip-h-inference.yaml"),
    SD + "v2-1-stable-unclip-l-inference.yaml": ("unclip-l", "v", SD + "v2-1-stable-unclip-l-inference.yaml"),
    SD + "sd_xl_base.yaml": ("sdxl-base", "eps", SD + "sd_xl_base.yaml"),
    SD + "sd_xl_refiner.yaml": ("sdxl-refiner", "eps", SD + "sd_xl_refiner.yaml"),
    "models/ldm/text2img256/config.yaml": ("ldm", "eps", "models/ldm/text2img256/config.yaml"),
    "configs/latent-diffusion/txt2img-1p4B-eval.yaml": ("ldm", "eps", "configs/latent-diffusion/txt2img-1p4B-eval.yaml"),
    "configs/latent-diffusion/cin256-v2.yaml": ("ldm", "eps", "configs/latent-diffusion/cin256-v2.yaml"),
    "models/ldm/bsr_sr/config.yaml": ("ldm", "eps", "models/ldm/bsr_sr/config.yaml"),
    "models/ldm/inpainting_big/config.yaml": ("ldm", "eps", "models/ldm/inpainting_big/config.yaml"),
    "models/ldm/layout2img-openimages256/config.yaml": ("ldm", "eps", "models/ldm/layout2img-openimages256/config.yaml"),
    "models/ldm/lsun_churches256/config.yaml": ("ldm", "eps", "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml"),
    "models/ldm/semantic_synthesis256/config.yaml": ("ldm", "eps", "models/ldm/semantic_synthesis256/config.yaml"),
    "models/ldm/ffhq256/config.yaml": ("ldm", "eps", "configs/latent-diffusion/celebahq-ldm-vq-4.yaml"),
    "models/first_stage_models/vq-f8/config.yaml": ("first-stage", None, "models/first_stage_models/vq-f8/config.yaml"),
    "models/first_stage_models/vq-f4-noattn/config.yaml": ("first-stage", None, "models/first_stage_models/vq-f4-noattn/config.yaml"),
    "models/first_stage_models/kl-f16/config.yaml": ("first-stage", None, "models/first_stage_models/kl-f16/config.yaml"),
    "models/shapes/config.yaml": ("ldm", "v", "models/shapes/config.yaml"),
}


def names_and_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Of the model that a config describes, built without memory."""
    model = config["model"]
    model = model if "ddconfig" in model["params"] else drawing_config(model)
    with torch.device("meta"):
        built = instantiate_from_config({**model, "params": {k: v for k, v in model["params"].items() if k != "ckpt_path"}})
    return {name: value.shape for name, value in built.state_dict().items() if not name.startswith("loss.")}


def header_only(path: Path, shapes: dict[str, torch.Size], metadata: dict[str, str] | None = None) -> Path:
    """A .safetensors file of such tensors in half precision; its numbers are a hole in the file and take no room on the disk."""
    place, table = 0, {"__metadata__": metadata} if metadata else {}
    for name, shape in shapes.items():
        table[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, place + 2 * shape.numel()]}
        place += 2 * shape.numel()
    content = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(content)) + content)
        file.truncate(8 + len(content) + place)
    return path


def short(path: Path | None) -> str | None:
    return None if path is None else path.relative_to(REPO).as_posix()


@pytest.mark.parametrize("name", KNOWN)
def test_every_family_is_known_by_its_header(name: str, tmp_path: Path) -> None:
    family, prediction, config = KNOWN[name]
    shapes = names_and_shapes(read_config(REPO / name))
    found = identify(header_only(tmp_path / "m.safetensors", shapes))
    assert (found.family, found.prediction, found.dtype, found.ema) == (family, prediction, "float16", False)
    assert found.elements == sum(shape.numel() for shape in shapes.values())
    if config is not None:
        assert short(found.config) == config
    if prediction is not None:
        assert resolve_model(None, str(tmp_path / "m.safetensors")) == (str(REPO / config), str(tmp_path / "m.safetensors"))
    assert describe(tmp_path / "m.safetensors")[0].startswith("family:")


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Size]]:
    shapes = names_and_shapes(read_config(REPO / SD / "v2-inference.yaml"))
    return header_only(tmp_path_factory.mktemp("sd2") / "m.safetensors", shapes), shapes


@pytest.fixture(scope="module")
def sd1_shapes() -> dict[str, torch.Size]:
    return names_and_shapes(read_config(REPO / SD / "v1-inference.yaml"))


def test_sd2_without_a_hint_asks_for_the_flag(sd2: tuple) -> None:
    path, _ = sd2
    with pytest.raises(UserError, match=r"nothing in it says what it predicts: give --prediction eps .* or --prediction v") as error:
        resolve_model(None, str(path))
    assert "\n" not in str(error.value)
    told = dict(line.split(": ", 1) for line in describe(path))
    assert "not told by the weights" in told["predicts"]
    assert told["config"].split() == [SD + "v2-inference.yaml", "(eps)", "or", SD + "v2-inference-v.yaml", "(v)"]
    assert short(Path(resolve_model(None, str(path), "eps")[0])) == SD + "v2-inference.yaml"
    assert short(Path(resolve_model(None, str(path), "v")[0])) == SD + "v2-inference-v.yaml"
    with pytest.raises(UserError, match="eps, v, x0"):
        resolve_model(None, str(path), "noise")


@pytest.mark.parametrize(
    ("marker", "metadata", "prediction"),
    [
        ("v_pred", {}, "v"),
        (None, {"modelspec.prediction_type": "v"}, "v"),
        (None, {"modelspec.prediction_type": "epsilon"}, "eps"),
        (None, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v"),
        (None, {"modelspec.architecture": "stable-diffusion-v2-512"}, "eps"),
    ],
)
def test_hints_in_the_file(sd2: tuple, tmp_path: Path, marker: str | None, metadata: dict, prediction: str) -> None:
    shapes = sd2[1] | ({marker: torch.Size([0])} if marker else {})
    path = header_only(tmp_path / "m.safetensors", shapes, metadata)
    assert identify(path).prediction == prediction
    assert config_prediction(read_config(resolve_model(None, str(path))[0])) == prediction
    other = {"v": "eps", "eps": "v"}[prediction]
    assert config_prediction(read_config(resolve_model(None, str(path), other)[0])) == other, "the flag wins"


def test_a_yaml_beside_the_weights_decides(sd2: tuple, tmp_path: Path) -> None:
    path = header_only(tmp_path / "m.safetensors", sd2[1])
    shutil.copy(REPO / SD / "v2-inference-v.yaml", tmp_path / "m.yaml")
    assert resolve_model(None, str(path)) == (str(tmp_path / "m.yaml"), str(path))
    assert config_prediction(read_config(resolve_model(None, str(path), "eps")[0])) == "eps"


def test_markers_change_the_config_of_another_family(sd1_shapes: dict, tmp_path: Path) -> None:
    path = header_only(tmp_path / "m.safetensors", {**sd1_shapes, "v_pred": torch.Size([0]), "ztsnr": torch.Size([0])})
    config, _ = resolve_model(None, str(path))
    params = config["model"]["params"]
    assert (params["parameterization"], params["rescale_betas_zero_snr"]) == ("v", True)
    assert read_facts(config) == read_facts(config) and read_facts(config).image_size == 64
    assert "predicts:    v, with zero terminal SNR" in describe(path)


def test_sdxl_that_predicts_v(tmp_path: Path) -> None:
    shapes = names_and_shapes(read_config(REPO / SD / "sd_xl_base.yaml"))
    path = header_only(tmp_path / "m.safetensors", {**shapes, "v_pred": torch.Size([0])})
    config, _ = resolve_model(None, str(path))
    assert config_prediction(config) == "v"
    assert (read_facts(config).image_size, read_facts(config).factor, identify(path).layout) == (128, 8, "sgm")
    path = header_only(tmp_path / "n.safetensors", {**shapes, "v_pred": torch.Size([0]), "ztsnr": torch.Size([0])})
    denoiser = instantiate_from_config(resolve_model(None, str(path))[0]["model"]["params"]["denoiser_config"])
    assert denoiser.discretization.alphas_cumprod[-1] == 0.0 and denoiser.sigmas.isfinite().all()
    path = header_only(tmp_path / "o.safetensors", {**shapes, "ztsnr": torch.Size([0])})
    with pytest.raises(ConfigError, match="zero terminal SNR needs a prediction of v"):
        resolve_model(None, str(path))
    assert config_prediction(resolve_model(None, str(path), "v")[0]) == "v"


def test_spellings_are_seen_through(sd1_shapes: dict, tmp_path: Path) -> None:
    flat = {"module." + name.replace("text_model.", ""): shape for name, shape in sd1_shapes.items()}
    flat["module.model_ema.diffusion_modeltime_embed0weight"] = torch.Size([1280, 320])
    found = identify(header_only(tmp_path / "m.safetensors", flat))
    assert (found.family, found.ema, short(found.config)) == ("sd1", True, SD + "v1-inference.yaml")


def test_a_pickle_and_a_folder(sd1_shapes: dict, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in sd1_shapes.items()}
    torch.save({"state_dict": {n: torch.zeros(1, dtype=torch.bfloat16).expand(v.shape) for n, v in state.items()}}, tmp_path / "m.ckpt")
    found = identify(tmp_path / "m.ckpt")
    assert (found.family, found.dtype, short(found.config)) == ("sd1", "bfloat16", SD + "v1-inference.yaml")
    found = identify(save(tmp_path / "folder", parts("sd2")))
    assert (found.family, found.layout, found.prediction, found.config) == ("ldm", "diffusers", "v", None)
    assert found.anatomy is not None and found.anatomy.conditions == ("open_clip",)


def test_weights_of_another_family_are_refused_by_name(sd2: tuple) -> None:
    with torch.device("meta"):
        model = instantiate_from_config(drawing_config(read_config(REPO / SD / "v1-inference.yaml")["model"]))
    with pytest.raises(CheckpointError, match=r"does not fit this model: it lacks .* The file holds Stable Diffusion 2\.x: ") as error:
        load_weights(model, sd2[0])
    assert "\n" not in str(error.value)


ADDITIONS = {
    "lora": {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)},
    "controlnet": {"control_model.time_embed.0.weight": (4, 4)},
    "embedding": {"emb_params": (2, 768)},
    "safety-checker": {"concept_embeds": (17, 768), "concept_embeds_weights": (17,)},
    "unknown": {"some.weight": (2, 2)},
}


@pytest.mark.parametrize("family", ADDITIONS)
def test_what_is_no_model_is_called_by_its_name(tmp_path: Path, family: str) -> None:
    path = header_only(tmp_path / "m.safetensors", {name: torch.Size(shape) for name, shape in ADDITIONS[family].items()})
    found = identify(path)
    assert found.family == family
    with pytest.raises(UserError, match=found.title.split(":")[0]):
        resolve_model(None, str(path))
    if family == "lora":
        assert found.base == "Stable Diffusion 1.x"
        assert describe(path)[0].endswith("no model, of Stable Diffusion 1.x")


def test_a_model_nobody_knows_needs_its_config(tiny_ckpt: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_ckpt, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"latent diffusion model; no config that ships fits it: name its YAML by --config"):
        resolve_model(None, str(tmp_path / "m.safetensors"))
    config = str(tiny_ckpt.with_name("config.yaml"))
    assert resolve_model(config, str(tmp_path / "m.safetensors")) == (config, str(tmp_path / "m.safetensors"))


def test_a_config_in_the_header(tiny_ckpt: Path, tmp_path: Path) -> None:
    config = read_config(tiny_ckpt.with_name("config.yaml"))
    path = save_weights({"w": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"ldm.config": config})
    assert resolve_model(None, str(path))[0] == config
    bad = save_weights({"w": torch.zeros(1)}, tmp_path / "n.safetensors", metadata={"ldm.config": "{"})
    with pytest.raises(ConfigError, match="the config in its header is damaged"):
        resolve_model(None, str(bad))


def test_the_model_that_ships_and_what_is_missing(tmp_path: Path) -> None:
    assert resolve_model(None, None) == (str(SHIPPED_CONFIG), str(SHIPPED_WEIGHTS))
    shutil.copy(SHIPPED_WEIGHTS, tmp_path / "alone.safetensors")
    assert resolve_model(None, str(tmp_path / "alone.safetensors"))[0] == str(SHIPPED_CONFIG)
    with pytest.raises(UserError, match=r"checkpoint .* does not exist"):
        resolve_model(None, str(tmp_path / "gone.ckpt"))
    with pytest.raises(UserError, match=r"config .* does not exist"):
        resolve_model("gone.yaml", str(tmp_path / "alone.safetensors"))
    with pytest.raises(UserError, match="no weights"):
        resolve_model(str(REPO / SD / "v1-inference.yaml"), None)


@pytest.mark.parametrize("damage", ["header", "length", "data", "json"])
def test_damaged_headers(tmp_path: Path, damage: str) -> None:
    path = save_weights({"w": torch.zeros(100)}, tmp_path / "m.safetensors")
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    broken = {
        "header": content[:20],
        "length": struct.pack("<Q", 1 << 40) + content[8:],
        "data": content[:-100],
        "json": content[:8] + b"{" * length + content[8 + length :],
    }[damage]
    path.write_bytes(broken)
    with pytest.raises(CheckpointError, match="damaged or cut short") as error:
        identify(path)
    assert "\n" not in str(error.value)


def test_a_header_whose_length_begins_as_a_pickle_does(tmp_path: Path) -> None:
    for extra in range(0, 400, 8):
        path = save_weights({"w": torch.arange(3.0)}, tmp_path / f"{extra}.safetensors", metadata={"padding": "x" * extra})
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert identify(path).elements == 3
    assert torch.equal(read_state_dict(path)["w"], torch.arange(3.0))


def test_found_is_plain_data() -> None:
    assert Found("sd1", "eps", False, "float16", 1, "ldm").title == "Stable Diffusion 1.x"
