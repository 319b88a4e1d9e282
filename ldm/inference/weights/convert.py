"""One layout of a model into another: single file to diffusers folder and back, .ckpt to .safetensors. Every tensor survives, bit for bit.

Owns which way is meant and what the header of a written file says. The layouts themselves are `checkpoint`'s and `diffusers_*`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.inference.checkpoint import read_state_dict, save_weights
from ldm.inference.facts import read_config
from ldm.inference.weights.families import EMBEDDED_CONFIG, Found, config_prediction, known_family, resolve_model
from ldm.util import UserError

# ModelSpec's names (github.com/Stability-AI/ModelSpec)
_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd1-inpainting": "stable-diffusion-v1/inpainting",
    "sd2": "stable-diffusion-v2",
    "sd2-inpainting": "stable-diffusion-v2/inpainting",
    "sdxl-base": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
_SPEC_PREDICTIONS = {"eps": "epsilon", "v": "v", "x0": "sample"}


def convert(source: str | Path, target: str | Path, *, config: str | None = None, prediction: str | None = None) -> list[str]:
    """Write the model in `source` as `target`; gives lines that say what was done.

    A target that ends in .safetensors is a single file, under the names of latent-diffusion checkpoints; any other is a diffusers
    folder. `config` and `prediction` are only needed for what the weights of a single file do not say. Nothing is overwritten.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise UserError(f"{target} exists already: choose another name")
    if target.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"{target.suffix} files are read but not written: give a name that ends in .safetensors, or a folder's")
    found = known_family(source)
    if target.suffix == ".safetensors":
        return _to_file(source, target, found, config, prediction)
    return _to_folder(source, target, found, config, prediction)


def _to_file(source: Path, target: Path, found: Found, config: str | None, prediction: str | None) -> list[str]:
    state, header = read_state_dict(source), dict(found.metadata)
    if source.is_dir() and found.anatomy is not None and found.anatomy.unet is not None and found.anatomy.first_stage is not None:
        chosen = read_config(resolve_model(config, str(source), prediction)[0])
        header = _described(header, found, chosen)
        state |= _markers(found, chosen, state)
    save_weights(state, target, metadata=header)
    return [f"{target}: {found.title}, {len(state)} tensors, {target.stat().st_size / 2**20:.1f} MiB"]


def _described(header: dict[str, str], found: Found, config: Mapping[str, Any]) -> dict[str, str]:
    """What the header of a file made from a folder says: ModelSpec, and the config where none that ships is the same."""
    shipped = None if found.config is None else read_config(found.config)
    header = {key: value for key, value in header.items() if key != EMBEDDED_CONFIG}
    if shipped is None or config_prediction(shipped) != config_prediction(config) or not _same_schedule(shipped, config):
        header[EMBEDDED_CONFIG] = json.dumps(dict(config))
    if not any(key.startswith("modelspec.") for key in header):
        header["modelspec.sai_model_spec"] = "1.0.0"
        if found.family in _ARCHITECTURES:
            header["modelspec.architecture"] = _ARCHITECTURES[found.family]
        if (kind := config_prediction(config)) is not None:
            header["modelspec.prediction_type"] = _SPEC_PREDICTIONS[kind]
    return header


def _same_schedule(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    defaults = {"beta_schedule": "linear", "linear_start": 1e-4, "linear_end": 0.02, "timesteps": 1000}
    if "denoiser_config" in one["model"]["params"]:
        defaults = {"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps": 1000}
    defaults |= {"rescale_betas_zero_snr": False, "scale_factor": 1.0}
    first, second = _schedule_settings(one), _schedule_settings(other)
    return all(first.get(key, value) == second.get(key, value) for key, value in defaults.items())


def _schedule_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    params = config["model"]["params"]
    levels = params["denoiser_config"]["params"]["discretization_config"] if "denoiser_config" in params else {}
    return {**params, **(levels.get("params") or {})}


def _markers(found: Found, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The empty tensors by which other tools know a prediction of v where the family predicts eps, and zero terminal SNR."""
    unusual = config_prediction(config) == "v" and found.family in ("sd1", "sdxl-base", "sdxl-refiner", "ldm")
    wanted = {"v_pred": unusual, "ztsnr": found.zero_snr}
    return {name: torch.zeros(0) for name, there in wanted.items() if there and name not in state}


def _to_folder(source: Path, target: Path, found: Found, config: str | None, prediction: str | None) -> list[str]:
    from ldm.inference.weights.diffusers_export import write_folder

    if source.is_dir():
        raise UserError(f"{source} is a diffusers folder already: a target that ends in .safetensors makes it a single file")
    if found.anatomy is None or found.anatomy.unet is None or found.anatomy.first_stage is None:
        raise UserError(f"{source} holds {found.title}: a diffusers folder needs a whole model, with UNet, first stage and text encoder")
    chosen = read_config(resolve_model(config, str(source), prediction)[0])
    write_folder(read_state_dict(source), chosen, target, found.metadata)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return [
        f"{target}: {found.title}, predicts {config_prediction(chosen)}, {size / 2**20:.1f} MiB in {len(list(target.iterdir()))} entries"
    ]
