"""A checkpoint as a diffusers folder: settings as JSON, weights under diffusers' names, tokeniser files, and what has no place there.

Tensors that belong to no part (schedule buffers, unused blocks of a text encoder, averages' counters), the header's text and the config
go into one more file, which diffusers does not look at, so that the way back loses nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.inference.checkpoint import save_weights
from ldm.inference.facts import read_facts
from ldm.inference.weights import diffusers_depth, key_names
from ldm.inference.weights.diffusers_config import Json
from ldm.inference.weights.diffusers_folder import NOTHING, REST, apply_recipe
from ldm.inference.weights.diffusers_names import CLIP, DEPTH, OPEN_CLIP, UNET, VAE, VISION, to_theirs
from ldm.inference.weights.diffusers_settings import VERSION, scheduler_json, text_json, unet_json, vae_json, vision_json
from ldm.inference.weights.families import EMBEDDED_CONFIG, config_prediction
from ldm.modules.encoders.image import CLIP_MEAN, CLIP_STD
from ldm.modules.encoders.tokenizers import CONTEXT_LENGTH, END, START, clip_bpe
from ldm.util import ConfigError, UserError, instantiate_from_config

_UNET = "model.diffusion_model."
_PIPELINES = {  # by the class of our model
    "LatentDiffusion": "StableDiffusionPipeline",
    "LatentInpaintDiffusion": "StableDiffusionInpaintPipeline",
    "LatentDepth2ImageDiffusion": "StableDiffusionDepth2ImgPipeline",
    "LatentUpscaleDiffusion": "StableDiffusionUpscalePipeline",
    "ImageEmbeddingConditionedLatentDiffusion": "StableUnCLIPImg2ImgPipeline",
    "DiffusionEngine": "StableDiffusionXLPipeline",
}
_TEXT = {"FrozenCLIPEmbedder": CLIP, "FrozenOpenCLIPEmbedder": OPEN_CLIP, "FrozenOpenCLIPEmbedder2": OPEN_CLIP}


def write_folder(state: Mapping[str, Tensor], config: Json, target: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write `state`, a whole model's tensors under our names, as the diffusers folder `target`, whole or not at all.

    `config` says what the tensors do not: heads, schedule, prediction. Raises ConfigError for a model that diffusers does not have.
    """
    if target.exists():
        raise UserError(f"{target} exists already: choose another name")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        _Writer(key_names.spelled(state), config, temporary).write(metadata or {})
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _class(config: Json) -> str:
    return str(config["target"]).rpartition(".")[2]


@dataclass(frozen=True)
class _Text:
    """A text encoder of the model, and where it goes."""

    folder: str
    kind: str  # of `diffusers_names`
    prefix: str  # of its names
    params: Json  # arguments of its class
    projected: bool  # SDXL's second, of which the pooled feature is used too


