"""A config of this project as the JSON files of a diffusers folder: the way back of `diffusers_config`. Reads no weights.

A model that diffusers' classes cannot be is a ConfigError that names why.
"""

from __future__ import annotations

from ldm.inference.weights.diffusers_config import BETA_SCHEDULES, PREDICTIONS, UNET_CLASS, Json
from ldm.inference.weights.diffusers_names import CLIP
from ldm.util import ConfigError

VERSION = "0.42.1"  # of diffusers whose settings these are
_UNET_DEFAULTS = {  # arguments of UNetModel for which diffusers has no setting, and the one value that it stands for
    "conv_resample": True,
    "dims": 2,
    "resblock_updown": False,
    "use_scale_shift_norm": False,
    "n_embed": None,
    "num_attention_blocks": None,
    "disable_middle_transformer": False,
    "transformer_depth_middle": None,
    "num_heads_upsample": -1,
}


# --------------------------------------------------------------------------------------------------------------- settings
def unet_json(params: Json, label: str, size: int) -> Json:
    """unet/config.json from the arguments of UNetModel. Raises ConfigError for a network that diffusers does not have."""
    foreign = [f"{key}: {params[key]}" for key, value in _UNET_DEFAULTS.items() if params.get(key, value) != value]
    if not params.get("use_spatial_transformer", params.get("context_dim") is not None):
        foreign.append("attention without a context")
    if foreign:
        raise ConfigError(f"diffusers has no UNet with {', '.join(foreign)}: this model stays a single file")
    mult, width = list(params["channel_mult"]), params["model_channels"]
    widths, levels = [int(m * width) for m in mult], range(len(mult))
    attention = [2**i in params["attention_resolutions"] for i in levels]
    context, head = params["context_dim"], params.get("num_head_channels", -1)
    down = ["CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attention]
    return {
        "_class_name": UNET_CLASS,
        "_diffusers_version": VERSION,
        "sample_size": size,
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"],
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "attention_head_dim": [w // head for w in widths] if head != -1 else params["num_heads"],  # the number of heads
        "cross_attention_dim": context[0] if isinstance(context, (list, tuple)) else context,
        "transformer_layers_per_block": params.get("transformer_depth", 1),
        "use_linear_projection": bool(params.get("use_linear_in_transformer", False)),
        "upcast_attention": bool(params.get("upcast_attention", False)),
        "norm_num_groups": params.get("num_groups", 32),
        "only_cross_attention": _only_cross(params, len(mult)),
        **_label_json(params, label),
    }


def _only_cross(params: Json, levels: int) -> bool | list[bool]:
    only = list(params.get("disable_self_attentions") or [False] * levels)
    if params.get("disable_middle_self_attn", False):
        if not all(only):
            raise ConfigError(
                "diffusers has no UNet that attends to itself on some levels but not in the middle: this model stays a single file"
            )
        return True
    return only if any(only) else False


def _label_json(params: Json, label: str) -> Json:
    classes = params.get("num_classes")
    if classes is None:
        return {}
    if isinstance(classes, int):
        return {"num_class_embeds": classes}
    if classes != "sequential":
        raise ConfigError(f"diffusers has no UNet with num_classes {classes}: this model stays a single file")
    kind = {"class_embed_type": "projection"} if label == "class_embedding" else {"addition_embed_type": "text_time"}
    return {**kind, "projection_class_embeddings_input_dim": params["adm_in_channels"]}


def vae_json(config: Json, scale: float) -> Json:
    """vae/config.json from a first stage's config."""
    params, name = config["params"], config["target"].rpartition(".")[2]
    dd = params["ddconfig"]
    if (
        dd.get("patch_size", 1) != 1
        or not dd.get("attn_type", "vanilla").startswith("vanilla")
        or name not in ("AutoencoderKL", "VQModelInterface")
    ):
        raise ConfigError(f"diffusers has no autoencoder like this {name} with {dd}: this model stays a single file")
    attention = [dd["resolution"] >> i in dd["attn_resolutions"] for i in range(len(dd["ch_mult"]))]
    down = ["AttnDownEncoderBlock2D" if there else "DownEncoderBlock2D" for there in attention]
    settings = {
        "_class_name": "AutoencoderKL" if name == "AutoencoderKL" else "VQModel",
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": [dd["ch"] * m for m in dd["ch_mult"]],
        "down_block_types": down,
        "up_block_types": [block.replace("DownEncoder", "UpDecoder") for block in reversed(down)],
        "in_channels": dd["in_channels"],
        "out_channels": dd["out_ch"],
        "latent_channels": dd["z_channels"],
        "layers_per_block": dd["num_res_blocks"],
        "norm_num_groups": dd.get("num_groups", 32),
        "scaling_factor": scale,
    }
    if name == "AutoencoderKL":
        return settings
    return {**settings, "num_vq_embeddings": params["n_embed"], "vq_embed_dim": params["embed_dim"]}


def text_json(params: Json, kind: str, blocks: int, projected: bool) -> Json:
    """config.json of a CLIP text encoder with so many blocks."""
    settings = _clip_sizes(params) if kind == CLIP else _open_clip_sizes(params)
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **settings,
        "num_hidden_layers": blocks,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 1,
    }


def _clip_sizes(params: Json) -> Json:
    import torch

    from ldm.modules.encoders.text import FrozenCLIPEmbedder

    with torch.device("meta"):
        config = FrozenCLIPEmbedder(**{key: value for key, value in params.items() if key == "version"}).transformer.config
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "projection_dim",
        "max_position_embeddings",
        "vocab_size",
        "hidden_act",
    )
    return {name: getattr(config, name) for name in names}


