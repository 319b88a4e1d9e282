"""What a model is made of, read in two ways that can be compared: from names and shapes of its tensors, and from its config.

Where both are equal, the config fits the weights. Knows neither files nor families. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ldm.inference.weights.files import TensorInfo
from ldm.inference.weights.key_names import published

Tensors = Mapping[str, TensorInfo]
Config = Mapping[str, Any]

_EMBEDDER = re.compile(r"conditioner\.embedders\.(\d+)\.")
# Last part of a text encoder's (or another condition's) class name -> its kind.
_CONDITIONS = {
    "FrozenCLIPEmbedder": "clip",
    "FrozenOpenCLIPEmbedder": "open_clip",
    "FrozenOpenCLIPEmbedder2": "open_clip",
    "FrozenCLIPTextEmbedder": "open_clip",
    "BERTEmbedder": "tokens",
    "TransformerEmbedder": "tokens",
    "FrozenT5Embedder": "t5",
    "ClassEmbedder": "class",
    "SpatialRescaler": "rescaler",
}


@dataclass(frozen=True)
class UNet:
    """The network that is trained to denoise."""

    in_channels: int
    out_channels: int
    width: int  # channels of the first level
    blocks: int  # on the way down
    middle: int  # channels at the lowest level
    context: int | None  # channels of what it attends to
    depth: int  # blocks of its largest transformer
    linear: bool  # projections into the transformers are linear layers
    classes: int | None  # of a learnt embedding that is added to the timestep
    vector: int | None  # channels of a vector that is added to the timestep


@dataclass(frozen=True)
class FirstStage:
    """The autoencoder."""

    kind: str  # kl or vq
    in_channels: int  # with patches cut into channels
    width: int  # channels of the first level
    levels: int
    latent: int  # channels of its latent
    codes: int | None  # entries of a codebook
    attention: tuple[int, ...]  # levels with attention
    middle_attention: bool

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, along one side, as far as the levels say it."""
        return 2 ** (self.levels - 1)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model; None or empty for what is not there."""

    unet: UNet | None
    first_stage: FirstStage | None
    conditions: tuple[str, ...]  # kinds of the encoders of the condition that have weights
    stages: frozenset[str]  # further networks: depth_model, embedder
    sgm: bool  # names of generative-models


# ------------------------------------------------------------------------------------------------------------- from names
def of_tensors(tensors: Tensors) -> Anatomy:
    """The parts that these tensors, under our names, belong to. A UNet, autoencoder or text encoder may stand without its prefix."""
    tensors = {published(name): info for name, info in tensors.items()}
    whole = any(name.startswith(("model.diffusion_model.", "first_stage_model.")) for name in tensors)
    sgm = any(name.startswith("conditioner.embedders.") for name in tensors)
    unet = _unet_of(_below(tensors, "model.diffusion_model." if whole else ""))
    first_stage = _first_stage_of(_below(tensors, "first_stage_model." if whole else ""))
    condition = _below(tensors, "cond_stage_model.") if whole else {} if unet or first_stage else tensors
    return Anatomy(
        unet=unet,
        first_stage=first_stage,
        conditions=_sgm_conditions(tensors) if sgm else _condition_of(condition),
        stages=frozenset(stage for stage in ("depth_model", "embedder") if any(name.startswith(stage + ".") for name in tensors)),
        sgm=sgm,
    )


def _below(tensors: Tensors, prefix: str) -> dict[str, TensorInfo]:
    return {name[len(prefix) :]: info for name, info in tensors.items() if name.startswith(prefix)}


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number in `pattern`'s group."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def _unet_of(tensors: Tensors) -> UNet | None:
    first, last, middle = (tensors.get(n) for n in ("input_blocks.0.0.weight", "out.2.weight", "middle_block.0.in_layers.0.weight"))
    if first is None or last is None or middle is None or len(first.shape) != 4:
        return None
    label, vector = tensors.get("label_emb.weight"), tensors.get("label_emb.0.0.weight")
    return UNet(
        in_channels=first.shape[1],
        out_channels=last.shape[0],
        width=first.shape[0],
        blocks=_count(tensors, r"input_blocks\.(\d+)\."),
        middle=middle.shape[0],
        context=next((info.shape[1] for name, info in tensors.items() if name.endswith(".attn2.to_k.weight")), None),
        depth=_count(tensors, r".*\.transformer_blocks\.(\d+)\."),
        linear=any(len(info.shape) == 2 for name, info in tensors.items() if name.endswith(".1.proj_in.weight")),
        classes=None if label is None else label.shape[0],
        vector=None if vector is None else vector.shape[1],
    )


def _first_stage_of(tensors: Tensors) -> FirstStage | None:
    first, post = tensors.get("encoder.conv_in.weight"), tensors.get("post_quant_conv.weight")
    if first is None or post is None:
        return None
    codes = tensors.get("quantize.embedding.weight")
    attention = {int(match[1]) for name in tensors if (match := re.match(r"encoder\.down\.(\d+)\.attn\.", name))}
    return FirstStage(
        kind="kl" if codes is None else "vq",
        in_channels=first.shape[1],
        width=first.shape[0],
        levels=_count(tensors, r"encoder\.down\.(\d+)\."),
        latent=post.shape[1],
        codes=None if codes is None else codes.shape[0],
        attention=tuple(sorted(attention)),
        middle_attention="encoder.mid.attn_1.q.weight" in tensors,
    )


def _condition_of(names: Iterable[str]) -> tuple[str, ...]:
    known = {
        "transformer.text_model.embeddings.token_embedding.weight": "clip",
        "text_model.embeddings.token_embedding.weight": "clip",
        "model.token_embedding.weight": "open_clip",
        "transformer.token_emb.weight": "tokens",
        "transformer.shared.weight": "t5",
        "embedding.weight": "class",
        "channel_mapper.weight": "rescaler",
        "encoder.conv_in.weight": "first_stage",
    }
    return tuple(kind for name, kind in known.items() if name in names)[:1]


def _sgm_conditions(tensors: Tensors) -> tuple[str, ...]:
    numbers = sorted({int(match[1]) for name in tensors if (match := _EMBEDDER.match(name))})
    return tuple(kind for n in numbers for kind in _condition_of(_below(tensors, f"conditioner.embedders.{n}.")))


# ------------------------------------------------------------------------------------------------------------ from config
def of_config(model: Config) -> Anatomy | None:
    """The parts that the `model` of a config describes; None where it is of no kind that is known here."""
    try:
        params = model.get("params") or {}
        if "ddconfig" in params:
            return Anatomy(None, _first_stage_in(model), (), frozenset(), False)
        sgm = "network_config" in params
        unet = params["network_config" if sgm else "unet_config"]
        return Anatomy(
            unet=_unet_in(unet.get("params") or {}) if _last(unet) == "UNetModel" else None,
            first_stage=_first_stage_in(params.get("first_stage_config") or {}),
            conditions=_conditions_in(params, sgm),
            stages=frozenset(
                stage for stage, key in (("depth_model", "depth_stage_config"), ("embedder", "embedder_config")) if key in params
            ),
            sgm=sgm,
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _last(config: Config) -> str:
    return str(config.get("target", "")).rpartition(".")[2]


def _unet_in(params: Config) -> UNet:
    mult, per_level = params.get("channel_mult", (1, 2, 4, 8)), params["num_res_blocks"]
    blocks = per_level * len(mult) if isinstance(per_level, int) else sum(per_level)
    transformers = params.get("use_spatial_transformer", params.get("context_dim") is not None)
    context, depth, classes = params.get("context_dim"), params.get("transformer_depth", 1), params.get("num_classes")
    return UNet(
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        width=params["model_channels"],
        blocks=blocks + len(mult),  # the first convolution, and what halves the size between levels
        middle=int(mult[-1] * params["model_channels"]),
        context=(context[0] if isinstance(context, (list, tuple)) else context) if transformers else None,
        depth=(max(depth) if isinstance(depth, (list, tuple)) else depth) if transformers else 0,
        linear=bool(transformers and params.get("use_linear_in_transformer", False)),
        classes=classes if isinstance(classes, int) else None,
        vector=params.get("adm_in_channels") if classes == "sequential" else None,
    )


def _first_stage_in(config: Config) -> FirstStage | None:
    params = config.get("params") or {}
    if "ddconfig" not in params:
        return None
    dd = params["ddconfig"]
    levels = len(dd["ch_mult"])
    resolution = dd.get("resolution", 256) // dd.get("patch_size", 1)
    return FirstStage(
        kind="vq" if "n_embed" in params else "kl",
        in_channels=dd["in_channels"] * dd.get("patch_size", 1) ** 2,
        width=dd["ch"],
        levels=levels,
        latent=params["embed_dim"],
        codes=params.get("n_embed"),
        attention=tuple(i for i in range(levels) if resolution >> i in dd.get("attn_resolutions", ())),
        middle_attention=dd.get("attn_type", "vanilla").startswith("vanilla"),
    )


def _conditions_in(params: Config, sgm: bool) -> tuple[str, ...]:
    if sgm:
        embedders = ((params.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or ()
        return tuple(_CONDITIONS[_last(one)] for one in embedders if _last(one) in _CONDITIONS)
    stage = params.get("cond_stage_config")
    if isinstance(stage, str):
        return ("first_stage",) if stage == "__is_first_stage__" else ()
    return tuple(kind for kind in [_CONDITIONS.get(_last(stage or {}))] if kind is not None)
