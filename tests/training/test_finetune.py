"""Fine-tuning of a tiny model through the command line's own path: what is trained, what is kept, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm.data.personalized import TEMPLATES
from ldm.inference.checkpoint import read_metadata
from ldm.inference.facts import read_config
from ldm.inference.weights.embedding_files import read_embedding
from ldm.inference.weights.lora_files import read_lora
from ldm.modules.textual_inversion import add_word, text_encoders, token_table, vectors_of_text
from ldm.training.finetune import LoRA, TextualInversion, fingerprint
from ldm.util import CheckpointError, ConfigError, instantiate_from_config
from tests.inference.tiny import write_model
from tests.training.conftest import assert_same_weights, last

SHAPES = {
    "target": "ldm.data.personalized.ShapesOfOne",
    "params": {"color": "purple", "shape": "heart", "image_size": 64, "pictures": 3, "repeats": 6},
}
LORA = {"target": "ldm.training.finetune.LoRA", "params": {"rank": 2, "text_encoder": True}}
WORD = {"target": "ldm.training.finetune.TextualInversion", "params": {"word": "<mine>", "start": "purple heart", "vectors": 3}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny model."""
    return write_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def finetune(base: Path, config: Path, train: Callable[..., Path]) -> Callable[..., Path]:
    """finetune(callback, word=..., key=value, ...) -> folder of the run."""

    def call(callback: dict | None, *words: str, word: str | None = None, data: dict | None = None, **options: Any) -> Path:
        model = read_config(base.parent / "config.yaml")["model"]
        model["params"] |= {"ckpt_path": str(base), "use_ema": False, "monitor": None}
        data = data or {**SHAPES, "params": {**SHAPES["params"], "word": word}}
        content = {
            "model": {"base_learning_rate": 1e-3, **model},
            "data": {"target": "main.DataModuleFromConfig", "params": {"batch_size": 2, "num_workers": 0, "train": data}},
            "lightning": {
                "trainer": {"max_steps": 4, "accelerator": "cpu", "log_every_n_steps": 1},
                "callbacks": {"image_logger": None, "training_plot": None, "own": callback},
                "logger": False,
            },
        }
        config.write_text(yaml.safe_dump(content))
        return train(*words, **options)

    return call


# ------------------------------------------------------------------------------------------------------------------------- LoRA
def test_a_lora_run_trains_only_its_factors_and_resumes_to_the_bit(finetune, base):
    whole = finetune(LORA, name="whole")
    state = last(whole)
    assert all(".lora_A." in name or ".lora_B." in name for name in state["state_dict"]) and len(state["optimizer_states"]) == 1
    assert len(state["optimizer_states"][0]["state"]) == len(state["state_dict"])
    assert (whole / "checkpoints" / "last.ckpt").stat().st_size < 0.2 * base.stat().st_size
    ups = [value for name, value in state["state_dict"].items() if ".lora_B." in name]
    assert all(value.any() for value in ups), "a factor was not trained"

    part = finetune(LORA, "lightning.trainer.max_steps=2", name="part")
    finetune(LORA, "lightning.trainer.max_steps=4", resume=part)
    assert_same_weights(whole, part)

    layers = read_lora(whole / "lora.safetensors")
    assert all(layer.rank == 2 and layer.scale == 1.0 for layer in layers.values())
    assert read_metadata(whole / "lora.safetensors")["ss_network_alpha"] == "2"
    down = state["state_dict"]["model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_A.default.weight"]
    assert torch.equal(layers["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"].down, down)
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in layers


def test_a_lora_of_the_text_encoder_alone(finetune):
    text = {**LORA, "params": {**LORA["params"], "targets": []}}
    layers = read_lora(finetune(text, name="text") / "lora.safetensors")
    assert layers and all(name.startswith("lora_te_") for name in layers)


def test_a_run_does_not_go_on_from_another_base(finetune, base, tmp_path):
    folder = finetune(LORA, "lightning.trainer.max_steps=1", name="moved")
    other = write_model(tmp_path / "other", seed=5)
    finetune(LORA, f"model.params.ckpt_path={other}", resume=folder, code=2)
    assert fingerprint({"a": torch.ones(3)}) != fingerprint({"a": torch.tensor([1.0, 1.0, 1.0000001])})
    assert fingerprint({"a": torch.tensor([1.0, 2.0])}) != fingerprint({"a": torch.tensor([2.0, 1.0])})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rank": 0, "dropout": 1.0, "init": "ones"}, "rank is 0.*dropout is 1.0.*init 'ones' is unknown: use kaiming or gaussian"),
        ({"dropout": 0.1, "text_encoder": True}, "dropout has no effect in a text encoder"),
        ({"targets": []}, "nothing would be trained"),
    ],
)
def test_wrong_settings_of_a_lora(params, message):
    with pytest.raises(ConfigError, match=message):
        LoRA(**params)


def test_layers_that_are_not_there(base):
    model = instantiate_from_config(read_config(base.parent / "config.yaml")["model"])
    with pytest.raises(ConfigError, match=r"to_w cannot be changed in the network .*; its layers end in .*to_q"):
        LoRA(targets=["to_w"]).add(model)
    with pytest.raises(ConfigError, match="LoRA: to_w of rank_pattern or alpha_pattern fits no layer"):
        LoRA(rank_pattern={"to_w": 3, "to_q": 1}).add(model)


def test_peft_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match='pip install "peft'):
        LoRA()


def test_averages_of_everything_are_refused(finetune, capsys):
    finetune(LORA, "model.params.use_ema=true", name="ema", code=2)
    assert "add model.params.use_ema=false" in capsys.readouterr().err


