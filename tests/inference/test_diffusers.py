"""Diffusers folders: the same model as diffusers', read in every form, and the way there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from ldm.inference.checkpoint import load_weights, read_metadata, read_state_dict, save_weights
from ldm.inference.facts import SHIPPED_WEIGHTS
from ldm.inference.models import load_model
from ldm.inference.weights import key_names
from ldm.inference.weights.convert import convert
from ldm.inference.weights.diffusers_names import DEPTH, shape_of, to_ours, to_theirs
from ldm.inference.weights.families import identify, resolve_model
from ldm.modules.midas.dpt import DPTHybrid
from ldm.util import CheckpointError, UserError
from tests.inference.diffusers_models import depth_estimator, depth_parts, parts, refiner_parts, save, unclip_parts, upscaler_parts

FAMILIES = ("sd1", "sd1-inpainting", "sd2", "sdxl")
WORDS = ["a red circle left of a blue square", ""]


def load(path: Path, **options: Any) -> Any:
    return load_model(*resolve_model(None, str(path), **options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """family -> (folder, diffusers' own parts)."""
    made = {}
    for family in FAMILIES:
        models = parts(family)
        made[family] = (save(tmp_path_factory.mktemp("diffusers") / family, models), models)
    return made


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_noise_picture_and_embedding(folders: dict, family: str) -> None:
    folder, theirs = folders[family]
    ours = load(folder)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, theirs["unet"].config.in_channels, 8, 8, generator=g)
    t, context = torch.tensor([7, 900]), torch.randn(2, 77, theirs["unet"].config.cross_attention_dim, generator=g)
    network = ours.model.diffusion_model
    if family == "sdxl":
        pooled, sizes = torch.randn(2, 48, generator=g), torch.randint(0, 1024, (2, 6), generator=g).float()
        vector = torch.cat([pooled, *(e(sizes[:, 2 * i : 2 * i + 2]) for i, e in enumerate(ours.conditioner.embedders[2:]))], dim=1)
        got = network(x, t, context, vector)
        want = theirs["unet"](x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    else:
        got, want = network(x, t, context), theirs["unet"](x, t, context).sample
    assert relative(got, want) < 1e-5
    z, image = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 3, 16, 16, generator=g)
    assert relative(ours.first_stage_model.decode(z), theirs["vae"].decode(z).sample) < 1e-5
    moments = ours.first_stage_model.quant_conv(ours.first_stage_model.encoder(image))
    assert relative(moments, theirs["vae"].encode(image).latent_dist.parameters) < 1e-5
    assert ours.scale_factor == pytest.approx(theirs["vae"].config.scaling_factor)
    check_embeddings(ours, theirs, family)


def check_embeddings(ours: Any, theirs: dict[str, Any], family: str) -> None:
    if family != "sdxl":
        ids = ours.cond_stage_model.tokenize(WORDS)
        assert relative(ours.get_learned_conditioning(WORDS), theirs["text_encoder"](ids).last_hidden_state) < 1e-5
        return
    first, second = ours.conditioner.embedders[:2]
    one = theirs["text_encoder"](first.tokenize(WORDS), output_hidden_states=True)
    two = theirs["text_encoder_2"](second.tokenize(WORDS), output_hidden_states=True)
    assert relative(first(WORDS), one.hidden_states[-2]) < 1e-5
    features, pooled = second(WORDS)
    assert relative(features, two.hidden_states[-2]) < 1e-5
    assert relative(pooled, two.text_embeds) < 1e-5


# ---------------------------------------------------------------------------------------------- models with more to look at
def there_and_back(folder: Path, tmp_path: Path, pipeline: str) -> Path:
    """To a single file and to a folder again: the weights are the same, and diffusers loads them. Gives the file."""
    convert(folder, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "again")
    want, got = read_state_dict(folder), read_state_dict(tmp_path / "again")
    assert all(torch.equal(got[name], value) for name, value in want.items())
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "again", local_files_only=True)
    assert type(loaded).__name__ == pipeline
    return tmp_path / "model.safetensors"


def test_sdxl_with_zero_terminal_snr(folders: dict, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["sdxl"][0], tmp_path / "folder"))
    settings = folder / "scheduler" / "scheduler_config.json"
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **changed}))
    path = there_and_back(folder, tmp_path, "StableDiffusionXLPipeline")
    for model in (load(folder), load(path), load(tmp_path / "again")):
        assert model.parameterization == "v" and model.schedule.abar[-1] == 0.0
    again = json.loads((tmp_path / "again" / "scheduler" / "scheduler_config.json").read_text())
    assert changed.items() <= again.items()


