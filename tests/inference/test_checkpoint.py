"""Reading, loading and saving weights: what is refused, which names are understood, and which averages are used."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.inference import checkpoint
from ldm.inference.checkpoint import load_weights, read_metadata, read_state_dict, save_weights
from ldm.inference.weights import key_names
from ldm.util import CheckpointError, UserError


class Averaged(nn.Module):
    """Named like a diffusion model: a network below `model.`, its average below `model_ema.`, a schedule, a text encoder."""

    def __init__(self, ema: bool = False) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.diffusion_model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        if ema:
            self.model_ema = nn.Module()
            for name, value in self.model.named_parameters():
                self.model_ema.register_buffer(name.replace(".", ""), value.detach().clone())
            self.model_ema.register_buffer("decay", torch.tensor(0.9))
            self.model_ema.register_buffer("num_updates", torch.tensor(0))
        self.register_buffer("alphas_cumprod", torch.linspace(1, 0, 5))


WEIGHT, SHADOW = "model.diffusion_model.0.weight", "model_ema.diffusion_model0weight"


def state(seed: int, ema: bool) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model = Averaged(ema)
    if ema:
        for value in model.model_ema.buffers():
            value.add_(1)
    return {name: value.clone() for name, value in model.state_dict().items()}


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


# ------------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3, "global_step": 7}])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_pytorch_checkpoints(tmp_path: Path, wrap: Callable, zipped: bool) -> None:
    want = state(0, ema=False)
    torch.save(wrap(want), tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    got = read_state_dict(tmp_path / "m.ckpt")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_safetensors_round_trip_with_metadata(tmp_path: Path) -> None:
    want = state(0, ema=True)
    path = save_weights(want, tmp_path / "new" / "m.safetensors", metadata={"title": "shapes", "steps": [1, 2]})
    got = read_state_dict(path)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert read_metadata(path) == {"format": "pt", "title": "shapes", "steps": "[1, 2]"}
    assert [p.name for p in path.parent.iterdir()] == ["m.safetensors"], "no temporary file stays behind"


class Payload:
    """A pickle that creates a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: {"state_dict": {"w": torch.zeros(2), "x": p}}])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path, wrap: Callable, how: str) -> None:
    content, path, target = wrap(Payload(tmp_path / "owned")), tmp_path / "m.ckpt", tmp_path / "owned"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content if isinstance(content, Payload) else {"x": Payload(target)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"refused.*nothing of it was run") as error:
        read_state_dict(path)
    assert not target.exists()
    assert "\n" not in str(error.value)


def test_bystanders_of_lightning_checkpoints_become_placeholders(tmp_path: Path) -> None:
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import ModelCheckpoint

    content = {
        "state_dict": {"w": torch.arange(3.0)},
        "hyper_parameters": OmegaConf.create({"lr": 1e-4, "nested": {"list": [1, "two", None]}}),
        "callbacks": {ModelCheckpoint: {"best_model_path": "x"}},
    }
    got = read_state_dict(save(content, tmp_path / "m.ckpt"))
    assert list(got) == ["w"]
    assert torch.equal(got["w"], torch.arange(3.0))


