"""LoRA files in every form, held to what diffusers and peft make of the same numbers; and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ldm.inference.checkpoint import read_metadata, read_state_dict, save_weights
from ldm.inference.facts import find_model
from ldm.inference.models import load_model
from ldm.inference.weights.lora_files import Layout, gather, merge_loras, named_weights, read_lora, with_loras, write_lora
from ldm.inference.weights.lora_merge import merge_into_file
from ldm.modules.lora import with_changes
from ldm.training.finetune import LoRA
from ldm.util import CheckpointError, UserError
from tests.inference.diffusers_models import parts, save

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


def ours(folder: Path) -> Any:
    """The model in a diffusers folder."""
    config, ckpt = find_model(None, str(folder), "eps")
    return load_model(config, ckpt)


@torch.no_grad()
def randomise(model: torch.nn.Module, marks: tuple[str, ...] = ("lora_A", "lora_B"), seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in marks):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def network_output(model: Any) -> torch.Tensor:
    """Of our UNet, or of diffusers'."""
    generator = torch.Generator().manual_seed(3)
    x, context, t = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator), torch.tensor([3, 700])
    return model.apply_model(x, t, context) if hasattr(model, "apply_model") else model(x, t, context).sample


IDS = torch.tensor([[49406, 320, 736, 9364, 49407, 49407, 49407]])


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def taught(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """(family, folder of a model, its parts): UNet and text encoder with random adapters of diffusers."""
    folder = tmp_path_factory.mktemp(request.param)
    models = parts(request.param)
    save(folder, models)
    for name, targets in (("unet", [*ATTENTION, "proj_in", "conv1", "ff.net.0.proj"]), ("text_encoder", TEXT)):
        ranks = {"to_k": 2} if name == "unet" else {"k_proj": 2}
        models[name].add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=targets, rank_pattern=ranks))
        randomise(models[name])
        models[name].eval()
    return request.param, folder, models