@torch.no_grad()
def test_the_upscaler(tmp_path: Path) -> None:
    theirs = upscaler_parts()
    folder = save(tmp_path / "folder", theirs)
    path = there_and_back(folder, tmp_path, "StableDiffusionUpscalePipeline")
    for ours in (load(folder), load(path)):
        x, t, context, level = torch.randn(2, 7, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, 32), torch.tensor([0, 39])
        got = ours.model.diffusion_model(x, t, context, level)
        assert relative(got, theirs["unet"](x, t, context, class_labels=level).sample) < 1e-5
        assert (type(ours).__name__, ours.parameterization, ours.low_scale_model.max_noise_level) == ("LatentUpscaleDiffusion", "v", 40)
        noise = theirs["low_res_scheduler"].add_noise(x, torch.ones_like(x), level)
        assert relative(ours.low_scale_model.q_sample(x, level, torch.ones_like(x)), noise) < 1e-5
    settings = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert settings["max_noise_level"] == 40


@torch.no_grad()
def test_unclip(tmp_path: Path) -> None:
    theirs = unclip_parts()
    folder = save(tmp_path / "folder", theirs)
    path = there_and_back(folder, tmp_path, "StableUnCLIPImg2ImgPipeline")
    for ours in (load(folder), load(path)):
        x, t, context, vector = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 32), torch.randn(2, 48)
        got = ours.model.diffusion_model(x, t, context, vector)
        assert relative(got, theirs["unet"](x, t, context, class_labels=vector).sample) < 1e-5
        pixels = torch.randn(2, 3, 32, 32)
        assert relative(ours.embedder.model.encode_image(pixels), theirs["image_encoder"](pixels).image_embeds) < 1e-5
        embedding, normalizer = torch.randn(2, 24), theirs["image_normalizer"]
        assert relative(ours.noise_augmentor.scale(embedding), normalizer.scale(embedding)) < 1e-5
        level, noise = torch.tensor([5, 800]), torch.randn(2, 24)
        want = normalizer.unscale(theirs["image_noising_scheduler"].add_noise(normalizer.scale(embedding), noise, level))
        assert relative(ours.noise_augmentor(embedding, level, noise=noise)[0], want) < 1e-5


def test_names_of_the_depth_estimator() -> None:
    with torch.device("meta"):
        theirs = {name: tuple(value.shape) for name, value in depth_estimator().state_dict().items()}
        ours = {name: tuple(value.shape) for name, value in DPTHybrid().state_dict().items()}
    table = to_ours(DEPTH, theirs)
    assert ours.keys() - table.keys() == {"pretrained.model.head.weight", "pretrained.model.head.bias"}
    assert all(shape_of(recipe, theirs) == ours[name] for name, recipe in table.items())
    back = to_theirs(DEPTH, ours)
    assert {name: shape_of(recipe, ours) for name, recipe in back.items()} == theirs


@pytest.mark.slow
@torch.no_grad()
def test_depth(tmp_path: Path) -> None:
    theirs = depth_parts()
    folder = save(tmp_path / "folder", theirs)
    path = there_and_back(folder, tmp_path, "StableDiffusionDepth2ImgPipeline")
    ours, again = load(path), load(folder).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in ours.state_dict().items())
    x, t, context = torch.randn(2, 5, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 32)
    assert relative(ours.model.diffusion_model(x, t, context), theirs["unet"](x, t, context).sample) < 1e-5
    pixels = torch.rand(1, 3, 384, 384) * 2 - 1  # the only size that transformers takes
    assert relative(ours.depth_model(pixels)[:, 0], theirs["depth_estimator"](pixels).predicted_depth) < 1e-4


@torch.no_grad()
def test_the_refiner(tmp_path: Path) -> None:
    theirs = refiner_parts()
    folder = save(tmp_path / "folder", theirs)
    path = there_and_back(folder, tmp_path, "StableDiffusionXLImg2ImgPipeline")
    for ours in (load(folder), load(path)):
        keys = ["txt", "original_size_as_tuple", "crop_coords_top_left", "aesthetic_score"]
        assert [embedder.input_key for embedder in ours.conditioner.embedders] == keys
        batch = {"txt": WORDS, **{key: torch.tensor([[512.0, 640.0]] * 2) for key in keys[1:3]}, keys[3]: torch.tensor([[6.0]] * 2)}
        cond = ours.conditioner(batch)
        ids = torch.tensor([[512.0, 640.0, 512.0, 640.0, 6.0]] * 2)
        out = theirs["text_encoder_2"](ours.conditioner.embedders[0].tokenize(WORDS), output_hidden_states=True)
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
        added = {"text_embeds": out.text_embeds, "time_ids": ids}
        want = theirs["unet"](x, t, out.hidden_states[-2], added_cond_kwargs=added).sample
        assert relative(ours.model.diffusion_model(x, t, cond["crossattn"], cond["vector"]), want) < 1e-5


