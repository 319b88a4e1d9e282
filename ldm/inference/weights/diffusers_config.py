"""What the JSON files of a diffusers folder say, as a config of this project. Imports no torch; reads no weights.

Every setting that our classes cannot honour is a ConfigError that names it: a folder is understood or refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.inference.weights.files import read_json
from ldm.util import ConfigError, UserError

Json = dict[str, Any]

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "squaredcos_cap_v2"}  # theirs -> ours
UNET_CLASS, VAE_CLASSES = "UNet2DConditionModel", ("AutoencoderKL", "VQModel")
# Settings of which our networks have one value only.
_FIXED_UNET = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_FIXED_VAE = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_DDPM = "ldm.models.diffusion.ddpm."
_ENCODERS = "ldm.modules.encoders.modules."
_SGM = "sgm.modules.diffusionmodules."
_IDENTITY = {"target": "torch.nn.Identity"}
_OPENAI_TEXT = {(768, 12, 12): "openai/clip-vit-large-patch14", (512, 12, 8): "openai/clip-vit-base-patch16"}


# ---------------------------------------------------------------------------------------------------------------- reading
def is_pipeline(folder: Path) -> bool:
    """Is it the folder of a whole model, with a part in each of its own folders?"""
    return (folder / "model_index.json").is_file() or (folder / "unet" / "config.json").is_file()


def _check_fixed(settings: Json, fixed: Mapping[str, Any], what: str) -> None:
    def same(key: str, value: Any) -> bool:
        return settings[key] == value or (value is None and not settings[key])

    foreign = [f"{key}: {settings[key]}" for key, value in fixed.items() if key in settings and not same(key, value)]
    if foreign:
        raise ConfigError(f"the {what} of this folder has settings that are not supported here: {', '.join(foreign)}")


# ------------------------------------------------------------------------------------------------------------------- UNet
def unet_params(settings: Json) -> Json:
    """Arguments of UNetModel from unet/config.json."""
    name = settings.get("_class_name", UNET_CLASS)
    if name != UNET_CLASS:
        raise ConfigError(f"the UNet of this folder is a {name}; only {UNET_CLASS} is supported here")
    _check_fixed(settings, _FIXED_UNET, "UNet")
    widths, attention = _levels(settings)
    depth = settings.get("transformer_layers_per_block", 1)
    params = {
        "image_size": settings.get("sample_size") or 32,
        "in_channels": settings.get("in_channels", 4),
        "out_channels": settings.get("out_channels", 4),
        "model_channels": widths[0],
        "attention_resolutions": [2**i for i, there in enumerate(attention) if there],
        "num_res_blocks": settings.get("layers_per_block", 2),
        "channel_mult": _multiples(widths, "UNet"),
        "use_spatial_transformer": True,
        "transformer_depth": depth,
        "context_dim": settings.get("cross_attention_dim", 1280),
        "use_linear_in_transformer": bool(settings.get("use_linear_projection", False)),
        "legacy": False,
        **_head_params(settings, widths, attention),
        **_label_params(settings),
    }
    if not isinstance(params["context_dim"], int) or any(isinstance(d, list) for d in (depth if isinstance(depth, list) else [])):
        raise ConfigError("a UNet with a cross_attention_dim or transformer_layers_per_block for each block is not supported here")
    if any(only := _per_level(settings.get("only_cross_attention", False), len(widths))):
        params["disable_self_attentions"] = only
        params["disable_middle_self_attn"] = settings["only_cross_attention"] is True
    if settings.get("upcast_attention"):
        params["upcast_attention"] = True
    if settings.get("resnet_time_scale_shift", "default") != "default":
        params["use_scale_shift_norm"] = True
    if (groups := settings.get("norm_num_groups", 32)) != 32:
        params["num_groups"] = groups
    return params


def _levels(settings: Json) -> tuple[list[int], list[bool]]:
    """Width of every level, and whether it has attention."""
    widths = list(settings.get("block_out_channels", (320, 640, 1280, 1280)))
    down = list(settings.get("down_block_types", ("CrossAttnDownBlock2D",) * (len(widths) - 1) + ("DownBlock2D",)))
    up = list(settings.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(widths) - 1)))
    mirrored = [name.replace("Up", "Down") for name in reversed(up)]
    if down != mirrored or set(down) - {"CrossAttnDownBlock2D", "DownBlock2D"} or len(down) != len(widths):
        raise ConfigError(f"a UNet with the blocks {', '.join(down + up)} is not supported here")
    return widths, [name.startswith("CrossAttn") for name in down]


def _multiples(widths: list[int], what: str) -> list[int]:
    if any(width % widths[0] for width in widths):
        raise ConfigError(f"the {what}'s block_out_channels {widths} are not multiples of the first, which is all that is supported here")
    return [width // widths[0] for width in widths]


def _per_level(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _head_params(settings: Json, widths: list[int], attention: list[bool]) -> Json:
    """Number of heads, or channels a head. What diffusers calls attention_head_dim is the number of heads."""
    heads = _per_level(settings.get("num_attention_heads") or settings.get("attention_head_dim", 8), len(widths))
    used = [i for i, there in enumerate(attention) if there or i == len(widths) - 1]  # the middle is as the last level
    if len({heads[i] for i in used}) == 1:
        return {"num_heads": heads[used[0]]}
    if any(widths[i] % heads[i] for i in used) or len({widths[i] // heads[i] for i in used}) != 1:
        raise ConfigError(
            f"a UNet with {heads} heads at widths {widths} is not supported here: neither heads nor their widths are all the same"
        )
    return {"num_head_channels": widths[used[0]] // heads[used[0]]}


def _label_params(settings: Json) -> Json:
    """What is added to the timestep."""
    kind, added, count = (settings.get(key) for key in ("class_embed_type", "addition_embed_type", "num_class_embeds"))
    if (kind, added, count) == (None, None, None):
        return {}
    if kind is None and added is None:
        return {"num_classes": count}
    if (kind, added) in (("projection", None), (None, "text_time")):
        return {"num_classes": "sequential", "adm_in_channels": settings["projection_class_embeddings_input_dim"]}
    raise ConfigError(f"a UNet with class_embed_type {kind} and addition_embed_type {added} is not supported here")


# ------------------------------------------------------------------------------------------------------------- first stage
def first_stage_config(settings: Json) -> Json:
    """AutoencoderKL or VQModelInterface from vae/config.json."""
    name = settings.get("_class_name", VAE_CLASSES[0])
    if name not in VAE_CLASSES:
        raise ConfigError(f"the first stage of this folder is a {name}; supported here are {' and '.join(VAE_CLASSES)}")
    _check_fixed(settings, _FIXED_VAE, "autoencoder")
    widths = list(settings.get("block_out_channels", (64,)))
    attention = ["Attn" in block for block in settings.get("down_block_types", ())]
    latent, resolution = settings.get("latent_channels", 4), 256
    ddconfig = {
        "double_z": name == VAE_CLASSES[0],
        "z_channels": latent,
        "resolution": resolution,
        "in_channels": settings.get("in_channels", 3),
        "out_ch": settings.get("out_channels", 3),
        "ch": widths[0],
        "ch_mult": _multiples(widths, "autoencoder"),
        "num_res_blocks": settings.get("layers_per_block", 1),
        "attn_resolutions": [resolution >> i for i, there in enumerate(attention) if there],
        "dropout": 0.0,
    }
    if (groups := settings.get("norm_num_groups", 32)) != 32:
        ddconfig["num_groups"] = groups
    params: Json = {"embed_dim": latent, "ddconfig": ddconfig, "lossconfig": _IDENTITY}
    if name == VAE_CLASSES[0]:
        return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    params |= {"n_embed": settings["num_vq_embeddings"], "embed_dim": settings.get("vq_embed_dim") or latent}
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}


# ---------------------------------------------------------------------------------------------------------- text encoders
def is_open_clip(settings: Json) -> bool:
    """Was this text encoder trained with open_clip (SD 2, SDXL's second), rather than by OpenAI (SD 1, SDXL's first)?"""
    return settings.get("hidden_act", "quick_gelu") != "quick_gelu"


def open_clip_arch(settings: Json) -> Json:
    """A text tower in the form of open_clip's model configs."""
    width = settings["hidden_size"]
    text = {
        "context_length": settings.get("max_position_embeddings", 77),
        "vocab_size": settings.get("vocab_size", 49408),
        "width": width,
        "heads": settings["num_attention_heads"],
        "layers": settings["num_hidden_layers"],
    }
    if (ratio := settings["intermediate_size"] / width) != 4:
        text["mlp_ratio"] = ratio
    return {"embed_dim": settings.get("projection_dim", 512), "quick_gelu": not is_open_clip(settings), "text_cfg": text}


