"""A small LatentDiffusion with known weights, its parts as configs, and a batch for it."""

from __future__ import annotations

from typing import Any

from ldm.models.diffusion.ddpm import LatentDiffusion
from tests.analytic import latent_model
from tests.reference_rule import fill, philox

TEXT = {"cond_stage_config": {"target": "tests.analytic.LengthEncoder"}}
TRAINED_TEXT = TEXT | {"cond_stage_trainable": True}
KL = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {
        "embed_dim": 4,
        "ddconfig": {
            "double_z": True,
            "z_channels": 4,
            "resolution": 16,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 8,
            "ch_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
            "num_groups": 4,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
VQ = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {**KL["params"], "n_embed": 16, "ddconfig": {**KL["params"]["ddconfig"], "double_z": False}},
}
UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_head_channels": 32,
        "use_spatial_transformer": True,
        "context_dim": 4,
        "legacy": False,
    },
}
CAPTIONS = ["a red circle", "", "two"]


def batch(n: int = 3, size: int = 16) -> dict[str, Any]:
    return {"image": philox(0, (n, size, size, 3), 0.5).clamp(-1, 1), "caption": CAPTIONS[:n]}


def model_of(**changes: Any) -> LatentDiffusion:
    return fill(latent_model(first_stage_config=KL, **(TEXT | changes)))
