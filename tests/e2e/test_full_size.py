"""Full-size models with random weights, saved by diffusers as a folder, against what is loaded from it. Slow, and large on disk.

SD 1.5, SD 2.1 and SDXL base need about 6, 7 and 16 GB of memory, and 4, 5 and 14 GB of disk in pytest's temporary folder.
"""

from __future__ import annotations

import gc
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.inference.models import load_model
from ldm.inference.weights.families import identify, resolve_model
from tests.inference import diffusers_models as small

log = logging.getLogger(__name__)
WORDS = ["a photograph of an astronaut riding a horse", ""]
FOUR = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
FOUR_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
SD = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": FOUR,
    "up_block_types": FOUR_UP,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "projection_dim": 768}
OPEN_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "projection_dim": 512}
OPEN_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20, "projection_dim": 1280}
MODELS: dict[str, dict[str, Any]] = {
    "sd1": {
        "unet": lambda: small.unet(**SD, cross_attention_dim=768, attention_head_dim=8),
        "text_encoder": lambda: small.text(**CLIP_L),
        "scheduler": small.scheduler,
    },
    "sd2": {
        "unet": lambda: small.unet(
            **{**SD, "sample_size": 96}, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True
        ),
        "text_encoder": lambda: small.text(**OPEN_CLIP_H, hidden_act="gelu"),
        "scheduler": lambda: small.scheduler("v_prediction"),
    },
    "sdxl-base": {
        "unet": lambda: small.unet(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            use_linear_projection=True,
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "text_encoder": lambda: small.text(**CLIP_L),
        "text_encoder_2": lambda: small.text(True, **OPEN_CLIP_G, hidden_act="gelu"),
        "scheduler": small.scheduler,
    },
}


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder whose gigabytes do not stay."""
    yield tmp_path / "model"
    shutil.rmtree(tmp_path / "model", ignore_errors=True)


def inputs(family: str, channels: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    given = {"x": torch.randn(1, 4, 16, 16, generator=g), "t": torch.tensor([501]), "z": torch.randn(1, 4, 16, 16, generator=g)}
    given |= {"context": torch.randn(1, 77, channels, generator=g), "image": torch.randn(1, 3, 64, 64, generator=g).clamp(-1, 1)}
    given["ids"] = torch.cat([torch.tensor([49406]), torch.randint(0, 49406, (20,), generator=g), torch.full((56,), 49407)])[None]
    if family == "sdxl-base":
        given |= {"pooled": torch.randn(1, 1280, generator=g), "sizes": torch.tensor([[1024.0, 768.0, 0.0, 16.0, 1024.0, 1024.0]])}
    return given


@torch.no_grad()
def expected(family: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs, and what diffusers makes of them; each part is built, asked, saved in shards and forgotten."""
    torch.manual_seed(0)
    want: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for name, build in {**MODELS[family], "vae": lambda: small.vae(**VAE)}.items():
        part = build()
        if name != "scheduler":
            small.perturb(part)
        if name == "unet":
            given = inputs(family, part.config.cross_attention_dim)
            added = {"text_embeds": given["pooled"], "time_ids": given["sizes"]} if "sizes" in given else None
            want["noise"] = part.eval()(given["x"], given["t"], given["context"], added_cond_kwargs=added).sample
        elif name == "vae":
            want["decoded"] = part.eval().decode(given["z"]).sample
            want["moments"] = part.encode(given["image"]).latent_dist.parameters
        elif name != "scheduler":
            out = part.eval()(given["ids"], output_hidden_states=True)
            want[name] = out.hidden_states[-2] if family == "sdxl-base" else out.last_hidden_state
            if name == "text_encoder_2":
                want["pooled"] = out.text_embeds
        part.save_pretrained(folder / name, **({} if name == "scheduler" else {"max_shard_size": "1GB"}))
        del part
        gc.collect()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return given, want


@torch.no_grad()
def answered(model: Any, family: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    got: dict[str, Tensor] = {}
    network, stage = model.model.diffusion_model, model.first_stage_model
    if family == "sdxl-base":
        first, second, *numbers = model.conditioner.embedders
        sizes = [embedder(given["sizes"][:, 2 * i : 2 * i + 2]) for i, embedder in enumerate(numbers)]
        got["noise"] = network(given["x"], given["t"], given["context"], torch.cat([given["pooled"], *sizes], dim=1))
        got["text_encoder"] = first.encode_with_transformer(given["ids"])
        features = second.encode_with_transformer(given["ids"])
        got["text_encoder_2"], got["pooled"] = features["penultimate"], features["pooled"]
    else:
        got["noise"] = network(given["x"], given["t"], given["context"])
        got["text_encoder"] = model.cond_stage_model.encode_with_transformer(given["ids"])
    got["decoded"] = stage.decode(given["z"])
    got["moments"] = stage.quant_conv(stage.encoder(given["image"]))
    return got


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", MODELS)
def test_a_full_size_folder_gives_what_diffusers_gives(family: str, folder: Path) -> None:
    given, want = expected(family, folder)
    found = identify(folder)
    assert (found.family, found.prediction) == (family, "v" if family == "sd2" else "eps")
    config, weights = resolve_model(None, str(folder))
    got = answered(load_model(config, weights), family, given)
    errors = {name: relative(got[name], want[name]) for name in want}
    log.info("%s: relative errors %s", family, {name: f"{error:.1e}" for name, error in errors.items()})
    assert all(error < 1e-3 for error in errors.values()), errors  # each by itself: a NaN would hide in a maximum