def _clip_version(settings: Json, folder: Path) -> str:
    """What FrozenCLIPEmbedder calls this architecture: a published name, or the folder itself."""
    size = (settings["hidden_size"], settings["num_hidden_layers"], settings["num_attention_heads"])
    has_own_words = (folder / "tokenizer" / "added_tokens.json").is_file()  # of textual inversion
    return str(folder) if has_own_words else _OPENAI_TEXT.get(size, str(folder))


def text_config(folder: Path) -> Json:
    """The one text encoder of an SD 1 or SD 2 folder, as far as it stands there: all its blocks are used, then the final norm."""
    settings = read_json(folder / "text_encoder" / "config.json")
    if is_open_clip(settings):
        return {"target": _ENCODERS + "FrozenOpenCLIPEmbedder", "params": {"arch": open_clip_arch(settings), "layer": "last"}}
    return {"target": _ENCODERS + "FrozenCLIPEmbedder", "params": {"version": _clip_version(settings, folder)}}


# --------------------------------------------------------------------------------------------------------------- schedule
def schedule_params(settings: Json) -> Json:
    """The noise schedule and what the network predicts, from scheduler_config.json."""
    _check_fixed(settings, {"trained_betas": None}, "scheduler")
    beta, prediction = settings.get("beta_schedule", "linear"), settings.get("prediction_type", "epsilon")
    if beta not in BETA_SCHEDULES or prediction not in PREDICTIONS:
        raise ConfigError(f"a scheduler with beta_schedule {beta} and prediction_type {prediction} is not supported here")
    params = {
        "parameterization": PREDICTIONS[prediction],
        "beta_schedule": BETA_SCHEDULES[beta],
        "linear_start": settings.get("beta_start", 1e-4),
        "linear_end": settings.get("beta_end", 0.02),
        "timesteps": settings.get("num_train_timesteps", 1000),
    }
    return {**params, "rescale_betas_zero_snr": True} if settings.get("rescale_betas_zero_snr") else params


