"""Configs become objects here, and only objects that a config may name.

Owns: `instantiate_from_config`, the trust rule for YAML targets, the error classes that scripts turn into one line, and a few tiny
helpers every layer uses. Knows no model. torch is imported inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user gave is wrong. The message is one line: what came, what is allowed, how to mend it."""


class ConfigError(UserError):
    """A config names something that does not exist, is not allowed, or does not fit together."""


class CheckpointError(UserError):
    """A weights file is missing, damaged, unsafe, or of another model."""


# Values of a `*_config` entry that mean "nothing to build here".
_NOT_A_MODEL = ("__is_first_stage__", "__is_unconditional__")

# Packages whose public classes and functions a config may name. Extended by `trust()` (flag --trust).
_TRUSTED: set[str] = {"ldm"}

# What lies outside the trusted packages may be named only if it is a class derived from one of these: parts that a config is
# there to assemble. Functions (`os.system`, `torch.hub.load`, ...) never qualify, however many aliases lead to them.
_COMPONENT_BASES = (
    "torch.nn.Module",
    "torch.optim.Optimizer",
    "torch.optim.lr_scheduler.LRScheduler",
    "torch.utils.data.Dataset",
    "torch.utils.data.Sampler",
    "pytorch_lightning.LightningDataModule",
    "pytorch_lightning.Callback",
    "pytorch_lightning.loggers.Logger",
    "pytorch_lightning.strategies.Strategy",
    "pytorch_lightning.profilers.Profiler",
)
_COMPONENT_MODULES = ("torchvision.transforms.",)  # plain callables without a common base

# Addresses that published configs use for classes that live elsewhere here; the longest prefix wins.
_ALIASES = {
    "main.DataModuleFromConfig": "ldm.data.datamodule.DataModuleFromConfig",
    "main.WrappedDataset": "ldm.data.datamodule.WrappedDataset",
    "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
    "main.SetupCallback": "ldm.training.callbacks.SetupCallback",
    "main.CUDACallback": "ldm.training.callbacks.CUDACallback",
    "taming.data": "ldm.data",
    "taming.modules.vqvae.quantize": "ldm.modules.vqvae.quantize",
    "taming.modules.losses": "ldm.modules.losses",
    "taming.modules.discriminator.model": "ldm.modules.losses.discriminator",
    "sgm.models.autoencoder": "ldm.models.autoencoder_sgm",
    "sgm.models.diffusion": "ldm.models.diffusion.sgm.engine",
    "sgm.modules.GeneralConditioner": "ldm.modules.encoders.conditioner.GeneralConditioner",
    "sgm.modules.encoders.modules": "ldm.modules.encoders.conditioner",
    "sgm.modules.attention": "ldm.modules.attention",
    "sgm.modules.ema": "ldm.modules.ema",
    "sgm.modules.distributions": "ldm.modules.distributions",
    "sgm.lr_scheduler": "ldm.lr_scheduler",
    "sgm.modules.diffusionmodules": "ldm.models.diffusion.sgm",
    "sgm.modules.diffusionmodules.denoiser_weighting": "ldm.models.diffusion.sgm.loss_weighting",
    "sgm.modules.diffusionmodules.util": "ldm.modules.diffusionmodules.util",
    "sgm.modules.diffusionmodules.openaimodel": "ldm.modules.diffusionmodules.openaimodel",
    "sgm.modules.diffusionmodules.model": "ldm.modules.diffusionmodules.model",
}


def trust(*packages: str) -> None:
    """Let configs name anything public that is defined in `packages` (import names, such as `my_project`)."""
    for name in packages:
        if not name or not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"cannot trust {name!r}: give the import name of a package, such as my_project")
        _TRUSTED.add(name)