class _Writer:
    """One folder being written. `rest` is what no part has taken yet."""

    def __init__(self, state: dict[str, Tensor], config: Json, folder: Path) -> None:
        self.state, self.rest = state, dict(state)
        self.config, self.params, self.name = config, config["model"]["params"], _class(config["model"])
        self.folder = folder
        if self.name not in _PIPELINES:
            raise ConfigError(f"diffusers has no folder for a {self.name}: this model stays a single file")
        self.sgm = self.name == "DiffusionEngine"
        self.xl = False  # with two text encoders, or the second of them alone
        self.prediction = config_prediction(config) or "eps"
        self.index: Json = {"_class_name": _PIPELINES[self.name], "_diffusers_version": VERSION}

    def write(self, metadata: Mapping[str, str]) -> None:
        """All parts, then what is left."""
        texts = self._texts()
        self.xl = any(text.projected for text in texts)
        self._check(texts)
        self._unet()
        self._vae()
        for text in texts:
            self._text(text)
        self._scheduler("scheduler", self._schedule(), self.prediction)
        self.index["scheduler"] = ["diffusers", "DDIMScheduler"]
        self._particulars(texts)
        self._json("model_index.json", self.index)
        header = {**metadata, EMBEDDED_CONFIG: json.dumps({key: self.config[key] for key in ("model", "sampling") if key in self.config})}
        save_weights(self.rest or {NOTHING: torch.zeros(0)}, self.folder / REST, metadata=header)

    # ------------------------------------------------------------------------------------------------------------- parts
    def _unet(self) -> None:
        config = self.params["network_config" if self.sgm else "unet_config"]["params"]
        label = "add_embedding" if self.xl else "class_embedding"
        settings = unet_json(config, label, read_facts(self.config).image_size)
        if self.xl:
            settings["addition_time_embed_dim"] = self._size_channels()
        trained = self._take(_UNET)
        shadows = {name: key_names.shadows([name], "model_ema.", "model.")[name] for name in trained}
        averaged = {name: self.rest.pop(shadow) for name, shadow in shadows.items() if shadow in self.rest}
        drawing = {name.removeprefix(_UNET): averaged.get(name, value) for name, value in trained.items()}
        self._weights("unet", UNET, drawing, "", label=label)
        if averaged:
            self._weights("unet", UNET, {name.removeprefix(_UNET): value for name, value in trained.items()}, ".non_ema", label=label)
        self._json("unet/config.json", settings)
        self.index["unet"] = ["diffusers", "UNet2DConditionModel"]

    def _vae(self) -> None:
        scale = self.params.get("scale_factor", 1.0)
        if (own := self.state.get("scale_factor")) is not None:
            scale = float(own)
        settings = vae_json(self.params["first_stage_config"], scale)
        taken = {name.removeprefix("first_stage_model."): value for name, value in self._take("first_stage_model.").items()}
        self._weights("vae", VAE, taken, "")
        self._json("vae/config.json", settings)
        self.index["vae"] = ["diffusers", settings["_class_name"]]

    def _texts(self) -> list[_Text]:
        """The text encoders; raises ConfigError where diffusers has none like them."""
        if not self.sgm:
            stage = self.params.get("cond_stage_config")
            kind = _TEXT.get(_class(stage)) if isinstance(stage, dict) else None
            if kind is None:
                raise ConfigError("diffusers has no folder for a model without a CLIP text encoder: this model stays a single file")
            prefix = "cond_stage_model." + ("model." if kind == OPEN_CLIP else "")
            return [_Text("text_encoder", kind, prefix, stage.get("params") or {}, False)]
        found = []
        for number, one in enumerate(self.params["conditioner_config"]["params"]["emb_models"]):
            kind = _TEXT.get(_class(one))
            if kind is not None:
                second = _class(one) == "FrozenOpenCLIPEmbedder2"
                prefix = f"conditioner.embedders.{number}." + ("model." if kind == OPEN_CLIP else "")
                found.append(_Text("text_encoder_2" if second else "text_encoder", kind, prefix, one.get("params") or {}, second))
        return found

    def _check(self, texts: list[_Text]) -> None:
        """Raises ConfigError for a condition that none of diffusers' pipelines computes."""
        expected = {CLIP: ("hidden",), OPEN_CLIP: ("penultimate",)} if self.xl else {CLIP: ("last",), OPEN_CLIP: ("last", "penultimate")}
        foreign = [
            f"features of the layer {layer}" for text in texts if (layer := text.params.get("layer", "last")) not in expected[text.kind]
        ]
        embedders = self.params["conditioner_config"]["params"]["emb_models"] if self.sgm else ()
        if not texts or (not self.xl and len(embedders) > 1):
            foreign += [f"the embedders {', '.join(_class(one) for one in embedders) or 'none'}"]
        if foreign:
            raise ConfigError(f"diffusers has no pipeline with {', '.join(foreign)}: this model stays a single file")

    def _text(self, text: _Text) -> None:
        taken = {name.removeprefix(text.prefix): value for name, value in self._take(text.prefix).items()}
        left: dict[str, Tensor] = {}
        if text.kind == OPEN_CLIP and not text.projected:  # diffusers runs all blocks there are, then the final norm
            left = _unused(taken, text.params)
        elif text.kind == OPEN_CLIP:
            left = {name: taken[name] for name in ("logit_scale",) if name in taken}
        self.rest |= {text.prefix + name: value for name, value in left.items()}
        used = {name: value for name, value in taken.items() if name not in left}
        blocks = 1 + max(int(match[1]) for name in used if (match := re.search(r"(?:layers|resblocks)\.(\d+)\.", name)))
        self._weights(text.folder, text.kind, used, "", prefix=text.prefix)
        self._json(f"{text.folder}/config.json", text_json(text.params, text.kind, blocks, text.projected))
        self.index[text.folder] = ["transformers", "CLIPTextModelWithProjection" if text.projected else "CLIPTextModel"]
        tokenizer, pad = text.folder.replace("text_encoder", "tokenizer"), "!" if text.kind == OPEN_CLIP else "<|endoftext|>"
        write_tokenizer(self.folder / tokenizer, pad, text.params.get("max_length", CONTEXT_LENGTH))
        self.index[tokenizer] = ["transformers", "CLIPTokenizer"]

    def _particulars(self, texts: list[_Text]) -> None:
        """What only some pipelines have."""
        if self.xl:
            refiner = len(texts) == 1
            self.index["force_zeros_for_empty_prompt"] = not refiner
            if refiner:
                self.index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
                self.index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
        elif self.name == "LatentUpscaleDiffusion":
            low = self.params["low_scale_config"]["params"]
            self._scheduler("low_res_scheduler", low["noise_schedule_config"], "eps", "DDPMScheduler")
            self.index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": low.get("max_noise_level", 1000)}
        elif self.name == "ImageEmbeddingConditionedLatentDiffusion":
            self._unclip()
        elif self.name == "LatentDepth2ImageDiffusion":
            self._depth()
        else:
            absent = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
            self.index |= {"_class_name": _PIPELINES["LatentDiffusion"], **absent} if self.sgm else absent

    def _depth(self) -> None:
        prefix = "depth_model.model."
        self._weights("depth_estimator", DEPTH, {n.removeprefix(prefix): v for n, v in self._take(prefix).items()}, "", prefix=prefix)
        self._json("depth_estimator/config.json", diffusers_depth.SETTINGS)
        self._json("feature_extractor/preprocessor_config.json", diffusers_depth.IMAGES)
        self.index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
        self.index["feature_extractor"] = ["transformers", "DPTImageProcessor"]

    def _unclip(self) -> None:
        prefix = "embedder.model.visual."
        taken = {name.removeprefix(prefix): value for name, value in self._take(prefix).items()}
        self._weights("image_encoder", VISION, taken, "", prefix=prefix)
        settings = vision_json(self.params["embedder_config"].get("params") or {})
        self._json("image_encoder/config.json", settings)
        size = settings["image_size"]
        images = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
        }
        self._json("feature_extractor/preprocessor_config.json", {**images, "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3})
        augment = self.params["noise_aug_config"]["params"]
        self._scheduler("image_noising_scheduler", augment["noise_schedule_config"], "eps", "DDPMScheduler")
        mean, std = (self.rest.pop(f"noise_augmentor.data_{name}", None) for name in ("mean", "std"))
        if mean is None or std is None:  # a published checkpoint leaves them to its config
            stage = instantiate_from_config(self.params["noise_aug_config"])
            mean, std = stage.data_mean, stage.data_std
        save_weights({"mean": mean, "std": std}, self.folder / "image_normalizer" / "diffusion_pytorch_model.safetensors")
        width = int(mean.shape[-1])
        normalizer = {"_class_name": "StableUnCLIPImageNormalizer", "_diffusers_version": VERSION, "embedding_dim": width}
        self._json("image_normalizer/config.json", normalizer)
        self.index |= {
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
            "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        }

    # ------------------------------------------------------------------------------------------------------------- tools
    def _take(self, prefix: str) -> dict[str, Tensor]:
        taken = {name: value for name, value in self.rest.items() if name.startswith(prefix)}
        if not taken:
            raise UserError(f"the checkpoint has nothing under {prefix}: a folder needs a whole model")
        for name in taken:
            del self.rest[name]
        return taken

    def _weights(self, folder: str, kind: str, tensors: dict[str, Tensor], mark: str, label: str = "", prefix: str = "") -> None:
        table = to_theirs(kind, tensors, label)
        used = {source for recipe in table.values() for source in recipe.sources}
        home = prefix or {UNET: _UNET, VAE: "first_stage_model."}[kind]
        self.rest |= {home + name: value for name, value in tensors.items() if name not in used}
        stem = "model" if kind not in (UNET, VAE) else "diffusion_pytorch_model"
        values = {name: apply_recipe(recipe, tensors) for name, recipe in table.items()}
        save_weights(values, self.folder / folder / f"{stem}{mark}.safetensors")

    def _schedule(self) -> Json:
        if not self.sgm:
            return self.params
        betas = self.params["denoiser_config"]["params"]["discretization_config"].get("params") or {}
        return {
            "linear_start": betas.get("linear_start", 0.00085),
            "linear_end": betas.get("linear_end", 0.0120),
            "timesteps": betas.get("num_timesteps", 1000),
            "rescale_betas_zero_snr": betas.get("rescale_betas_zero_snr", False),
        }

    def _size_channels(self) -> int:
        """Channels into which each of SDXL's sizes is embedded."""
        embedders = self.params["conditioner_config"]["params"]["emb_models"]
        return int(next(one["params"]["outdim"] for one in embedders if _class(one) == "ConcatTimestepEmbedderND"))

    def _scheduler(self, folder: str, schedule: Json, prediction: str, name: str = "DDIMScheduler") -> None:
        self._json(f"{folder}/scheduler_config.json", scheduler_json(schedule, prediction, name))

    def _json(self, name: str, content: Json) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _unused(taken: Mapping[str, Tensor], params: Json) -> dict[str, Tensor]:
    """What the features do not depend on: with the layer "penultimate" the last block, if it is there at all."""
    from ldm.modules.encoders.clip_towers import read_arch

    blocks = 0
    if params.get("layer", "last") == "penultimate":
        layers = read_arch(params.get("arch", "ViT-H-14"))[1]["text_cfg"].get("layers", 12)
        blocks = int(any(name.startswith(f"transformer.resblocks.{layers - 1}.") for name in taken))
    names = key_names.unused_in_tower([f"model.{name}" for name in taken], blocks, projection=True)
    return {name: value for name, value in taken.items() if f"model.{name}" in names}


def write_tokenizer(folder: Path, pad: str, length: int) -> None:
    """CLIP's vocabulary as transformers reads it, from the one that comes with open_clip. `pad` fills short prompts."""
    folder.mkdir(parents=True)
    encoder = clip_bpe()
    tokens = [*encoder.tokens, "<|startoftext|>", "<|endoftext|>"]
    assert (tokens.index("<|startoftext|>"), tokens.index("<|endoftext|>")) == (START, END)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in encoder.merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, "add_prefix_space": False}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **marks}, indent=2) + "\n", encoding="utf-8")