# ------------------------------------------------------------------------------------------------------------ whole models
def config_from_folder(folder: str | Path) -> Json:
    """`{"model": {target, params}}` of a diffusers folder. Raises ConfigError for what our classes cannot be."""
    try:
        return _config_from_folder(Path(folder))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"the settings in {folder} are damaged ({reason}): fetch or copy its JSON files again") from None


def _config_from_folder(folder: Path) -> Json:
    unet = unet_params(read_json(folder / "unet" / "config.json"))
    vae = read_json(folder / ("vqvae" if (folder / "vqvae").is_dir() else "vae") / "config.json")
    schedule = schedule_params(read_json(folder / "scheduler" / "scheduler_config.json"))
    scale = vae.get("scaling_factor", 0.18215)
    if (folder / "text_encoder_2").is_dir():
        return {"model": _sdxl_config(folder, unet, first_stage_config(vae), schedule, scale)}
    _check_text_width(folder, unet, ("text_encoder",))
    name, extra = _variant(folder, unet)
    params = {
        **schedule,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet["image_size"],
        "channels": unet["out_channels"],
        "cond_stage_trainable": False,
        "scale_factor": scale,
        "use_ema": False,
        **extra,
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": first_stage_config(vae),
        "cond_stage_config": text_config(folder),
    }
    return {"model": {"target": _DDPM + name, "params": params}}


def _check_text_width(folder: Path, unet: Json, names: tuple[str, ...]) -> None:
    """Raises ConfigError unless the text encoders give what the UNet reads: one may have been left out."""
    width = sum(read_json(folder / name / "config.json")["hidden_size"] for name in names)
    if width != unet["context_dim"]:
        raise ConfigError(f"{folder}: the UNet reads {unet['context_dim']} channels of text, and {' and '.join(names)} give {width}")


def _variant(folder: Path, unet: Json) -> tuple[str, Json]:
    """Class and its own arguments, from what the network takes beside the noisy latent."""
    extra_channels = unet["in_channels"] - unet["out_channels"]
    if extra_channels == 0 and "num_classes" not in unet:
        return "LatentDiffusion", {"conditioning_key": "crossattn"}
    if extra_channels == 0 and (folder / "image_encoder").is_dir() and unet["num_classes"] == "sequential":
        return "ImageEmbeddingConditionedLatentDiffusion", _unclip_params(folder)
    if extra_channels == unet["out_channels"] + 1:
        return "LatentInpaintDiffusion", {"conditioning_key": "hybrid", "finetune_keys": None}
    if extra_channels == 3 and isinstance(unet.get("num_classes"), int):
        return "LatentUpscaleDiffusion", _upscaler_params(folder)
    if extra_channels == 1 and (folder / "depth_estimator").is_dir():
        stage = {"target": "ldm.modules.midas.api.MiDaSInference", "params": {"model_type": "dpt_hybrid"}}
        return "LatentDepth2ImageDiffusion", {"conditioning_key": "hybrid", "finetune_keys": None, "depth_stage_config": stage}
    raise ConfigError(
        f"{folder}: a UNet with {unet['in_channels']} input channels and num_classes {unet.get('num_classes')} is none of the models "
        "known here: text to image, inpainting, depth, x4 upscaling, unCLIP, SDXL"
    )


def _noise_config(settings: Json) -> Json:
    schedule = schedule_params(settings)
    return {key: schedule[key] for key in ("beta_schedule", "linear_start", "linear_end", "timesteps")}


