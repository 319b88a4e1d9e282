"""Names of tensors in diffusers' folders against those of latent-diffusion checkpoints, both ways. Pure: names, no files, no torch.

The blocks of a network are counted from the names themselves, so any width, depth and number of levels is understood.
A translation is a table `target name -> Recipe`: which source tensors it is made of, and how. A table reads in one direction; the
recipes of both directions undo each other bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ldm.inference.weights import diffusers_depth
from ldm.util import CheckpointError

# Kinds of parts; the last is the statistics of Stable unCLIP's image embeddings.
UNET, VAE, CLIP, OPEN_CLIP, VISION, DEPTH, NORMALIZER = "unet", "vae", "clip", "open_clip", "vision", "depth", "normalizer"

_RESNET = {  # of the UNet
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}  # of the autoencoder
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}  # diffusers before 0.18
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_VISION = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding": "conv1",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
}


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made of others: `copy` one; `square` (C, D) -> (C, D, 1, 1) and `flat` back; `turn` transposes; `stack` puts three
    below each other, and `part0`, `part1`, `part2` are the thirds of one.
    """

    how: str
    sources: tuple[str, ...]


Table = dict[str, Recipe]


@dataclass(frozen=True)
class _Level:
    """One resolution of a network."""

    resnets: int
    attention: bool
    resample: bool  # a layer that changes the size stands at its end


# ------------------------------------------------------------------------------------------------------------------ tools
def _heads(names: Iterable[str]) -> set[str]:
    """All dotted beginnings of `names`."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")
        found.update(".".join(parts[:k]) for k in range(1, len(parts)))
    return found


def _count(heads: Collection[str], prefix: str) -> int:
    """How many of prefix0, prefix1, ... there are."""
    count = 0
    while f"{prefix}{count}" in heads:
        count += 1
    return count


def _rename(name: str, prefixes: Mapping[str, str]) -> str | None:
    """`name` with the longest known beginning replaced."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        head = ".".join(parts[:k])
        if head in prefixes:
            return ".".join([prefixes[head], *parts[k:]])
    return None


def _joined(table: Mapping[str, str], ours: str, theirs: str) -> dict[str, str]:
    """`table` below two module paths, and the paths themselves."""
    return {theirs: ours, **{f"{theirs}.{a}": f"{ours}.{b}" for a, b in table.items()}}


