"""Names of the depth estimator: transformers' hybrid DPT in a diffusers folder against MiDaS' in a checkpoint, both ways. Pure.

Both are one architecture of one size, so the table is the same for every model.
"""

from __future__ import annotations

from collections.abc import Collection

_BACKBONE = ("dpt.embeddings.backbone.bit.", "pretrained.model.patch_embed.backbone.")
_BLOCKS = 12
_LAYER = {
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
}
# What a checkpoint has beside it, and the depth does not depend on: a classifier, and the norm before it.
UNUSED = ("pretrained.model.head.", "pretrained.model.norm.")

SETTINGS = {  # depth_estimator/config.json
    "architectures": ["DPTForDepthEstimation"],
    "model_type": "dpt",
    "is_hybrid": True,
    "image_size": 384,
    "hidden_size": 768,
    "num_hidden_layers": _BLOCKS,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "backbone_featmap_shape": [1, 1024, 24, 24],
    "backbone_out_indices": [2, 5, 8, 11],
    "neck_ignore_stages": [0, 1],
    "reassemble_factors": [1, 1, 1, 0.5],
    "neck_hidden_sizes": [256, 512, 768, 768],
    "readout_type": "project",
}
IMAGES = {  # feature_extractor/preprocessor_config.json
    "image_processor_type": "DPTImageProcessor",
    "size": {"height": 384, "width": 384},
    "keep_aspect_ratio": False,
    "ensure_multiple_of": 1,
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def prefixes() -> dict[str, str]:
    """transformers' module path -> MiDaS'."""
    found = {
        "dpt.embeddings.cls_token": "pretrained.model.cls_token",
        "dpt.embeddings.position_embeddings": "pretrained.model.pos_embed",
        "dpt.embeddings.projection": "pretrained.model.patch_embed.proj",
        "dpt.layernorm": "pretrained.model.norm",
        f"{_BACKBONE[0]}embedder.convolution": f"{_BACKBONE[1]}stem.conv",
        f"{_BACKBONE[0]}embedder.norm": f"{_BACKBONE[1]}stem.norm",
        "neck.reassemble_stage.layers.3.resize": "pretrained.act_postprocess4.4",
        **{f"head.head.{n}": f"scratch.output_conv.{n}" for n in (0, 2, 4)},
        **{f"neck.convs.{n}": f"scratch.layer{n + 1}_rn" for n in range(4)},
    }
    for stage, blocks in enumerate((3, 4, 9)):
        found |= {f"{_BACKBONE[0]}encoder.stages.{stage}.layers.{n}": f"{_BACKBONE[1]}stages.{stage}.blocks.{n}" for n in range(blocks)}
    for n in range(_BLOCKS):
        found |= {f"dpt.encoder.layer.{n}.{theirs}": f"pretrained.model.blocks.{n}.{ours}" for theirs, ours in _LAYER.items()}
    for n in (2, 3):
        found[f"neck.reassemble_stage.readout_projects.{n}.0"] = f"pretrained.act_postprocess{n + 1}.0.project.0"
        found[f"neck.reassemble_stage.layers.{n}.projection"] = f"pretrained.act_postprocess{n + 1}.3"
    for n in range(4):  # theirs count from the coarsest level
        theirs, ours = f"neck.fusion_stage.layers.{n}", f"scratch.refinenet{4 - n}"
        found[f"{theirs}.projection"] = f"{ours}.out_conv"
        for unit in (1, 2):
            for conv in (1, 2):
                found[f"{theirs}.residual_layer{unit}.convolution{conv}"] = f"{ours}.resConfUnit{unit}.conv{conv}"
    return found


def projections(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """MiDaS' joint projection -> transformers' three, for those of `names` (of either side) that are there."""
    found = {}
    for n in range(_BLOCKS):
        for kind in ("weight", "bias"):
            ours = f"pretrained.model.blocks.{n}.attn.qkv.{kind}"
            theirs = tuple(f"dpt.encoder.layer.{n}.attention.attention.{x}.{kind}" for x in ("query", "key", "value"))
            if ours in names or theirs[0] in names:
                found[ours] = theirs
    return found
