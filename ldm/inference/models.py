"""From a config and a weights file to a model that draws: on which device, in which precision, without what only training needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.inference.checkpoint import load_weights
from ldm.inference.facts import read_config
from ldm.util import ConfigError, UserError, get_obj_from_str, instantiate_from_config

log = logging.getLogger(__name__)


def pick_device(name: str = "auto") -> torch.device:
    """The device of a `--device` flag. `auto` is the accelerator where there is one. Raises `UserError` for one that is not there."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there or torch.device("cpu")
    if name != "cpu" and (there is None or there.type != name):
        raise UserError(f"device {name!r} is not available here: use --device {there.type if there else 'cpu'} or auto")
    return torch.device(name)


def load_model(
    config: str | Path | Mapping[str, Any],  # YAML with the key `model`, or what it says
    ckpt: str | Path,  # its weights: a file, or a diffusers folder
    device: str | torch.device = "cpu",
    ema: str = "auto",  # averaged weights (ema), trained ones (raw), or averaged where the file has them (auto)
    ignore: Sequence[str] = (),  # prefixes of weights to leave in the file
) -> Any:
    """A LatentDiffusion or DiffusionEngine ready to draw: weights loaded and checked, float32, in eval mode, on `device`.

    Built without memory and filled from the file; a model that cannot be is built in memory first. Start weights and training
    losses that a training config names are left out: the checkpoint holds all that drawing needs.
    """
    model_config = read_config(config)["model"]
    _check_target(model_config.get("target"))
    model_config = drawing_config(model_config)
    model = _load_on_meta(model_config, ckpt, ema, ignore)
    if model is None:
        model = instantiate_from_config(model_config)
        load_weights(model, ckpt, ema=ema, ignore=ignore)
    return model.float().eval().requires_grad_(False).to(device)


def load_vae(model: Any, path: str | Path) -> None:
    """Put another first stage into `model`, from a file or folder of one, or of a whole model. Raises CheckpointError unless it fits."""
    load_weights(model.first_stage_model, path)


def _load_on_meta(model_config: dict[str, Any], ckpt: str | Path, ema: str, ignore: Sequence[str]) -> Any:
    try:
        with torch.device("meta"):
            model = instantiate_from_config(model_config)
    except (NotImplementedError, RuntimeError) as error:  # a constructor that looks at its own values
        log.info("cannot be built without memory (%s)", error)
        return None
    if any(tensor.is_meta for tensor in _unsaved_buffers(model)):
        return None
    load_weights(model, ckpt, ema=ema, ignore=ignore)
    return model


def _unsaved_buffers(model: torch.nn.Module) -> Iterator[Tensor]:
    saved = set(model.state_dict())
    yield from (value for name, value in model.named_buffers() if name not in saved)


def _check_target(target: Any) -> None:
    cls = get_obj_from_str(target)
    if not (hasattr(cls, "apply_model") and hasattr(cls, "decode_first_stage")):
        raise ConfigError(f"{target} does not draw from prompts: the config must be of a LatentDiffusion or a DiffusionEngine")


def drawing_config(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config without what only training needs: start weights, the first stage's loss, a second copy for EMA."""
    config = _without_start_weights(config)
    params = {**(config.get("params") or {}), "use_ema": False}
    for name in ("ema_cond_stage", "loss_fn_config"):
        params.pop(name, None)
    first_stage = params.get("first_stage_config")
    if isinstance(first_stage, dict) and "lossconfig" in (first_stage.get("params") or {}):
        stage_params = {**first_stage["params"], "lossconfig": {"target": "torch.nn.Identity"}}
        params["first_stage_config"] = {**first_stage, "params": stage_params}
    return {**config, "params": params}


def _without_start_weights(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_start_weights(value) for key, value in config.items() if key != "ckpt_path"}
    return [_without_start_weights(item) for item in config] if isinstance(config, list) else config


def half_type(device: torch.device, precision: str) -> torch.dtype | None:
    """What a `--precision` computes in under autocast; None where it is float32 throughout."""
    if precision == "bf16":
        return torch.bfloat16
    return torch.float16 if precision == "autocast" and device.type != "cpu" else None


def store_in_half(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Store the matrices and convolutions of a network that draws under autocast in the type every call would cast them to.

    The pictures stay the same to the bit; the casts are saved (6 % of a call of 142 M parameters on one CPU core, without gradients
    autocast keeps none of them), and half of the memory. The layer with the first parameter stays as it is: its type is the network's.
    """
    first = next(network.parameters())
    for module in network.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) and module.weight is not first:
            module.to(dtype)
