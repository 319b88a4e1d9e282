"""Which model draws, and what its YAML says about it: paths, legal sizes, defaults. Imports no torch; reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.util import ConfigError, UserError

REPO = Path(__file__).resolve().parents[2]
SHIPPED_CONFIG = REPO / "models" / "shapes" / "config.yaml"
LEGACY_CONFIG = REPO / "configs" / "stable-diffusion" / "v1-inference.yaml"  # what the originals assume beside a checkpoint
WEIGHTS_NAME = "model.safetensors"  # beside its config.yaml
SHIPPED_WEIGHTS = SHIPPED_CONFIG.parent / WEIGHTS_NAME
SAMPLING_KEYS = {"sampler", "steps", "scale", "ddim_eta", "n_samples", "n_iter"}  # of a YAML's `sampling:`


@dataclass(frozen=True)
class ModelFacts:
    """What a model's YAML says about legal sizes and sensible defaults."""

    image_size: int  # latent height and width it was trained at
    channels: int  # latent channels
    factor: int  # image pixels per latent pixel, along one side
    levels: int  # resolutions of the UNet
    timesteps: int  # T
    sampling: dict[str, Any]  # the YAML's own defaults: sampler, steps, scale

    @property
    def multiple(self) -> int:
        """Heights and widths in pixels must be multiples of this."""
        return self.factor * 2 ** (self.levels - 1)


def find_model(config: str | None, ckpt: str | None) -> tuple[str, str]:
    """Paths of config and weights from what was named of them; with neither, the model that ships."""
    if ckpt is None:
        config = str(config or SHIPPED_CONFIG)
        ckpt = str(Path(config).parent / WEIGHTS_NAME)
        if not Path(config).is_file():
            raise UserError(f"config {config!r} does not exist")
        if not Path(ckpt).is_file():
            raise UserError(f"no weights {WEIGHTS_NAME} beside {config!r}: name them by --ckpt")
        return config, ckpt
    if not Path(ckpt).exists():
        raise UserError(f"checkpoint {ckpt!r} does not exist: check --ckpt")
    if config is None:
        candidates = [Path(ckpt).with_suffix(".yaml"), Path(ckpt).parent / "config.yaml", LEGACY_CONFIG]
        config = next((str(path) for path in candidates if path.is_file()), None)
        if config is None:
            raise UserError(f"no config beside {ckpt!r} ({candidates[0].name} or config.yaml): name it by --config")
    if not Path(config).is_file():
        raise UserError(f"config {config!r} does not exist: check --config")
    return config, ckpt


def read_config(path: str | Path) -> dict[str, Any]:
    """A model's YAML as plain containers, interpolations resolved. Raises `ConfigError` where it is no such thing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ConfigError(f"config {str(path)!r} describes no model: it needs the key 'model' with 'target' and 'params'")
    return {str(key): value for key, value in config.items()}


def read_facts(path: str | Path) -> ModelFacts:
    """Sizes and defaults from a latent-diffusion YAML. Raises `ConfigError` where the needed keys are absent."""
    config = read_config(path)
    params = config["model"].get("params") or {}
    try:
        unet = params["unet_config"]["params"]
        ddconfig = (params["first_stage_config"].get("params") or {}).get("ddconfig") or {}
        facts = ModelFacts(
            image_size=int(_one(params.get("image_size", unet.get("image_size", 64)))),
            channels=int(params.get("channels", unet.get("out_channels", 4))),
            factor=int(ddconfig.get("patch_size", 1)) * 2 ** (len(ddconfig.get("ch_mult", [1])) - 1),
            levels=len(unet.get("channel_mult", (1, 2, 4, 8))),
            timesteps=int(params.get("timesteps", 1000)),
            sampling=dict(config.get("sampling") or {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"config {str(path)!r} is not of a latent diffusion model ({type(error).__name__}: {error})") from None
    if unknown := sorted(set(facts.sampling) - SAMPLING_KEYS):
        known = ", ".join(sorted(SAMPLING_KEYS))
        raise ConfigError(f"config {str(path)!r}: sampling has unknown keys {', '.join(unknown)}; known are {known}")
    return facts


def _one(size: Any) -> Any:
    return size[0] if isinstance(size, (list, tuple)) else size
