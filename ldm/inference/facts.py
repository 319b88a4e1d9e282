"""Which model draws, and what its YAML says about it: paths, legal sizes, defaults. Imports no torch; reads no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.inference.tasks.kinds import model_kind
from ldm.util import ConfigError

REPO = Path(__file__).resolve().parents[2]
SHIPPED_CONFIG = REPO / "models" / "shapes" / "config.yaml"
WEIGHTS_NAME = "model.safetensors"  # beside its config.yaml
SHIPPED_WEIGHTS = SHIPPED_CONFIG.parent / WEIGHTS_NAME
SAMPLING_KEYS: dict[str, tuple[tuple[type, ...], str]] = {  # of a YAML's `sampling:`
    **dict.fromkeys(("sampler", "spacing"), ((str,), "a name")),
    **dict.fromkeys(("steps", "n_samples", "n_iter"), ((int,), "a whole number")),
    **dict.fromkeys(("scale", "ddim_eta", "guidance_rescale"), ((int, float), "a number")),
}


@dataclass(frozen=True)
class ModelFacts:
    """What a model's YAML says about legal sizes and sensible defaults."""

    image_size: int  # latent height and width it was trained at
    channels: int  # latent channels
    factor: int  # image pixels per latent pixel, along one side
    levels: int  # resolutions of the UNet
    timesteps: int  # T
    sampling: dict[str, Any]  # the YAML's own defaults: sampler, steps, scale
    kind: str = "text"  # what it draws from: a name of `tasks.kinds.KINDS`
    params: Mapping[str, Any] = field(default_factory=dict)  # of the model

    @property
    def multiple(self) -> int:
        """Heights and widths in pixels must be multiples of this."""
        return self.factor * 2 ** (self.levels - 1)


def find_model(config: str | None, ckpt: str | None, prediction: str | None = None) -> tuple[Any, str]:
    """Config (a YAML's path, or plain containers) and weights from what was named of them; see `families.resolve_model`."""
    from ldm.inference.weights.families import resolve_model

    return resolve_model(config, ckpt, prediction)


def read_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A model's YAML as plain containers, interpolations resolved; plain containers as they are. Raises `ConfigError` for anything else."""
    content, name = (config, "") if isinstance(config, Mapping) else (_read_yaml(config), f" {str(config)!r}")
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ConfigError(f"config{name} describes no model: it needs the key 'model' with 'target' and 'params'")
    return {str(key): value for key, value in content.items()}


def _read_yaml(path: str | Path) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {' '.join(str(error).split())}") from None


def read_facts(config: str | Path | Mapping[str, Any]) -> ModelFacts:
    """Sizes and defaults from a latent-diffusion config. Raises `ConfigError` where the needed keys are absent."""
    name = "the config" if isinstance(config, Mapping) else f"config {str(config)!r}"
    content = read_config(config)
    params = content["model"].get("params") or {}
    try:
        unet = (params["network_config"] if "network_config" in params else params["unet_config"])["params"]
        ddconfig = (params["first_stage_config"].get("params") or {}).get("ddconfig") or {}
        facts = ModelFacts(
            image_size=_latent_size(params, unet),
            channels=int(params.get("channels", unet.get("out_channels", 4))),
            factor=int(ddconfig.get("patch_size", 1)) * 2 ** (len(ddconfig.get("ch_mult", [1])) - 1),
            levels=len(unet.get("channel_mult", (1, 2, 4, 8))),
            timesteps=int(params.get("timesteps", 1000)),
            sampling=dict(content.get("sampling") or {}),
            kind=model_kind(content["model"]).name,
            params=params,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{name} is not of a latent diffusion model ({type(error).__name__}: {error})") from None
    if unknown := sorted(set(facts.sampling) - set(SAMPLING_KEYS)):
        known = ", ".join(sorted(SAMPLING_KEYS))
        raise ConfigError(f"{name}: sampling has unknown keys {', '.join(unknown)}; known are {known}")
    for key, value in facts.sampling.items():
        types, kind = SAMPLING_KEYS[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            raise ConfigError(f"{name}: sampling.{key} is {value!r}; it must be {kind}")
    return facts


def _latent_size(params: Mapping[str, Any], unet: Mapping[str, Any]) -> int:
    """Side of the latents a model was trained at. Configs of generative-models do not say it: 128 for SDXL, 96 for SD 2.1 v, else 64."""
    size = params.get("image_size", unet.get("image_size"))
    if size is not None:
        return int(_one(size))
    if unet.get("adm_in_channels") is not None:
        return 128
    scaling = ((params.get("denoiser_config") or {}).get("params") or {}).get("scaling_config") or {}
    return 96 if str(scaling.get("target", "")).endswith(".VScaling") else 64


def _one(size: Any) -> Any:
    return size[0] if isinstance(size, (list, tuple)) else size