# ------------------------------------------------------------------------------------------------------- forms of a folder
def test_shards_variants_and_pickles_hold_the_same(tmp_path: Path) -> None:
    plain = read_state_dict(save(tmp_path / "plain", parts("sd2")))
    again = parts("sd2")  # the same seed
    sharded = read_state_dict(save(tmp_path / "sharded", again, max_shard_size="200KB"))
    assert len(list((tmp_path / "sharded" / "unet").glob("*.safetensors"))) > 3
    assert plain.keys() == sharded.keys() and all(torch.equal(plain[n], sharded[n]) for n in plain)

    halves = {name: model if name == "scheduler" else model.half() for name, model in again.items()}
    half = read_state_dict(save_variant(tmp_path / "half", halves, "fp16", max_shard_size="200KB"))
    assert not list((tmp_path / "half" / "unet").glob("diffusion_pytorch_model.safetensors"))
    assert half.keys() == plain.keys() and all(torch.equal(half[n], plain[n].half()) for n in plain)

    pickled = read_state_dict(save_pickled(tmp_path / "pickled", tmp_path / "plain"))
    assert pickled.keys() == plain.keys() and all(torch.equal(pickled[n], plain[n]) for n in plain)


def save_variant(folder: Path, models: dict[str, Any], variant: str, **options: Any) -> Path:
    for name, model in models.items():
        model.save_pretrained(folder / name, **({} if name == "scheduler" else {"variant": variant, **options}))
    (folder / "model_index.json").write_text("{}")
    return folder


def save_pickled(folder: Path, source: Path) -> Path:
    """The same folder with .bin files."""
    names = {"diffusion_pytorch_model": "diffusion_pytorch_model.bin", "model": "pytorch_model.bin"}
    for path in source.rglob("*"):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            torch.save(load_file(path), target.with_name(names[path.stem]))
        elif path.is_file():
            target.write_bytes(path.read_bytes())
    return folder


def test_full_precision_is_read_where_there_is_a_variant_too(tmp_path: Path) -> None:
    models = parts("sd1")
    folder = save(tmp_path / "model", models)
    want = read_state_dict(folder)
    models["unet"].half().save_pretrained(folder / "unet", variant="fp16")
    assert len(list((folder / "unet").glob("*.safetensors"))) == 2
    assert all(torch.equal(value, want[name]) for name, value in read_state_dict(folder).items())


def test_trained_weights_beside_their_averages(tmp_path: Path) -> None:
    models = parts("sd1")
    folder = save(tmp_path / "model", models)
    averaged = read_state_dict(folder)
    name = "model.diffusion_model.input_blocks.0.0.weight"
    with torch.no_grad():
        models["unet"].conv_in.weight.add_(1)
    models["unet"].save_pretrained(folder / "unet", variant="non_ema")
    state = read_state_dict(folder)
    assert torch.equal(state[name], averaged[name] + 1)
    assert torch.equal(state["model_ema.diffusion_modelinput_blocks00weight"], averaged[name])
    assert identify(folder).ema
    assert torch.equal(load(folder).state_dict()[name], averaged[name]), "the averages draw"


def test_a_part_of_a_folder_fills_a_part(folders: dict) -> None:
    folder, _ = folders["sd2"]
    model, whole = load(folder), read_state_dict(folder)
    for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model."), ("text_encoder", "cond_stage_model.")):
        module = model.get_submodule(prefix.rstrip("."))
        torch.nn.init.zeros_(next(module.parameters()))
        load_weights(module, folder / part)
        assert all(torch.equal(v, whole[prefix + n]) for n, v in module.state_dict().items() if prefix + n in whole)
    load_weights(model.first_stage_model, folder / "vae" / "diffusion_pytorch_model.safetensors")