def _open_clip_sizes(params: Json) -> Json:
    from ldm.modules.encoders.clip_towers import read_arch

    _, values = read_arch(params.get("arch", "ViT-H-14"))
    text = values["text_cfg"]
    width = text.get("width", 512)
    return {
        "hidden_size": width,
        "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
        "num_attention_heads": text.get("heads", 8),
        "projection_dim": values["embed_dim"],
        "max_position_embeddings": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", 49408),
        "hidden_act": "quick_gelu" if values.get("quick_gelu") else "gelu",
    }


def vision_json(params: Json) -> Json:
    """image_encoder/config.json from the arguments of an image embedder (Stable unCLIP)."""
    from ldm.modules.encoders.clip_towers import VisionConfig, read_arch
    from ldm.modules.encoders.image import OPENAI_NAMES

    arch = params.get("arch", "ViT-H-14") if "model" not in params else params["model"]
    name, values = read_arch(OPENAI_NAMES.get(arch, arch) if isinstance(arch, str) else arch)
    vision = VisionConfig.read(values["vision_cfg"], name)
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.width // vision.head_width,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "projection_dim": values["embed_dim"],
        "hidden_act": "quick_gelu" if values.get("quick_gelu") else "gelu",
        "layer_norm_eps": 1e-5,
    }


def scheduler_json(schedule: Json, prediction: str, name: str = "DDIMScheduler") -> Json:
    """scheduler_config.json from the arguments of a noise schedule."""
    theirs = {ours: name for name, ours in BETA_SCHEDULES.items()} | {"cosine": "squaredcos_cap_v2"}
    beta = schedule.get("beta_schedule", "linear")
    if beta not in theirs or schedule.get("given_betas") is not None:
        raise ConfigError(f"diffusers has no noise schedule like beta_schedule {beta}: this model stays a single file")
    return {
        "_class_name": name,
        "_diffusers_version": VERSION,
        "beta_schedule": theirs[beta],
        "beta_start": schedule.get("linear_start", 1e-4),
        "beta_end": schedule.get("linear_end", 0.02),
        "num_train_timesteps": schedule.get("timesteps", 1000),
        "prediction_type": next(their for their, our in PREDICTIONS.items() if our == prediction),
        "rescale_betas_zero_snr": bool(schedule.get("rescale_betas_zero_snr", False)),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
