"""Which model a file or folder holds, found from names, shapes and headers alone; and which config draws with it. Imports no torch.

Owns: the names of families, where each says what its network predicts (marker tensors, metadata, scheduler, family), and the order in
which a config is looked for. What a model is made of is read by `anatomy`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ldm.inference import facts
from ldm.inference.facts import REPO, WEIGHTS_NAME, read_config
from ldm.inference.weights import anatomy, key_names
from ldm.inference.weights.anatomy import Anatomy
from ldm.inference.weights.files import Header, TensorInfo, read_header, read_json
from ldm.util import CheckpointError, ConfigError, UserError

PREDICTIONS = ("eps", "v", "x0")
EMBEDDED_CONFIG = "ldm.config"  # in a header: the model's config as JSON

# What a text-to-image UNet attends to, and what it takes beside the latent -> family, and what its network predicts if nothing says it.
_BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl-base"}
_BY_CHANNELS = {0: "", 1: "-depth", 4: "-pix2pix", 5: "-inpainting"}  # input channels beyond the latent's
_BY_VECTOR = {(1024, 1536): "unclip-l", (1024, 2048): "unclip-h", (2048, 2816): "sdxl-base", (1280, 2560): "sdxl-refiner"}
_FAMILY_PREDICTION = {
    "sd1": "eps",
    "sd1-inpainting": "eps",
    "sd1-pix2pix": "eps",
    "sd2-inpainting": "eps",
    "sd2-depth": "eps",
    "x4-upscaler": "v",
    "unclip-l": "v",
    "unclip-h": "v",
    "sdxl-base": "eps",
    "sdxl-base-inpainting": "eps",
    "sdxl-refiner": "eps",
}
TITLES = {
    "sd1": "Stable Diffusion 1.x",
    "sd1-inpainting": "Stable Diffusion 1.x inpainting",
    "sd1-pix2pix": "InstructPix2Pix (Stable Diffusion 1.x)",
    "sd2": "Stable Diffusion 2.x",
    "sd2-inpainting": "Stable Diffusion 2 inpainting",
    "sd2-depth": "Stable Diffusion 2 depth",
    "x4-upscaler": "Stable Diffusion x4 upscaler",
    "unclip-l": "Stable unCLIP, ViT-L",
    "unclip-h": "Stable unCLIP, ViT-H",
    "sdxl-base": "Stable Diffusion XL base",
    "sdxl-base-inpainting": "Stable Diffusion XL inpainting",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "ldm": "latent diffusion model",
    "first-stage": "autoencoder alone",
    "text-encoder": "text encoder alone",
    "lora": "LoRA: changes to a model, no model",
    "controlnet": "ControlNet: an addition to a model, no model",
    "embedding": "textual-inversion embedding: a word, no model",
    "safety-checker": "safety checker",
    "unknown": "nothing that is known here",
}
_METADATA_PREDICTIONS = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v", "sample": "x0", "x0": "x0"}
# Shipped configs in the order in which they are preferred where several fit.
_CONFIG_FOLDERS = (
    "configs/stable-diffusion",
    "models/shapes",
    "configs/latent-diffusion",
    "models/ldm",
    "configs/retrieval-augmented-diffusion",
    "models/first_stage_models",
    "configs/autoencoder",
    "configs/shapes",
)


@dataclass(frozen=True)
class Found:
    """What `identify` says about a weights file or a diffusers folder."""

    family: str  # a name of `TITLES`
    prediction: str | None  # eps, v or x0; None when the weights cannot tell (SD 2: base or v), or hold no network that predicts
    ema: bool  # moving averages beside the weights
    dtype: str  # of most of the values: float32, float16, bfloat16
    elements: int  # values in all tensors
    layout: str  # ldm | sgm | diffusers
    metadata: Mapping[str, str] = field(default_factory=dict)  # text in the file's header
    config: Path | None = None  # the shipped YAML that fits; None when there is none
    configs: Mapping[str | None, Path] = field(default_factory=dict)  # where predictions differ: prediction -> YAML that fits
    anatomy: Anatomy | None = None
    zero_snr: bool = False  # trained with zero terminal signal-to-noise ratio
    base: str = ""  # of a LoRA: the family it changes, as far as it shows

    @property
    def title(self) -> str:
        """The family in words."""
        return TITLES[self.family]


# -------------------------------------------------------------------------------------------------------------- identifying
def identify(path: str | Path) -> Found:
    """Look at names, shapes and headers of a .safetensors, .ckpt or diffusers folder. Raises CheckpointError when it cannot be read."""
    path = Path(path)
    header, layout = _header(path)
    tensors = {key_names.unwrapped(name): info for name, info in header.tensors.items()}
    parts = anatomy.of_tensors(tensors)
    family = _addition(tensors) or _family(parts)
    prediction = _told_prediction(path, tensors, header.metadata) or _FAMILY_PREDICTION.get(family)
    configs = _fitting(parts)
    if prediction is None and family == "ldm" and len({config_prediction(_shipped()[c][0]) for c in configs}) == 1:
        prediction = config_prediction(_shipped()[configs[0]][0])
    by_prediction = {config_prediction(_shipped()[path][0]): path for path in reversed(configs)}
    kinds = Counter[str]()
    for info in tensors.values():
        kinds[info.dtype] += info.elements
    return Found(
        family=family,
        prediction=prediction,
        ema=any(name.startswith("model_ema.") and not key_names.is_ema_state(name) for name in tensors),
        dtype=kinds.most_common(1)[0][0],
        elements=kinds.total(),
        layout="sgm" if parts.sgm and layout != "diffusers" else layout,
        metadata=header.metadata,
        config=by_prediction.get(prediction, next(iter(configs), None)),
        configs=by_prediction,
        anatomy=parts,
        zero_snr="ztsnr" in tensors or _scheduler(path).get("rescale_betas_zero_snr") is True,
        base=_lora_base(tensors) if family == "lora" else "",
    )


def _header(path: Path) -> tuple[Header, str]:
    """Header under our names, and the layout of the names in the file."""
    from ldm.inference.weights.diffusers_folder import folder_header
    from ldm.inference.weights.diffusers_names import kind_of_names, shape_of, to_ours

    if path.is_dir():
        return folder_header(path), "diffusers"
    header = read_header(path)
    kind = kind_of_names(header.tensors)
    if kind is None:
        return header, "ldm"
    shapes = {name: info.shape for name, info in header.tensors.items()}
    infos = {
        name: TensorInfo(header.tensors[recipe.sources[0]].dtype, shape_of(recipe, shapes))
        for name, recipe in to_ours(kind, header.tensors).items()
    }
    return Header(infos, header.metadata), "diffusers"


def _family(parts: Anatomy) -> str:
    unet = parts.unet
    if unet is None:
        return "first-stage" if parts.first_stage else "text-encoder" if parts.conditions else "unknown"
    extra = unet.in_channels - unet.out_channels
    if (unet.width, unet.context, extra, unet.classes) == (256, 1024, 3, 1000):
        return "x4-upscaler"
    if unet.context is not None and unet.vector is not None:
        return _with_channels(_BY_VECTOR.get((unet.context, unet.vector), "ldm"), extra)
    if unet.width == 320 and unet.out_channels == 4 and unet.classes is None and unet.context in (768, 1024):
        return _with_channels(_BY_CONTEXT[unet.context], extra)
    return "ldm"


def _with_channels(family: str, extra: int) -> str:
    name = family + _BY_CHANNELS.get(extra, "-?")
    return name if name in TITLES else "ldm"


def _addition(tensors: Mapping[str, TensorInfo]) -> str | None:
    """What is no model of its own."""
    if any(".lora_down." in name or ".lora_A." in name or ".lora.down." in name or ".lora_linear_layer.down." in name for name in tensors):
        return "lora"
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.")) for name in tensors):
        return "controlnet"
    if "concept_embeds" in tensors:
        return "safety-checker"
    return "embedding" if len(tensors) <= 2 and tensors.keys() <= {"emb_params", "clip_l", "clip_g", "*"} else None


def _lora_base(tensors: Mapping[str, TensorInfo]) -> str:
    """From the width of the text that its cross-attention reads."""
    downs = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
    widths = {info.shape[1] for name, info in tensors.items() if "attn2" in name and "to_k" in name and name.endswith(downs)}
    return next((TITLES[_BY_CONTEXT[width]] for width in widths if width in _BY_CONTEXT), "")


def _scheduler(path: Path) -> dict[str, Any]:
    config = path / "scheduler" / "scheduler_config.json"
    return read_json(config) if config.is_file() else {}


def _told_prediction(path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    """What the file itself says, by a marker tensor, its metadata or its scheduler."""
    if "v_pred" in tensors:
        return "v"
    if scheduler := _scheduler(path):
        return _METADATA_PREDICTIONS.get(str(scheduler.get("prediction_type", "epsilon")))
    if EMBEDDED_CONFIG in metadata:
        return config_prediction(_embedded(path, metadata))
    told = _METADATA_PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower())
    architecture = metadata.get("modelspec.architecture", "")
    return told or ("v" if architecture.endswith("-768-v") else "eps" if architecture.endswith("v2-512") else None)


# ------------------------------------------------------------------------------------------------------------------ configs
@cache
def _shipped() -> dict[Path, tuple[dict[str, Any], Anatomy]]:
    """Every shipped config of a model that has weights, in order of preference."""
    import yaml

    found = {}
    for folder in _CONFIG_FOLDERS:
        for path in sorted((REPO / folder).glob("*.yaml")) + sorted((REPO / folder).glob("*/config.yaml")):
            content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            parts = anatomy.of_config(content.get("model") or {})
            if parts is not None:
                found[path] = (content, parts)
    return found


def _fitting(parts: Anatomy) -> list[Path]:
    return [path for path, (_, its) in _shipped().items() if its == parts]


def config_prediction(config: Mapping[str, Any]) -> str | None:
    """eps, v or x0, as a config says it; None for a model that does not predict."""
    params = (config.get("model") or {}).get("params") or {}
    if "denoiser_config" in params:
        scaling = str(((params["denoiser_config"].get("params") or {}).get("scaling_config") or {}).get("target", ""))
        return "v" if "VScaling" in scaling else "eps" if "EpsScaling" in scaling else None
    return str(params.get("parameterization", "eps")) if "unet_config" in params else None


def with_prediction(config: Mapping[str, Any], prediction: str, zero_snr: bool = False) -> dict[str, Any]:
    """The same config for a network that predicts `prediction`. Raises ConfigError where its class cannot."""
    model = dict(config["model"])
    params = dict(model.get("params") or {})
    if "denoiser_config" in params:
        names = {"eps": "EpsScaling", "v": "VScaling"}
        if prediction not in names:
            raise ConfigError(f"a model of generative-models (SDXL) with prediction {prediction} is not supported here")
        denoiser = dict(params["denoiser_config"])
        target = f"sgm.modules.diffusionmodules.denoiser_scaling.{names[prediction]}"
        denoiser["params"] = {**denoiser["params"], "scaling_config": {"target": target}}
        if zero_snr and prediction == "eps":
            raise ConfigError("zero terminal SNR needs a prediction of v: at zero SNR the noise says nothing about x0; give --prediction v")
        if zero_snr:
            levels = denoiser["params"]["discretization_config"]
            betas = {**(levels.get("params") or {}), "rescale_betas_zero_snr": True}
            denoiser["params"]["discretization_config"] = {**levels, "params": betas}
        params["denoiser_config"] = denoiser
    else:
        params["parameterization"] = prediction
        if zero_snr:
            params["rescale_betas_zero_snr"] = True
    return {**config, "model": {**model, "params": params}}


def _embedded(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        return read_config(json.loads(metadata[EMBEDDED_CONFIG]))
    except (json.JSONDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: the config in its header is damaged ({error}): name one by --config") from None


# ---------------------------------------------------------------------------------------------------------------- resolving
def resolve_model(config: str | None, ckpt: str | None, prediction: str | None = None) -> tuple[str | dict[str, Any], str]:
    """Config and weights from what was named of them: (path of a YAML, or a config as plain containers; path of the weights).

    Both kinds of config go into `facts.read_config`, `facts.read_facts` and `models.load_model`. With neither, the model that ships.
    Without `config`: the YAML beside the weights (of the same name, or config.yaml), the one in the file's header, that of a diffusers
    folder's own settings, the shipped one that fits. `prediction` (eps, v, x0; the flag --prediction) overrules what these say, and is
    asked for, in a UserError, where nothing says it.
    """
    if prediction is not None and prediction not in PREDICTIONS:
        raise UserError(f"--prediction {prediction!r} is unknown: use {', '.join(PREDICTIONS)}")
    if ckpt is None:
        config, ckpt = _beside_config(config)
    elif not Path(ckpt).exists():
        raise UserError(f"checkpoint {ckpt!r} does not exist: check --ckpt")
    if config is not None and not Path(config).is_file():
        raise UserError(f"config {config!r} does not exist: check --config")
    found = config or _sibling(Path(ckpt))
    chosen: str | dict[str, Any] = _from_weights(Path(ckpt), prediction) if found is None else found
    if prediction is not None and config_prediction(content := read_config(chosen)) not in (prediction, None):
        chosen = with_prediction(content, prediction)
    return chosen, ckpt


def _beside_config(config: str | None) -> tuple[str, str]:
    config = str(config or facts.SHIPPED_CONFIG)
    ckpt = str(Path(config).parent / WEIGHTS_NAME)
    if not Path(config).is_file():
        raise UserError(f"config {config!r} does not exist")
    if not Path(ckpt).is_file():
        raise UserError(f"no weights {WEIGHTS_NAME} beside {config!r}: name them by --ckpt")
    return config, ckpt


def _sibling(ckpt: Path) -> str | None:
    """The YAML beside a weights file."""
    if ckpt.is_dir():
        return None
    return next((str(path) for path in (ckpt.with_suffix(".yaml"), ckpt.parent / "config.yaml") if path.is_file()), None)


def _from_weights(ckpt: Path, prediction: str | None) -> str | dict[str, Any]:
    if ckpt.is_dir():
        from ldm.inference.weights.diffusers_config import config_from_folder, is_pipeline
        from ldm.inference.weights.diffusers_folder import REST

        if not is_pipeline(ckpt):
            raise UserError(f"{str(ckpt)!r} is not the folder of a whole model, which has model_index.json: name that one by --ckpt")
        header = read_header(ckpt / REST).metadata if (ckpt / REST).is_file() else {}
        return _embedded(ckpt, header) if EMBEDDED_CONFIG in header else config_from_folder(ckpt)
    found = identify(ckpt)
    if EMBEDDED_CONFIG in found.metadata:
        return _embedded(ckpt, found.metadata)
    if found.config is None:
        raise UserError(f"{str(ckpt)!r} holds {_a(found)}; no config that ships fits it: {_cure(found)}")
    if None in found.configs:  # an autoencoder, which predicts nothing
        return str(found.configs[None])
    prediction = prediction or found.prediction
    if prediction is None:
        raise UserError(
            f"{str(ckpt)!r} holds {_a(found)}, and nothing in it says what it predicts: give --prediction eps (base models, 512 pixels) "
            "or --prediction v (768 pixels)"
        )
    if prediction in found.configs and not found.zero_snr:
        return str(found.configs[prediction])
    return with_prediction(read_config(found.config), prediction, found.zero_snr)


def _a(found: Found) -> str:
    return found.title if found.family == "unknown" else f"{'an' if found.title[0] in 'aeiou' else 'a'} {found.title}"


def _cure(found: Found) -> str:
    if found.family in ("lora", "controlnet", "embedding", "safety-checker"):
        return "name the model itself by --ckpt"
    return "name its YAML by --config"


def title_of(tensors: Mapping[str, TensorInfo]) -> str:
    """The family that these tensors, under our names, are of, in words; "" for one that has no name of its own."""
    family = _addition(tensors) or _family(anatomy.of_tensors(tensors))
    return "" if family in ("ldm", "first-stage", "text-encoder", "unknown") else TITLES[family]


def known_family(path: str | Path) -> Found:
    """As `identify`, but raises CheckpointError for what is no model."""
    found = identify(path)
    if found.family in ("lora", "controlnet", "embedding", "safety-checker", "unknown"):
        raise CheckpointError(f"{path} holds {_a(found)}")
    return found