# ------------------------------------------------------------------------------------------------------------- both ways
@pytest.mark.parametrize("family", FAMILIES)
def test_from_folder_to_file_to_folder(folders: dict, family: str, tmp_path: Path) -> None:
    folder, _ = folders[family]
    convert(folder, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "again")
    for path in folder.rglob("*.safetensors"):
        want, got = load_file(path), load_file(tmp_path / "again" / path.relative_to(folder))
        level = "text_model." if path.parent.name == "text_encoder" else ""  # transformers writes it no more, published folders have it
        assert {level + name for name in want} == set(got)
        assert all(torch.equal(want[name], got[level + name]) and want[name].dtype == got[level + name].dtype for name in want)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_file_to_folder_to_file(folders: dict, family: str, tmp_path: Path) -> None:
    convert(folders[family][0], tmp_path / "model.safetensors")
    state, header = load_file(tmp_path / "model.safetensors"), read_metadata(tmp_path / "model.safetensors")
    embedded = json.loads(header["ldm.config"])
    if family == "sd2":  # as published: a last block that nothing uses, and the contrastive loss's heads
        arch = embedded["model"]["params"]["cond_stage_config"]["params"]
        arch["layer"], arch["arch"]["text_cfg"]["layers"] = "penultimate", 3
        tower = "cond_stage_model.model."
        state |= {n.replace("resblocks.1.", "resblocks.2."): v + 1 for n, v in state.items() if "resblocks.1." in n}
        state |= {tower + "text_projection": torch.randn(32, 32), tower + "logit_scale": torch.tensor(4.6)}
    state |= {
        "betas": torch.rand(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }
    shadows = key_names.shadows([n for n in state if n.startswith("model.")], "model_ema.", "model.")
    state |= {shadow: state[name].half() for name, shadow in shadows.items()}
    given = {**header, "ldm.config": json.dumps(embedded), "title": "mine"}
    save_weights(state, tmp_path / "full.safetensors", metadata=given)

    convert(tmp_path / "full.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[n], state[n]) and again[n].dtype == state[n].dtype for n in state)
    assert read_metadata(tmp_path / "again.safetensors") == given
    assert load(tmp_path / "folder").state_dict().keys() == load(tmp_path / "again.safetensors").state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_what_is_written(folders: dict, family: str, tmp_path: Path) -> None:
    folder, theirs = folders[family]
    convert(folder, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "folder")
    network = UNet2DConditionModel.from_pretrained(tmp_path / "folder" / "unet")
    assert all(torch.equal(v, theirs["unet"].state_dict()[n]) for n, v in network.state_dict().items())
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    names = {"sd1-inpainting": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLPipeline"}
    assert type(pipeline).__name__ == names.get(family, "StableDiffusionPipeline")
    assert pipeline.scheduler.config.prediction_type == theirs["scheduler"].config.prediction_type
    assert pipeline.vae.config.scaling_factor == pytest.approx(theirs["vae"].config.scaling_factor)
    for name in ("vae", "text_encoder", "text_encoder_2"):
        if name in theirs:
            mine, want = getattr(pipeline, name).state_dict(), theirs[name].state_dict()
            assert mine.keys() == want.keys() and all(torch.equal(v, want[n]) for n, v in mine.items())
    ours = load(tmp_path / "folder")
    encoder = ours.conditioner.embedders[0] if family == "sdxl" else ours.cond_stage_model
    ids = pipeline.tokenizer(WORDS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, encoder.tokenize(WORDS))
    if family == "sdxl":
        ids = pipeline.tokenizer_2(WORDS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ids, ours.conditioner.embedders[1].tokenize(WORDS))


# ---------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"time_cond_proj_dim": 256}, "time_cond_proj_dim: 256"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "UNet3DConditionModel"),
        ("unet", {"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, "KDownBlock2D"),
        ("unet", {"in_channels": 8}, "8 input channels"),
        ("unet", {"attention_head_dim": [3, 5]}, r"heads at widths \[32, 64\]"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("vae", {"use_quant_conv": False}, "use_quant_conv: False"),
        ("scheduler", {"beta_schedule": "exotic"}, "exotic"),
    ],
)
def test_what_is_not_supported_is_named(folders: dict, tmp_path: Path, part: str, change: dict, message: str) -> None:
    source = folders["sd1"][0]
    for path in source.rglob("*.json"):
        target = tmp_path / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    config = tmp_path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        resolve_model(None, str(tmp_path))
    assert "\n" not in str(error.value)


def test_damaged_folders(folders: dict, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", parts("sd1"), max_shard_size="200KB")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    shard = next((folder / "unet").glob("*-00002-*.safetensors"))
    shard.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"lacks {shard.name}"):
        read_state_dict(folder)
    content = json.loads(index.read_text())
    content["weight_map"] = {"x": "../../elsewhere.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="no shards beside it"):
        read_state_dict(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match="has no weights that are known here"):
        read_state_dict(folder)
    with pytest.raises(CheckpointError, match="lacks the folder vae"):
        (folder / "vae").rename(tmp_path / "vae")
        read_state_dict(folder)


def test_what_stays_a_single_file_is_told(tiny_ckpt: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        convert(tiny_ckpt, tmp_path)
    with pytest.raises(UserError, match="not written"):
        convert(tiny_ckpt, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match="this model stays a single file"):
        convert(SHIPPED_WEIGHTS, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