def test_two_at_once_are_refused(finetune, capsys):
    word = "lightning.callbacks.two={target: ldm.training.finetune.TextualInversion, params: {word: x, start: y}}"
    finetune(LORA, word, name="two", code=2)
    assert "leave only one of the callbacks LoRA, TextualInversion" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ textual inversion
def test_textual_inversion_trains_only_its_vectors_and_resumes_to_the_bit(finetune, base):
    whole = finetune(WORD, word="<mine>", name="whole")
    state = last(whole)
    (learnt,) = state["state_dict"].values()
    assert list(state["state_dict"]) == ["cond_stage_model.model.token_embedding.learnt.0"] and learnt.shape == (3, 32)
    part = finetune(WORD, "lightning.trainer.max_steps=2", word="<mine>", name="part")
    finetune(WORD, "lightning.trainer.max_steps=4", word="<mine>", resume=part)
    assert_same_weights(whole, part)
    embedding = read_embedding(whole / "embedding.safetensors")
    assert embedding.word == "<mine>" and torch.equal(embedding.vectors[0], learnt)
    model = instantiate_from_config(read_config(base.parent / "config.yaml")["model"])
    model.init_from_ckpt(str(base))
    start = vectors_of_text(text_encoders(model)[0], "purple heart", 3)
    assert torch.equal(start[0], start[2]) and not torch.equal(start[0], start[1])
    moved = (learnt - start).abs()
    assert (moved > 0).all() and (moved < 0.02).all(), "four updates of 1e-3 from the vectors of the start"


def test_captions_without_the_word_are_refused(finetune, capsys):
    finetune(WORD, name="wordless", code=2)
    assert "no caption of a batch has the word '<mine>', such as ['" in capsys.readouterr().err


def test_cached_embeddings_are_refused_where_the_text_encoder_changes():
    with pytest.raises(ConfigError, match="drop their text_encoder"):
        TextualInversion("<mine>", "heart").on_train_batch_start(None, None, {"c": torch.zeros(1), "caption": ["a <mine>"]}, 0)
    with pytest.raises(ConfigError, match="vectors is 0"):
        TextualInversion("<mine>", "heart", vectors=0)


def test_only_what_was_added_gets_a_gradient(base):
    model = instantiate_from_config(read_config(base.parent / "config.yaml")["model"])
    model.init_from_ckpt(str(base))
    model.requires_grad_(False)
    encoder = text_encoders(model)[0]
    learnt = add_word(encoder, "<mine>", vectors_of_text(encoder, "heart"), trainable=True)
    assert [p is learnt for p in model.trainable_parameters()] == [True]
    loss, _ = model.shared_step({"image": torch.zeros(1, 64, 64, 3), "caption": ["a <mine>"]})
    loss.backward()
    assert learnt.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters() if p is not learnt) and token_table(encoder).weight.grad is None


# ------------------------------------------------------------------------------------------------------------------- dreambooth
def test_the_loss_with_a_prior_is_the_weighted_sum(base):
    config = read_config(base.parent / "config.yaml")["model"]
    config["params"] |= {"prior_weight": 0.3, "ckpt_path": str(base)}
    model = instantiate_from_config(config)
    logged: dict[str, Any] = {}
    model.log_dict = lambda parts, **_: logged.update(parts)
    generator = torch.Generator().manual_seed(0)
    own, prior = ({"image": torch.randn(2, 64, 64, 3, generator=generator), "caption": [text] * 2} for text in ("a heart", "two"))
    torch.manual_seed(1)
    first, second = (model.shared_step(batch)[0] for batch in (own, prior))
    torch.manual_seed(1)
    total = model.training_step({**own, "prior": prior}, 0)
    assert torch.equal(total, first + 0.3 * second)
    assert torch.equal(logged["train/loss_prior"], second) and torch.equal(logged["train/loss"], total)
    torch.manual_seed(1)
    assert torch.equal(model.training_step(own, 0), first)
    model.ucg_training = {"caption": {"p": 1.0, "val": ""}}
    dropped = {**own, "caption": list(own["caption"]), "prior": {**prior, "caption": list(prior["caption"])}}
    model.training_step(dropped, 0)
    assert dropped["caption"] == dropped["prior"]["caption"] == ["", ""], "or the empty prompt would be taught on the own pictures alone"
    model.ucg_training = {}
    pictures = model.eval().log_images({**own, "prior": prior}, N=1, ddim_steps=1, plot_diffusion_rows=False)
    assert pictures["samples"].shape == (1, 3, 64, 64)


def test_a_dreambooth_run_draws_its_prior_once(finetune, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = {"prompts": ["a red heart", "a blue ring"], "pictures": 3, "ckpt": str(base), "steps": 2, "scale": 1.0}
    drawn["cache_dir"] = str(tmp_path / "drawn")
    data = {
        "target": "ldm.data.personalized.WithPrior",
        "params": {"instance": SHAPES, "prior": {"target": "ldm.data.personalized.DrawnPictures", "params": drawn}},
    }
    whole = finetune(None, data=data, name="whole")
    (folder,) = (tmp_path / "drawn").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["00000.png", "00001.png", "00002.png", "metadata.jsonl"]
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("*.png"))]
    again = finetune(None, data=data, name="again")
    assert_same_weights(whole, again)
    assert times == [path.stat().st_mtime_ns for path in sorted(folder.glob("*.png"))]


def test_the_templates_have_the_words_place():
    assert all(text.count("{}") == 1 for texts in TEMPLATES.values() for text in texts)
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        read_embedding("nowhere.pt")