@pytest.fixture(scope="module")
def written(taught, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What diffusers writes of them."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.loaders.lora_base import _pack_dict_with_prefix

    _, _, models = taught
    folder, state = tmp_path_factory.mktemp("lora"), {}
    metadata: dict[str, Any] = {}
    for name in ("unet", "text_encoder"):
        state[f"{name}_lora_layers"] = get_peft_model_state_dict(models[name])
        config = models[name].peft_config["default"].to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        metadata |= _pack_dict_with_prefix(config, name)
    StableDiffusionLoraLoaderMixin.save_lora_weights(folder, **state)
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": json.dumps(metadata, default=str)})
    return folder


def test_diffusers_adapters_and_our_merged_weights_give_the_same(taught, written):
    _, folder, models = taught
    model = ours(folder)
    before = network_output(model)
    with torch.no_grad(), with_loras(model, [(written, 1.0)]):
        torch.testing.assert_close(network_output(model), network_output(models["unet"]), rtol=1e-4, atol=1e-5)
        encoder = model.cond_stage_model
        wanted = models["text_encoder"](IDS).last_hidden_state
        torch.testing.assert_close(encoder.encode_with_transformer(IDS), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(network_output(model), before) and (before - network_output(models["unet"])).abs().max() > 0.01


def test_every_spelling_says_the_same(taught, written, tmp_path):
    _, folder, _ = taught
    weights = named_weights(ours(folder))
    layers, layout = read_lora(written), Layout.of(weights)
    wanted = gather(weights, [(written, 1.0)])
    for name, forms in spellings(layers).items():
        file = tmp_path / f"{name}.safetensors"
        save_file(forms, file)
        found = gather(weights, [(file, 1.0)])
        assert found.keys() == wanted.keys() or name == "processors", name
        for weight, changes in found.items():
            torch.testing.assert_close(with_changes(weights[weight], changes), with_changes(weights[weight], wanted[weight]))
    assert len(layout.kohya) >= len(layers)


def spellings(layers: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The same layers as other programs call them; alpha folded into `up` where a form has none."""
    forms: dict[str, dict[str, torch.Tensor]] = {name: {} for name in ("kohya", "old", "peft", "processors", "comfy")}
    for path, layer in layers.items():
        part, _, rest = path.partition(".")
        scaled = {"down": layer.down, "up": layer.up * layer.scale}
        text = part != "unet"
        rest_text = rest if rest.startswith("text_model.") or not text else f"text_model.{rest}"
        flat = ("lora_te_" if text else "lora_unet_") + rest_text.replace(".", "_")
        forms["kohya"] |= {f"{flat}.lora_down.weight": layer.down, f"{flat}.lora_up.weight": layer.up}
        forms["kohya"][f"{flat}.alpha"] = torch.tensor(layer.alpha)
        side = "lora_linear_layer" if text else "lora"
        forms["old"] |= {f"{path}.{side}.{role}.weight": value.clone() for role, value in scaled.items()}
        prefix = "base_model.model." + ("text_encoder." + rest_text if text else rest)
        forms["peft"] |= {f"{prefix}.lora_{'A' if role == 'down' else 'B'}.weight": value.clone() for role, value in scaled.items()}
        comfy = f"text_encoder.{rest_text}" if text else f"diffusion_model.{rest}"
        forms["comfy"] |= {f"{comfy}.lora_{role}.weight": value.clone() for role, value in scaled.items()}
        if ".attn" in rest and not text:
            processor = rest.replace(".to_", ".processor.to_").removesuffix(".0")
            forms["processors"] |= {f"{processor}_lora.{role}.weight": value.clone() for role, value in scaled.items()}
    return forms


# --------------------------------------------------------------------------------------------------------------- kohya, written
@pytest.fixture(scope="module")
def trained(taught, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Our model with random adapters as training puts them in, and the file that training writes."""
    _, folder, _ = taught
    model = ours(folder)
    callback = LoRA(rank=4, alpha=6, targets=[*ATTENTION, "proj_in", "in_layers.2", "op"], text_encoder=True, rank_pattern={"to_v": 2})
    callback.add(model)
    randomise(model, seed=1)
    path = tmp_path_factory.mktemp("kohya") / "lora.safetensors"
    callback.export(model.state_dict(), path)
    return model.eval(), path


def test_the_file_of_a_training_gives_what_its_branches_give(taught, trained):
    model, path = trained
    plain = ours(taught[1])
    merge_loras(plain, [(path, 1.0)])
    torch.testing.assert_close(network_output(plain), network_output(model), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        wanted = model.cond_stage_model.encode_with_transformer(IDS)
        torch.testing.assert_close(plain.cond_stage_model.encode_with_transformer(IDS), wanted, rtol=1e-4, atol=1e-5)


def test_diffusers_reads_what_we_write(taught, trained):
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    family, _, _ = taught
    model, path = trained
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
    network = parts(family)["unet"]
    network.load_state_dict({name.replace(".base_layer", ""): value for name, value in taught[2]["unet"].state_dict().items()
                             if "lora_" not in name})  # fmt: skip
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, network.eval())
    torch.testing.assert_close(network_output(network), network_output(model), rtol=1e-4, atol=1e-5)


def test_what_is_written_has_kohyas_names_and_header(trained):
    _, path = trained
    names = set(load_file(path))
    block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert {f"{block}.lora_down.weight", f"{block}.lora_up.weight", f"{block}.alpha"} <= names
    assert "lora_te_text_model_encoder_layers_1_self_attn_k_proj.lora_up.weight" in names
    assert {name.partition(".")[2] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    metadata = read_metadata(path)
    assert metadata["ss_network_module"] == "networks.lora" and "ss_network_dim" not in metadata  # ranks differ


def test_several_with_weights_add_up(taught, written, trained):
    _, folder, _ = taught
    weights = named_weights(ours(folder))
    together = gather(weights, [(written, 0.5), (trained[1], -2.0)])
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    alone = [gather(weights, [(path, 1.0)])[name][0].low_rank.delta() for path in (written, trained[1])]
    torch.testing.assert_close(with_changes(weights[name], together[name]), weights[name].detach() + 0.5 * alone[0] - 2.0 * alone[1])


def test_a_checkpoint_with_a_lora_merged_in_is_the_model_with_it(taught, trained, tmp_path):
    _, folder, _ = taught
    model = ours(folder)
    source = save_weights(model, tmp_path / "model.safetensors", {"title": "small"})
    done = merge_into_file(source, tmp_path / "merged.safetensors", [f"{trained[1]}:0.5", f"{trained[1]}:0.25"])
    assert done["changed"] == len(gather(named_weights(model), [(trained[1], 1.0)]))
    merge_loras(model, [(trained[1], 0.5), (trained[1], 0.25)])
    state = read_state_dict(tmp_path / "merged.safetensors")
    assert done["tensors"] == len(state) == len(read_state_dict(source))
    assert all(torch.equal(value, state[name]) for name, value in named_weights(model).items())
    metadata = read_metadata(tmp_path / "merged.safetensors")
    assert metadata["title"] == "small" and json.loads(metadata["merged_loras"])[1]["weight"] == 0.25
    with pytest.raises(UserError, match="exists already"):
        merge_into_file(source, tmp_path / "merged.safetensors", [str(trained[1])])
    with pytest.raises(UserError, match="is a diffusers folder: make a file of it first"):
        merge_into_file(folder, tmp_path / "other.safetensors", [str(trained[1])])
    with pytest.raises(UserError, match="nothing to merge"):
        merge_into_file(source, tmp_path / "other.safetensors", [])


# -------------------------------------------------------------------------------------------------------------------------- SDXL
def test_sdxl_names_of_both_text_encoders_and_of_kohyas_own_unet(tmp_path):
    folder = save(tmp_path / "model", parts("sdxl"))
    weights = named_weights(ours(folder))
    layout = Layout.of(weights)
    second = "conditioner.embedders.1.model"
    unet = "model.diffusion_model.input_blocks.3.1.transformer_blocks.1.attn2.to_k.weight"
    pairs = {
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k": unet,
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k": unet,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "lora_te2_text_model_encoder_layers_1_mlp_fc1": f"{second}.transformer.resblocks.1.mlp.c_fc.weight",
        "lora_te2_text_model_encoder_layers_1_self_attn_v_proj": f"{second}.transformer.resblocks.1.attn.in_proj_weight",
        "text_encoder_2.text_projection": f"{second}.text_projection",
        "lora_unet_label_emb_0_2": "model.diffusion_model.label_emb.0.2.weight",
        "unet.add_embedding.linear_2": "model.diffusion_model.label_emb.0.2.weight",
    }
    for name, weight in pairs.items():
        rows, columns = weights[weight].shape[:2]
        rows, columns = (columns, rows) if name.endswith("text_projection") else (rows, columns)
        rows //= 3 if "in_proj" in weight else 1
        file = tmp_path / "one.safetensors"
        forms = (".lora_down.weight", ".lora_up.weight") if name.startswith("lora_") else (".lora_A.weight", ".lora_B.weight")
        save_file({name + forms[0]: torch.randn(2, columns), name + forms[1]: torch.randn(rows, 2)}, file)
        changes = gather(weights, [(file, 1.0)])
        assert list(changes) == [weight], name
        assert (changes[weight][0].third == 2) == ("in_proj" in weight)
    written = write_lora(tmp_path / "own.safetensors", {unet: changes[weight][0].low_rank}, weights)
    assert "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k.alpha" in load_file(written)
    assert layout.places["te1|encoder_layers_0_mlp_fc1"] == layout.places["te1|text_model_encoder_layers_0_mlp_fc1"]


# ---------------------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_alpha_of_pefts_settings_beside_the_file(tmp_path, rslora, scale):
    names = ("base_model.model.down_blocks.0.attentions.0.proj_in", "base_model.model.mid_block.attentions.0.proj_in")
    tensors = {f"{name}.lora_{side}.weight": torch.randn(4, 4) for name in names for side in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    settings = {"lora_alpha": 8, "alpha_pattern": {"mid_block.attentions.0.proj_in": 1}, "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    first, second = (read_lora(tmp_path)[name] for name in names)
    assert first.scale == scale and second.scale == scale / 8


# ----------------------------------------------------------------------------------------------------------------------- refusals
GOOD = "lora_unet_mid_block_attentions_0_proj_in"


def lora(name: str, rank: int = 2, inner: int = 64, outer: int = 64) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_down.weight": torch.randn(rank, inner), f"{name}.lora_up.weight": torch.randn(outer, rank)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lora(GOOD) | lora("lora_unet_nowhere"), "1 layers that fit nothing in this model: lora_unet_nowhere .1 layers fit."),
        (lora(GOOD) | lora("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "fit nothing in this model: lora_te2_text"),
        (lora(GOOD, inner=32), r"another shape: lora_unet_mid_block_attentions_0_proj_in \[64, 32\] for \[64, 64, 1, 1\]"),
        (lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", inner=2048), "made for Stable Diffusion XL base"),
        ({f"{GOOD}.lora_down.weight": torch.randn(2, 64)}, "is incomplete: .* has no up and down"),
        (lora(GOOD) | {f"{GOOD}.lora_up.weight": torch.randn(64, 3)}, "do not fit together"),
        ({f"{GOOD}.hada_w1_a": torch.randn(2, 2)}, "LoHa is not supported"),
        (lora(GOOD) | {f"{GOOD}.dora_scale": torch.randn(64, 1)}, "DoRA is not supported"),
        ({"emb_params": torch.randn(2, 768)}, "no layer of a LoRA is called that"),
        (lora(GOOD) | {f"{GOOD}.alpha": torch.ones(2)}, "proj_in has no finite numbers in alpha"),
        (lora(GOOD) | {f"{GOOD}.alpha": torch.tensor(float("nan"))}, "proj_in has no finite numbers in"),
        (lora(GOOD) | {f"{GOOD}.lora_up.weight": torch.full((64, 2), float("inf"))}, "proj_in has no finite numbers in"),
        (lora(GOOD) | {f"{GOOD}.lora_up.weight": torch.ones(64, 2, dtype=torch.int8)}, "proj_in has no finite numbers in up"),
        (lora(GOOD, rank=0), "proj_in has no finite numbers in"),
        (lora(GOOD) | lora("lora_unet_middle_block_1_proj_in"), "changes one weight twice, as .* and as "),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, tensors, message):
    names = {"model.diffusion_model.middle_block.1.proj_in.weight": (64, 64, 1, 1),
             "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (64, 768)}  # fmt: skip
    weights = {name: torch.zeros(shape) for name, shape in names.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        gather(weights, [(tmp_path / "x.safetensors", 1.0)])
    assert "\n" not in str(error.value)


def test_a_folder_without_a_lora(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no LoRA \(adapter_model.safetensors"):
        read_lora(tmp_path)