def test_damaged_and_foreign_files_are_told_in_one_line(tmp_path: Path) -> None:
    good = save(state(0, ema=False), tmp_path / "good.ckpt").read_bytes()
    tensors = save_weights(state(0, ema=False), tmp_path / "good.safetensors").read_bytes()
    cases = {
        "gone.ckpt": (None, "cannot read"),
        "empty.ckpt": (b"", "is empty"),
        "cut.ckpt": (good[: len(good) // 2], "cut short"),
        "cut.safetensors": (tensors[: len(tensors) // 2], "cut short"),
        "header.safetensors": (tensors[:20], "cut short"),
        "picture.ckpt": (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a weights file"),
        "text.safetensors": (b"hello, these are not weights", "not a weights file"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "page.ckpt": (b"<!DOCTYPE html><html></html>", "web page"),
        "number.ckpt": (pickle.dumps(3), "refused|not a dictionary|cut short"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            read_state_dict(tmp_path / name)
        assert "\n" not in str(error.value), name
    with pytest.raises(CheckpointError, match=r"not .* a diffusers folder"):
        read_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_state_dict(save({"epoch": 3}, tmp_path / "none.ckpt"))


# ------------------------------------------------------------------------------------------------------------- loading
def test_load_fills_the_model_and_casts(tmp_path: Path) -> None:
    source = state(1, ema=False)
    path = save_weights(source, tmp_path / "m.safetensors", dtype=torch.float16)
    assert read_state_dict(path)[WEIGHT].dtype == torch.float16
    assert read_state_dict(path)["alphas_cumprod"].dtype == torch.float32, "a schedule is not rounded"
    model = Averaged()
    report = load_weights(model, path)
    assert torch.equal(model.state_dict()[WEIGHT], source[WEIGHT].half().float())
    assert (report.missing, report.unexpected, report.renamed, report.dropped, report.ema) == ((), (), (), (), "none")


def test_a_model_on_the_meta_device_becomes_real(tmp_path: Path) -> None:
    source = state(1, ema=False)
    path = save_weights(source, tmp_path / "m.safetensors", dtype=torch.float16)
    with torch.device("meta"):
        model = Averaged()
    model.alphas_cumprod = torch.linspace(1, 0, 5)
    load_weights(model, path)
    loaded = model.model.diffusion_model[0].weight
    assert loaded.dtype == torch.float32 and loaded.requires_grad and isinstance(loaded, nn.Parameter)
    assert torch.equal(loaded, source[WEIGHT].half().float())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_differences_are_errors_that_name_the_tensor_and_change_nothing(tmp_path: Path, change: str) -> None:
    content = state(1, ema=False)
    if change == "missing":
        name = WEIGHT
        del content[WEIGHT]
    elif change == "unexpected":
        name = "model.extra.weight"
        content[name] = torch.zeros(2)
    else:
        name = WEIGHT
        content[WEIGHT] = torch.zeros(5, 3)
    model = Averaged()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=name):
        load_weights(model, save(content, tmp_path / "m.ckpt"))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_allowed_and_ignored_names(tmp_path: Path) -> None:
    content = state(1, ema=False)
    content["other.weight"] = torch.zeros(2)
    path = save({k: v for k, v in content.items() if k != WEIGHT}, tmp_path / "m.ckpt")
    report = load_weights(Averaged(), path, allow_missing=("model.diffusion_model.0",), ignore=("other.",))
    assert report.missing == (WEIGHT,)
    assert report.unexpected == ("other.weight",)


def test_weights_that_are_no_real_numbers_are_refused(tmp_path: Path) -> None:
    for dtype in (torch.int8, torch.complex64):
        content = {**state(1, ema=False), WEIGHT: torch.ones(4, 3, dtype=dtype)}
        with pytest.raises(CheckpointError, match=f"no real numbers in {WEIGHT} {str(dtype)[6:]}"):
            load_weights(Averaged(), save(content, tmp_path / "m.ckpt"))


def test_eight_bit_floats_are_read(tmp_path: Path) -> None:
    source = {name: value.to(torch.float8_e4m3fn) for name, value in state(1, ema=False).items()}
    model = Averaged()
    load_weights(model, save_weights(source, tmp_path / "m.safetensors"))
    assert torch.equal(model.state_dict()[WEIGHT], source[WEIGHT].float())


def test_the_models_own_spelling_wins_over_another(tmp_path: Path) -> None:
    content = state(1, ema=False)
    want = content[WEIGHT].clone()
    for twice in ({"module." + WEIGHT: want + 1, **content}, {**content, "module." + WEIGHT: want + 1}):
        path, model = save(twice, tmp_path / "m.ckpt"), Averaged()
        assert "1 tensors in two spellings" in load_weights(model, path).notes[0]
        assert torch.equal(model.state_dict()[WEIGHT], want)
        assert torch.equal(read_state_dict(save_weights(twice, tmp_path / "m.safetensors", overwrite=True))[WEIGHT], want)


@pytest.mark.parametrize("mode", ["auto", "raw"])
def test_tensors_of_a_meta_model_share_no_memory(tmp_path: Path, mode: str) -> None:
    """An average that starts from the weights must not follow them when they are trained."""
    source = state(1, ema=mode == "raw")
    with torch.device("meta"):
        model = Averaged(ema=True)
    model.alphas_cumprod = torch.linspace(1, 0, 5)
    model.model_ema.decay, model.model_ema.num_updates = torch.tensor(0.9), torch.tensor(0)
    load_weights(model, save(source, tmp_path / "m.ckpt"), ema=mode)
    with torch.no_grad():
        model.model.diffusion_model[0].weight.add_(1)
    assert torch.equal(model.state_dict()[SHADOW], source[WEIGHT])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_forward_module.", "_forward_module.module."])
def test_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    source = state(1, ema=False)
    model = Averaged()
    report = load_weights(model, save({prefix + n: v for n, v in source.items()}, tmp_path / "m.ckpt"))
    assert torch.equal(model.state_dict()[WEIGHT], source[WEIGHT])
    assert (prefix + WEIGHT, WEIGHT) in report.renamed


def test_harmless_names_may_be_there_or_not(tmp_path: Path) -> None:
    content = state(1, ema=False)
    del content["alphas_cumprod"]
    for name in (
        "betas",
        "logvar",
        "loss.discriminator.main.0.weight",
        "first_stage_model.loss.logvar",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.attn_mask",
        "denoiser.sigmas",
        "model_ema.decay",
        "v_pred",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.transformer.vision_model.post_layernorm.weight",
        "conditioner.embedders.0.logit_scale",
    ):
        content[name] = torch.zeros(2)
    report = load_weights(Averaged(), save(content, tmp_path / "m.ckpt"))
    assert len(report.dropped) == 13
    assert not key_names.is_harmless("conditioner.embedders.1.model.text_projection")
    assert not key_names.is_harmless("model.diffusion_model.loss_head.weight")


def test_the_schedule_of_the_config_stays_and_a_difference_is_told(tmp_path: Path) -> None:
    content = state(1, ema=False)
    content["alphas_cumprod"] = torch.linspace(1, 0.5, 5)
    model = Averaged()
    report = load_weights(model, save(content, tmp_path / "m.ckpt"))
    assert torch.equal(model.alphas_cumprod, torch.linspace(1, 0, 5))
    assert "noise schedule" in report.notes[0]


def test_another_scale_factor_is_an_error(tmp_path: Path) -> None:
    content = {**state(1, ema=False), "scale_factor": torch.tensor(0.5)}
    model = Averaged()
    model.scale_factor = 0.5
    load_weights(model, save(content, tmp_path / "m.ckpt"))
    model.scale_factor = 0.18215
    with pytest.raises(CheckpointError, match=r"scale_factor: 0\.5"):
        load_weights(model, tmp_path / "m.ckpt")


# ------------------------------------------------------------------------------------------------------------- averages
@pytest.mark.parametrize(
    ("model_has", "file_has", "mode", "used", "weight_from", "average_from"),
    [
        (True, True, "auto", "both", WEIGHT, SHADOW),
        (False, True, "auto", "ema", SHADOW, None),
        (True, False, "auto", "none", WEIGHT, WEIGHT),
        (True, True, "ema", "ema", SHADOW, SHADOW),
        (False, True, "raw", "raw", WEIGHT, None),
        (True, True, "raw", "raw", WEIGHT, WEIGHT),
    ],
)
def test_which_weights_are_used(
    tmp_path: Path, model_has: bool, file_has: bool, mode: str, used: str, weight_from: str, average_from: str | None
) -> None:
    source, model = state(3, ema=file_has), Averaged(model_has)
    report = load_weights(model, save(source, tmp_path / "m.ckpt"), ema=mode)
    got = model.state_dict()
    assert report.ema == used
    assert torch.equal(got[WEIGHT], source[weight_from])
    if average_from is not None:
        assert torch.equal(got[SHADOW], source[average_from])
        fresh = used in ("raw", "none")
        assert got["model_ema.num_updates"] == (0 if fresh else source["model_ema.num_updates"])


def test_ema_on_demand_and_unknown_modes(tmp_path: Path) -> None:
    path = save(state(3, ema=False), tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_weights(Averaged(), path, ema="ema")
    with pytest.raises(UserError, match="auto, ema, raw"):
        load_weights(Averaged(), path, ema="yes")


def test_an_autoencoder_averages_itself() -> None:
    own = {"encoder.conv.weight", "model_ema.encoderconvweight", "model_ema.decay"}
    assert key_names.ema_tables(own, own) == [{"encoder.conv.weight": "model_ema.encoderconvweight"}]


def test_make_it_fit_divides_repeated_channels_by_the_published_count(tmp_path: Path) -> None:
    class Stem(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, 6, 3)

    old, new = Stem(4), Stem(9)
    path = save(old.state_dict(), tmp_path / "m.ckpt")
    with pytest.raises(CheckpointError, match="other shapes"):
        load_weights(new, path)
    load_weights(new, path, make_it_fit=True)
    divisor = torch.tensor([4, 3, 3, 3, 4, 3, 3, 3, 4.0])  # uses of input i % 4, plus one
    torch.testing.assert_close(new.conv.weight, old.conv.weight[:, torch.arange(9) % 4] / divisor[:, None, None])
    torch.testing.assert_close(new.conv.bias, old.conv.bias)


# --------------------------------------------------------------------------------------------------------------- saving
def test_saved_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = save_weights({"w": torch.zeros(2)}, tmp_path / "m.safetensors")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saving_never_overwrites_by_accident(tmp_path: Path) -> None:
    path = save_weights({"w": torch.zeros(2)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="exists already"):
        save_weights({"w": torch.ones(2)}, path)
    assert torch.equal(read_state_dict(path)["w"], torch.zeros(2))
    save_weights({"w": torch.ones(2)}, path, overwrite=True)
    assert torch.equal(read_state_dict(path)["w"], torch.ones(2))
    with pytest.raises(UserError, match=r"\.safetensors"):
        save_weights({"w": torch.ones(2)}, tmp_path / "m.ckpt")


def test_of_two_programs_that_save_at_once_the_later_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    usual = checkpoint._to_store

    def slowly(*args: Any) -> Any:
        path.write_bytes(b"of another program")
        return usual(*args)

    monkeypatch.setattr(checkpoint, "_to_store", slowly)
    with pytest.raises(UserError, match="exists already"):
        save_weights({"w": torch.ones(2)}, path)
    assert path.read_bytes() == b"of another program" and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for target in (tmp_path / "file" / "m.safetensors", tmp_path / "folder.safetensors"):
        with pytest.raises(UserError, match=f"cannot write {target}: ") as error:
            save_weights({"w": torch.zeros(2)}, target, overwrite=True)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_saving_tensors_that_share_memory_or_leave_the_range(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    path = save_weights({"a": base, "b": base, "c": base[1:].T}, tmp_path / "m.safetensors")
    got = read_state_dict(path)
    assert torch.equal(got["a"], base) and torch.equal(got["b"], base) and torch.equal(got["c"], base[1:].T)
    with pytest.raises(UserError, match="outside the range of float16"):
        save_weights({"a": torch.tensor([1e6])}, tmp_path / "n.safetensors", dtype=torch.float16)
    assert not (tmp_path / "n.safetensors").exists()


def test_levels_of_compiled_and_sharded_networks_and_of_their_averages() -> None:
    for level in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        assert key_names.published(f"model.diffusion_model.{level}.out.2.{level}.weight") == "model.diffusion_model.out.2.weight"
    assert key_names.published("model_ema.diffusion_model_orig_modout2weight") == "model_ema.diffusion_modelout2weight"


def test_published_names() -> None:
    flat = "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight"
    full = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert key_names.published(flat) == key_names.published(full) == full
    openclip = "cond_stage_model.model.transformer.resblocks.0.ln_1.weight"
    t5 = "cond_stage_model.transformer.encoder.block.0.layer.0.weight"
    assert key_names.published(openclip) == openclip and key_names.published(t5) == t5
    assert key_names.match([flat], {full}) == {flat: full}
    assert key_names.match([full], {flat}) == {full: flat}