def _is_under(name: str, packages: Iterable[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _resolve_alias(name: str) -> str:
    for alias in sorted(_ALIASES, key=len, reverse=True):
        if _is_under(name, (alias,)):
            return _ALIASES[alias] + name[len(alias) :]
    return name


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Return the class or function that a config's `target` names, or raise `ConfigError`.

    The rule is applied to the object that was found, not to the spelling: a class or function *defined in* a trusted package
    (`ldm`, and what `trust()` adds), or, from elsewhere, a class derived from a component base (torch.nn.Module, Dataset,
    Optimizer, Callback, ...). The standard library is refused before anything is imported.
    """
    name = _resolve_alias(string) if isinstance(string, str) else ""
    module_name, _, attribute = name.rpartition(".")
    parts = name.split(".")
    if not module_name or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"target {string!r} is not of the form package.module.Class")
    if any(part.startswith("_") for part in parts):
        raise ConfigError(f"target {string!r} names something private: only public classes can be built from a config")
    trusted_name = _is_under(name, _TRUSTED)
    if not trusted_name and parts[0] in sys.stdlib_module_names:
        raise ConfigError(_refusal(string))
    obj = getattr(_import(module_name, string, reload), attribute, None)
    if obj is None:
        raise ConfigError(f"target {string!r}: module {module_name} has no {attribute!r}" + _suggest(module_name, attribute))
    if not _is_allowed(obj):
        raise ConfigError(_refusal(string))
    return obj


def _import(module_name: str, string: str, reload: bool) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and _is_under(module_name, (error.name,)):
            raise ConfigError(f"target {string!r}: there is no module {error.name!r}; is its package installed?") from None
        raise ConfigError(f"target {string!r} needs the package {error.name!r}: pip install it") from error
    return importlib.reload(module) if reload else module


def _suggest(module_name: str, attribute: str) -> str:
    import difflib

    names = [n for n, o in vars(sys.modules[module_name]).items() if inspect.isclass(o) and not n.startswith("_")]
    close = difflib.get_close_matches(attribute, names, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


def _refusal(string: str) -> str:
    return (
        f"target {string!r} is refused: configs may name classes of {', '.join(sorted(_TRUSTED))} and torch-style components "
        "(modules, datasets, optimizers, callbacks); to allow your own package use --trust PACKAGE or ldm.util.trust()"
    )


def _is_allowed(obj: Any) -> bool:
    if not (inspect.isclass(obj) or inspect.isfunction(obj)):
        return False
    home = getattr(obj, "__module__", None) or ""
    if home == __name__:  # this file's own functions could extend the trust they are judged by
        return False
    if _is_under(home, _TRUSTED):
        return True
    if not inspect.isclass(obj) or home.split(".")[0] in sys.stdlib_module_names:
        return False
    if home.startswith(_COMPONENT_MODULES):
        return True
    return any(issubclass(obj, base) for base in _loaded_bases())


def _loaded_bases() -> list[type]:
    """The component bases whose packages are loaded already: a class can only derive from a loaded one."""
    bases = []
    for name in _COMPONENT_BASES:
        module_name, _, attribute = name.rpartition(".")
        if module_name in sys.modules and hasattr(sys.modules[module_name], attribute):
            bases.append(getattr(sys.modules[module_name], attribute))
    return bases


def plain(config: Any) -> Any:
    """OmegaConf containers as plain dicts and lists (interpolations resolved); everything else unchanged."""
    if type(config).__module__.split(".")[0] == "omegaconf":
        from omegaconf import OmegaConf

        return OmegaConf.to_container(config, resolve=True)
    return config


def instantiate_from_config(config: Any, **overrides: Any) -> Any:
    """Build the object a config describes: `{target: package.module.Class, params: {...}}`.

    `overrides` are keyword arguments that replace or extend `params`. The strings `__is_first_stage__` and
    `__is_unconditional__` give None. Raises `ConfigError` for a missing, unknown or refused target, or for
    parameters that the class does not take.
    """
    config = plain(config)
    if config is None or (isinstance(config, str) and config in _NOT_A_MODEL):
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        shown = sorted(config) if isinstance(config, Mapping) else repr(config)
        raise ConfigError(f"a config needs the key 'target' (the class to build) and optionally 'params'; this one has {shown}")
    cls = get_obj_from_str(config["target"])
    given = config.get("params") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{config['target']}: params must be a mapping of names to values, not {given!r}")
    params = {**given, **overrides}
    try:
        inspect.signature(cls).bind(**params)
    except TypeError as error:
        raise ConfigError(f"{config['target']}: {error}; it takes {inspect.signature(cls)}") from None
    except ValueError:  # a class without an inspectable signature
        pass
    return cls(**params)


def names_weights(version: str) -> bool:
    """Whether the `version` of a text or image tower is a file of weights to read; a published name is not, a folder a ConfigError."""
    path = Path(version)
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        return True
    if path.exists():
        raise ConfigError(f"version: {version} is no file of weights: name the .safetensors, .ckpt, .pt, .pth or .bin file itself")
    return False


def exists(value: Any) -> bool:
    """True unless `value` is None."""
    return value is not None


def default(value: T | None, fallback: Any) -> T:
    """`value`, or `fallback` (called if it is a plain function) when `value` is None."""
    if value is not None:
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def ismap(x: Any) -> bool:
    """A batch of feature maps: a 4-d tensor with more than three channels."""
    return _is_tensor(x) and x.ndim == 4 and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """A batch of images: a 4-d tensor with one or three channels."""
    return _is_tensor(x) and x.ndim == 4 and x.shape[1] in (1, 3)


def _is_tensor(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def mean_flat(tensor: Any) -> Any:
    """Mean over all but the batch dimension: (B, ...) -> (B,)."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def count_params(model: Any, verbose: bool = False) -> int:
    """Number of elements in the parameters of `model`; logged in millions when `verbose`."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        import logging

        logging.getLogger(__name__).info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total


def log_txt_as_img(wh: tuple[int, int], xc: list[str], size: int = 10) -> Any:
    """Captions as pictures, for image logs: B strings -> float32 (B, 3, H, W) in [-1, 1], black on white. `wh` is (W, H) in pixels."""
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    width, height = wh
    per_line = max(int(40 * width / 256 * 10 / size), 1)
    pages = []
    for caption in xc:
        page = Image.new("RGB", (width, height), color="white")
        lines = [caption[i : i + per_line] for i in range(0, len(caption), per_line)]
        ImageDraw.Draw(page).multiline_text((2, 2), "\n".join(lines), fill="black", font=ImageFont.load_default(size))
        pages.append(np.asarray(page, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)
    return torch.from_numpy(np.stack(pages))