# ------------------------------------------------------------------------------------------------------------------- UNet
def _unet_prefixes(down: list[_Level], up: list[_Level], label: str) -> dict[str, str]:
    """diffusers' module path -> ours, for a UNet with these levels, in the order in which they run."""
    found = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        f"{label}.linear_1": "label_emb.0.0",
        f"{label}.linear_2": "label_emb.0.2",
        "class_embedding.weight": "label_emb.weight",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    found |= _joined(_RESNET, "middle_block.0", "mid_block.resnets.0") | _joined(_RESNET, "middle_block.2", "mid_block.resnets.1")
    block = 1
    for number, level in enumerate(down):
        for i in range(level.resnets):
            found |= _joined(_RESNET, f"input_blocks.{block}.0", f"down_blocks.{number}.resnets.{i}")
            found[f"down_blocks.{number}.attentions.{i}"] = f"input_blocks.{block}.1"
            block += 1
        if level.resample:
            found[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{block}.0.op"
            block += 1
    block = 0
    for number, level in enumerate(up):
        for i in range(level.resnets):
            found |= _joined(_RESNET, f"output_blocks.{block}.0", f"up_blocks.{number}.resnets.{i}")
            found[f"up_blocks.{number}.attentions.{i}"] = f"output_blocks.{block}.1"
            block += 1
        last = f"output_blocks.{block - 1}"
        found[f"up_blocks.{number}.upsamplers.0.conv"] = f"{last}.2.conv" if level.attention else f"{last}.1.conv"
        if not level.attention:
            del found[f"up_blocks.{number}.attentions.{level.resnets - 1}"]
    return found


def _their_levels(heads: Collection[str], side: str) -> list[_Level]:
    """Levels of a diffusers network; `side` is such as "down_blocks." or "encoder.down_blocks."."""
    resample = "downsamplers" if "down" in side else "upsamplers"
    return [
        _Level(_count(heads, f"{side}{n}.resnets."), f"{side}{n}.attentions.0" in heads, f"{side}{n}.{resample}.0" in heads)
        for n in range(_count(heads, side))
    ]


def _our_levels(heads: Collection[str], side: str) -> list[_Level]:
    """Levels of our UNet; `side` is "input_blocks." or "output_blocks."."""
    levels, resnets, attention = [], 0, False
    for n in range(1 if side == "input_blocks." else 0, _count(heads, side)):
        block = f"{side}{n}."
        resnets += f"{block}0.in_layers" in heads
        attention |= f"{block}1.transformer_blocks" in heads
        resample = f"{block}0.op" in heads or f"{block}1.conv" in heads or f"{block}2.conv" in heads
        if resample:
            levels.append(_Level(resnets, attention, True))
            resnets, attention = 0, False
    return [*levels, _Level(resnets, attention, False)] if resnets else levels


# ------------------------------------------------------------------------------------------------------------ autoencoder
def _vae_prefixes(down: list[_Level], up: list[_Level]) -> dict[str, str]:
    """diffusers' module path -> ours; `up` in the order in which it runs, which is the reverse of our numbers."""
    found = {name: name for name in ("quant_conv", "post_quant_conv", "quantize")}
    shortcut = {"conv_shortcut": "nin_shortcut"}
    for side in ("encoder", "decoder"):
        found |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out", f"{side}.conv_norm_out": f"{side}.norm_out"}
        found |= _joined({}, f"{side}.mid.block_1", f"{side}.mid_block.resnets.0")
        found |= _joined({}, f"{side}.mid.block_2", f"{side}.mid_block.resnets.1")
        found |= _joined(_ATTENTION, f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
    paths = [(f"encoder.down.{n}", f"encoder.down_blocks.{n}", level, "down") for n, level in enumerate(down)]
    paths += [(f"decoder.up.{len(up) - 1 - n}", f"decoder.up_blocks.{n}", level, "up") for n, level in enumerate(up)]
    for ours, theirs, level, way in paths:
        for i in range(level.resnets):
            found |= _joined(shortcut, f"{ours}.block.{i}", f"{theirs}.resnets.{i}")
            found |= _joined(_ATTENTION, f"{ours}.attn.{i}", f"{theirs}.attentions.{i}")
        found[f"{theirs}.{way}samplers.0.conv"] = f"{ours}.{way}sample.conv"
    return found


def _our_vae_levels(heads: Collection[str], side: str) -> list[_Level]:
    levels = [_Level(_count(heads, f"{side}{n}.block."), f"{side}{n}.attn.0" in heads, True) for n in range(_count(heads, side))]
    return levels[::-1] if side.startswith("decoder") else levels


def _is_vae_attention(ours: str) -> bool:
    return re.search(r"\.(attn_1|attn\.\d+)\.(q|k|v|proj_out)\.weight$", ours) is not None


# ------------------------------------------------------------------------------------------------------------------- CLIP
def _clip_layers(ours: str, theirs: str, count: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for n in range(count):
        found |= _joined(_LAYER, f"{ours}transformer.resblocks.{n}", f"{theirs}encoder.layers.{n}")
    return found


def _tower(kind: str) -> tuple[str, dict[str, str], str, str]:
    """(level of their names, table, their projection, ours)."""
    if kind == VISION:
        return "vision_model.", _VISION, "visual_projection.weight", "proj"
    return "text_model.", _TEXT, "text_projection.weight", "text_projection"


def _tower_to_ours(names: Collection[str], kind: str) -> Table:
    level, table, projection, own_projection = _tower(kind)
    bare = {name: name.removeprefix(level) for name in names}
    prefixes = {**table, **_clip_layers("", "", _count(_heads(bare.values()), "encoder.layers."))}
    found: Table = {}
    for name, short in bare.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", short)
        if short == projection:
            found[own_projection] = Recipe("turn", (name,))
        elif layer:
            start, kind_of = name.rpartition(".self_attn.")[0], layer[3]
            sources = tuple(f"{start}.self_attn.{x}_proj.{kind_of}" for x in "qkv")
            found[f"transformer.resblocks.{layer[1]}.attn.in_proj_{kind_of}"] = Recipe("stack", sources)
        elif short != "embeddings.position_ids":  # they follow from the architecture
            found[_rename(short, prefixes) or name] = Recipe("copy", (name,))
    return found


def _tower_to_theirs(names: Collection[str], kind: str) -> Table:
    level, table, projection, own_projection = _tower(kind)
    prefixes = {**table, **_clip_layers("", "", _count(_heads(names), "transformer.resblocks."))}
    inverse = {ours: theirs for theirs, ours in prefixes.items()}
    found: Table = {}
    for name in names:
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name)
        if name == own_projection:
            found[projection] = Recipe("turn", (name,))
        elif layer:
            for third, x in enumerate("qkv"):
                found[f"{level}encoder.layers.{layer[1]}.self_attn.{x}_proj.{layer[2]}"] = Recipe(f"part{third}", (name,))
        elif renamed := _rename(name, inverse):
            found[level + renamed] = Recipe("copy", (name,))
    return found


# ------------------------------------------------------------------------------------------------------------------ depth
def _depth_to_ours(names: Collection[str]) -> Table:
    prefixes, joint = diffusers_depth.prefixes(), diffusers_depth.projections(names)
    found: Table = {ours: Recipe("stack", theirs) for ours, theirs in joint.items()}
    taken = {name for theirs in joint.values() for name in theirs}
    return found | {_rename(name, prefixes) or name: Recipe("copy", (name,)) for name in names if name not in taken}


def _depth_to_theirs(names: Collection[str]) -> Table:
    inverse = {ours: theirs for theirs, ours in diffusers_depth.prefixes().items()}
    found: Table = {}
    for ours, theirs in diffusers_depth.projections(names).items():
        found |= {name: Recipe(f"part{third}", (ours,)) for third, name in enumerate(theirs)}
    return found | {renamed: Recipe("copy", (name,)) for name in names if (renamed := _rename(name, inverse)) is not None}


# ------------------------------------------------------------------------------------------------------------- directions
def to_ours(kind: str, names: Collection[str]) -> Table:
    """From the names of one part of a diffusers folder to ours, without the part's prefix. Raises CheckpointError for an unknown name."""
    if kind in (OPEN_CLIP, VISION):
        return _tower_to_ours(names, kind)
    if kind == DEPTH:
        return _depth_to_ours(names)
    if kind == NORMALIZER:
        return {f"data_{name}": Recipe("copy", (name,)) for name in names}
    if kind == CLIP:  # transformers since 5.6 leaves out the level text_model., and position_ids follow from the architecture
        short = {name: name.removeprefix("text_model.") for name in names if not name.endswith("position_ids")}
        return {f"transformer.text_model.{s}": Recipe("copy", (name,)) for name, s in short.items() if s != "text_projection.weight"}
    heads = _heads(names)
    if kind == UNET:
        label = "add_embedding" if "add_embedding" in heads else "class_embedding"
        prefixes = _unet_prefixes(_their_levels(heads, "down_blocks."), _their_levels(heads, "up_blocks."), label)
    else:
        prefixes = _vae_prefixes(_their_levels(heads, "encoder.down_blocks."), _their_levels(heads, "decoder.up_blocks."))
    found: Table = {}
    for name in names:
        spelling = name
        for old, new in _OLD_ATTENTION.items() if kind == VAE else ():
            spelling = spelling.replace(old, new)
        ours = _rename(spelling, prefixes)
        if ours is None:
            raise CheckpointError(f"a {kind} with {name} is of a kind that is not known here")
        found[ours] = Recipe("square" if kind == VAE and _is_vae_attention(ours) else "copy", (name,))
    return found


def to_theirs(kind: str, names: Collection[str], label: str = "class_embedding") -> Table:
    """From our names, without the part's prefix, to diffusers'. Names that have no place there are left out.

    label: what diffusers calls the network behind `label_emb`: "class_embedding", or "add_embedding" in SDXL.
    """
    if kind in (OPEN_CLIP, VISION):
        return _tower_to_theirs(names, kind)
    if kind == DEPTH:
        return _depth_to_theirs(names)
    if kind == NORMALIZER:
        return {name.removeprefix("data_"): Recipe("copy", (name,)) for name in names if name in ("data_mean", "data_std")}
    if kind == CLIP:
        published = {name: name.removeprefix("transformer.") for name in names if not name.endswith("position_ids")}
        return {theirs: Recipe("copy", (name,)) for name, theirs in published.items()}
    heads = _heads(names)
    if kind == UNET:
        prefixes = _unet_prefixes(_our_levels(heads, "input_blocks."), _our_levels(heads, "output_blocks."), label)
    else:
        prefixes = _vae_prefixes(_our_vae_levels(heads, "encoder.down."), _our_vae_levels(heads, "decoder.up."))
    inverse = {ours: theirs for theirs, ours in prefixes.items()}
    found: Table = {}
    for name in names:
        theirs = _rename(name, inverse)
        if theirs is not None:
            found[theirs] = Recipe("flat" if kind == VAE and _is_vae_attention(name) else "copy", (name,))
    return found


def kind_of_names(names: Collection[str]) -> str | None:
    """UNET or VAE when these are the names of one in diffusers' spelling, such as of a file taken out of its folder; else None."""
    if "time_embedding.linear_1.weight" in names and "conv_in.weight" in names:
        return UNET
    return VAE if "encoder.conv_norm_out.weight" in names and "decoder.conv_norm_out.weight" in names else None


def shape_of(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what `recipe` makes of tensors of these shapes."""
    first = shapes[recipe.sources[0]]
    if recipe.how == "square":
        return (*first, 1, 1) if len(first) == 2 else first
    if recipe.how == "flat":
        return first[:2]
    if recipe.how == "turn":
        return first[::-1]
    if recipe.how == "stack":
        return (sum(shapes[s][0] for s in recipe.sources), *first[1:])
    return (first[0] // 3, *first[1:]) if recipe.how.startswith("part") else first