def _upscaler_params(folder: Path) -> Json:
    noise = _noise_config(read_json(folder / "low_res_scheduler" / "scheduler_config.json"))
    level = read_json(folder / "model_index.json").get("max_noise_level", 350)
    target = "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation"
    stage = {"target": target, "params": {"noise_schedule_config": noise, "max_noise_level": level}}
    return {"conditioning_key": "hybrid-adm", "low_scale_key": "lr", "low_scale_config": stage}


def _unclip_params(folder: Path) -> Json:
    """The image encoder and what noises its embedding; its statistics are among the weights."""
    settings = read_json(folder / "image_encoder" / "config.json")
    noise = _noise_config(read_json(folder / "image_noising_scheduler" / "scheduler_config.json"))
    augment = {"noise_schedule_config": noise, "timestep_dim": settings["projection_dim"]}
    head = settings["hidden_size"] // settings["num_attention_heads"]
    vision: Json = {
        "image_size": settings["image_size"],
        "layers": settings["num_hidden_layers"],
        "width": settings["hidden_size"],
        "head_width": head,
        "patch_size": settings["patch_size"],
    }
    if (ratio := settings["intermediate_size"] / settings["hidden_size"]) != 4:
        vision["mlp_ratio"] = ratio
    text = {"width": 64, "heads": 1, "layers": 1, "vocab_size": 1, "context_length": 1}  # of no use here
    arch = {"embed_dim": settings["projection_dim"], "quick_gelu": not is_open_clip(settings), "vision_cfg": vision, "text_cfg": text}
    return {
        "conditioning_key": "crossattn-adm",
        "embedding_dropout": 0.25,
        "embedder_config": {"target": _ENCODERS + "FrozenOpenCLIPImageEmbedder", "params": {"arch": arch}},
        "noise_aug_config": {"target": _ENCODERS + "CLIPEmbeddingNoiseAugmentation", "params": augment},
    }


def _sdxl_config(folder: Path, unet: Json, first_stage: Json, schedule: Json, scale: float) -> Json:
    """SDXL base, or the refiner, which has the second text encoder only."""
    if schedule["beta_schedule"] != "linear":
        raise ConfigError(f"{folder}: SDXL with another noise schedule than scaled_linear is not supported here")
    _check_text_width(folder, unet, tuple(name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()))
    second = read_json(folder / "text_encoder_2" / "config.json")
    outdim = read_json(folder / "unet" / "config.json").get("addition_time_embed_dim") or 256
    numbers = (unet["adm_in_channels"] - second["projection_dim"]) // outdim
    sizes = ["original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple" if numbers == 6 else "aesthetic_score"]
    tower = {"arch": open_clip_arch(second), "layer": "penultimate", "always_return_pooled": True, "legacy": False, "freeze": True}
    embedders = [_embedder("FrozenOpenCLIPEmbedder2", "txt", tower)]
    embedders += [_embedder("ConcatTimestepEmbedderND", key, {"outdim": outdim}) for key in sizes]
    if (folder / "text_encoder").is_dir():
        first = read_json(folder / "text_encoder" / "config.json")
        clip = {"version": _clip_version(first, folder), "layer": "hidden", "layer_idx": first["num_hidden_layers"] - 1}
        embedders.insert(0, _embedder("FrozenCLIPEmbedder", "txt", clip))
    scaling = {"eps": "EpsScaling", "v": "VScaling"}
    if schedule["parameterization"] not in scaling:
        raise ConfigError(f"{folder}: SDXL that predicts {schedule['parameterization']} is not supported here; eps and v are")
    betas = {"linear_start": schedule["linear_start"], "linear_end": schedule["linear_end"], "num_timesteps": schedule["timesteps"]}
    if schedule.get("rescale_betas_zero_snr"):
        betas["rescale_betas_zero_snr"] = True
    denoiser = {
        "num_idx": schedule["timesteps"],
        "scaling_config": {"target": f"{_SGM}denoiser_scaling.{scaling[schedule['parameterization']]}"},
        "discretization_config": {"target": _SGM + "discretizer.LegacyDDPMDiscretization", "params": betas},
    }
    params = {
        "scale_factor": scale,
        "disable_first_stage_autocast": True,
        "denoiser_config": {"target": _SGM + "denoiser.DiscreteDenoiser", "params": denoiser},
        "network_config": {"target": _SGM + "openaimodel.UNetModel", "params": unet},
        "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": embedders}},
        "first_stage_config": {**first_stage, "target": first_stage["target"].replace("ldm.models", "sgm.models")},
    }
    return {"target": "sgm.models.diffusion.DiffusionEngine", "params": params}


def _embedder(name: str, key: str, params: Json) -> Json:
    return {"target": f"sgm.modules.encoders.modules.{name}", "is_trainable": False, "input_key": key, "params": params}
