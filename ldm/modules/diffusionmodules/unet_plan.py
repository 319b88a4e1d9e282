"""The layout of a UNet as data, the checks on it, and the loops that turn it into blocks.

Nothing here runs a network: it decides which block stands where. The order of the blocks fixes the state-dict keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import nn

from ldm.modules.attention import ATTENTION_TYPES, SpatialTransformer
from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Timestep,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.util import linear
from ldm.util import ConfigError

T = TypeVar("T")

CLASS_KINDS = ("continuous", "timestep", "sequential")
POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
_REQUIRED = (
    "in_channels",
    "model_channels",
    "out_channels",
    "num_res_blocks",
    "attention_resolutions",
)


@dataclass(frozen=True)
class Blocks:
    """What all blocks of one network have in common, and how to make them."""

    emb_channels: int
    dropout: float = 0.0
    conv_resample: bool = True
    dims: int = 2
    use_checkpoint: bool = False
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    num_groups: int = 32
    num_heads: int = -1
    num_head_channels: int = -1
    new_attention_order: bool = False
    upcast_attention: bool = False
    transformer: bool = False  # SpatialTransformer instead of AttentionBlock
    legacy: bool = True
    context_dim: int | Sequence[int] | None = None
    use_linear: bool = False

    def res(self, channels: int, out: int, up: bool = False, down: bool = False) -> ResBlock:
        """A residual block, resampling if up or down."""
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=out,
            use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            up=up,
            down=down,
            num_groups=self.num_groups,
        )

    def down(self, channels: int) -> nn.Module:
        """What halves the size between two levels."""
        if self.resblock_updown:
            return self.res(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims)

    def up(self, channels: int) -> nn.Module:
        """What doubles the size between two levels."""
        if self.resblock_updown:
            return self.res(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims)

    def heads(self, channels: int) -> tuple[int, int]:
        """(number of heads, channels a head). `legacy` spreads all channels over the heads of a transformer."""
        if self.num_head_channels == -1:
            return self.num_heads, channels // self.num_heads
        heads = channels // self.num_head_channels
        return heads, channels // heads if self.legacy and self.transformer else self.num_head_channels

    def attention(self, channels: int, depth: int = 1, disable_self_attn: bool = False) -> nn.Module:
        """A transformer of `depth` blocks, or an AttentionBlock."""
        heads, dim_head = self.heads(channels)
        if not self.transformer:
            return AttentionBlock(
                channels,
                num_heads=heads,
                use_checkpoint=self.use_checkpoint,
                use_new_attention_order=self.new_attention_order,
                num_groups=self.num_groups,
                upcast=self.upcast_attention,
            )
        return SpatialTransformer(
            channels,
            heads,
            dim_head,
            depth=depth,
            context_dim=self.context_dim,
            disable_self_attn=disable_self_attn,
            use_linear=self.use_linear,
            use_checkpoint=self.use_checkpoint,
            upcast=self.upcast_attention,
            num_groups=self.num_groups,
        )


@dataclass(frozen=True)
class Plan:
    """What stands at each level, from the finest; every list has one entry a level."""

    widths: list[int]  # channels
    res_blocks: list[int]  # residual blocks on the way down; one more on the way up
    attention: list[bool]
    attention_blocks: list[int] | None  # how many of a level's blocks have attention; None: all
    depths: list[int]  # transformer blocks
    no_self: list[bool]  # attend to the context only

    def attention_at(self, blocks: Blocks, level: int, index: int) -> list[nn.Module]:
        """The attention behind residual block `index` of a level: one module, or none."""
        if not self.attention[level]:
            return []
        if self.attention_blocks is not None and index >= self.attention_blocks[level]:
            return []
        return [blocks.attention(self.widths[level], self.depths[level], self.no_self[level])]


def plan_blocks(args: Mapping[str, Any]) -> tuple[Blocks, Blocks, Plan]:
    """From a network's checked constructor arguments: how to make blocks going down and going up, and which."""
    context_dim = args.get("context_dim")
    blocks = Blocks(
        emb_channels=4 * args["model_channels"],
        new_attention_order=args["use_new_attention_order"],
        transformer=_uses_transformers(args),
        context_dim=context_dim if context_dim is None or isinstance(context_dim, int) else list(context_dim),
        use_linear=args.get("use_linear_in_transformer", False),
        **{field.name: args[field.name] for field in fields(Blocks) if field.name in args and field.name != "context_dim"},
    )
    up_heads = args["num_heads_upsample"]
    own_heads = up_heads != -1 and blocks.legacy and not blocks.transformer
    levels = len(args["channel_mult"])
    no_self, attention_blocks = args.get("disable_self_attentions"), args.get("num_attention_blocks")
    plan = Plan(
        widths=[mult * args["model_channels"] for mult in args["channel_mult"]],
        res_blocks=per_level(args["num_res_blocks"], levels),
        attention=[2**level in list(args["attention_resolutions"]) for level in range(levels)],
        attention_blocks=None if attention_blocks is None else list(attention_blocks),
        depths=per_level(args.get("transformer_depth", 1), levels),
        no_self=[False] * levels if no_self is None else list(no_self),
    )
    return blocks, replace(blocks, num_heads=up_heads) if own_heads else blocks, plan


def _uses_transformers(args: Mapping[str, Any]) -> bool:
    """Whether attention is a SpatialTransformer, where the config leaves it open: with a context it is.

    The SDXL code base knows no image_size and nothing but transformers, so that a config without both means one too.
    """
    asked = args.get("use_spatial_transformer")
    return args.get("context_dim") is not None or args["image_size"] is None if asked is None else asked


def build_down(blocks: Blocks, plan: Plan, first: nn.Module, channels: int) -> tuple[nn.ModuleList, list[int]]:
    """The way down, and the channels that each of its members hands to the way up."""
    modules = nn.ModuleList([TimestepEmbedSequential(first)])
    skips = [channels]
    for level, width in enumerate(plan.widths):
        for index in range(plan.res_blocks[level]):
            members = [blocks.res(channels, width), *plan.attention_at(blocks, level, index)]
            modules.append(TimestepEmbedSequential(*members))
            channels = width
            skips.append(channels)
        if level < len(plan.widths) - 1:
            modules.append(TimestepEmbedSequential(blocks.down(channels)))
            skips.append(channels)
    return modules, skips


def build_up(blocks: Blocks, plan: Plan, skips: Sequence[int]) -> nn.ModuleList:
    """The way up: the levels in reverse, one residual block for each skip."""
    modules = nn.ModuleList()
    skips = list(skips)
    channels = skips[-1]
    for level, width in reversed(list(enumerate(plan.widths))):
        for index in range(plan.res_blocks[level] + 1):
            members = [blocks.res(channels + skips.pop(), width), *plan.attention_at(blocks, level, index)]
            channels = width
            if level and index == plan.res_blocks[level]:
                members.append(blocks.up(channels))
            modules.append(TimestepEmbedSequential(*members))
    return modules


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """The two-layer network behind every embedding."""
    return nn.Sequential(linear(inputs, outputs), nn.SiLU(), linear(outputs, outputs))


def label_embedding(num_classes: int | str, model_channels: int, emb_channels: int, adm_in_channels: int | None) -> nn.Module:
    """What turns y into a summand of the timestep embedding."""
    if num_classes == "continuous":
        return nn.Linear(1, emb_channels)
    if num_classes == "timestep":
        return nn.Sequential(Timestep(model_channels), mlp(model_channels, emb_channels))
    if num_classes == "sequential":
        return nn.Sequential(mlp(adm_in_channels, emb_channels))
    return nn.Embedding(num_classes, emb_channels)


def per_level(value: T | Sequence[T], levels: int) -> list[T]:
    """`value` as one entry a level: repeated when it is a single number."""
    return [value] * levels if isinstance(value, int) else list(value)


def check_unet(args: Mapping[str, Any]) -> None:
    """Raise one ConfigError that names every fault in UNetModel's arguments."""
    missing = [name for name in _REQUIRED if args[name] is None]
    if missing:
        raise ConfigError(f"UNetModel needs {', '.join(missing)}")
    faults = [*_list_faults(args), *_kind_faults(args)]
    if not faults:  # widths mean something only when the lists fit
        faults = [*_width_faults(args, _attended_widths(args))]
    if faults:
        raise ConfigError("UNetModel: " + "; ".join(faults))


def check_encoder(args: Mapping[str, Any]) -> None:
    """Raise one ConfigError that names every fault in EncoderUNetModel's arguments."""
    faults = _list_faults(args)
    pool = args["pool"]
    if pool not in POOLS:
        faults.append(f"pool={pool!r} is unknown: use one of {', '.join(POOLS)}")
    if pool == "attention" and (args["num_head_channels"] == -1 or args["dims"] != 2):
        faults.append("pool='attention' needs num_head_channels, and dims=2")
    if not faults:
        faults = _width_faults(args, _attended_widths(args))
    if faults:
        raise ConfigError("EncoderUNetModel: " + "; ".join(faults))


def _list_faults(args: Mapping[str, Any]) -> list[str]:
    """Lists must have one entry a level; sizes must be in range."""
    levels = len(args["channel_mult"])
    faults = []
    for name in ("num_res_blocks", "transformer_depth", "disable_self_attentions", "num_attention_blocks"):
        value = args.get(name)
        if value is not None and not isinstance(value, int) and len(value) != levels:
            faults.append(f"{name} has {len(value)} entries for the {levels} levels of channel_mult")
    if args["dims"] not in (1, 2, 3):
        faults.append(f"dims={args['dims']} must be 1, 2 or 3")
    if args["num_heads"] == -1 and args["num_head_channels"] == -1:
        faults.append("set num_heads (heads of every attention) or num_head_channels (channels of every head)")
    if any(args[name] < 1 and args[name] != -1 for name in ("num_heads", "num_head_channels")):
        faults.append("num_heads and num_head_channels must be positive")
    return faults


def _kind_faults(args: Mapping[str, Any]) -> list[str]:
    """Arguments that need or exclude one another."""
    faults = []
    transformer, context_dim, classes = (args[k] for k in ("use_spatial_transformer", "context_dim", "num_classes"))
    if transformer and context_dim is None:
        faults.append("use_spatial_transformer=True needs context_dim, the channels of the context")
    if transformer is False and context_dim is not None:
        faults.append(f"context_dim={context_dim} needs use_spatial_transformer=True")
    if _uses_transformers(args) and args["dims"] != 2:
        faults.append(f"transformers work on images: dims={args['dims']} needs use_spatial_transformer=False")
    if isinstance(classes, str) and classes not in CLASS_KINDS:
        faults.append(f"num_classes={classes!r} must be a count or one of {', '.join(CLASS_KINDS)}")
    if classes == "sequential" and args["adm_in_channels"] is None:
        faults.append("num_classes='sequential' needs adm_in_channels, the channels of y")
    if args["spatial_transformer_attn_type"] not in ATTENTION_TYPES:
        kind = args["spatial_transformer_attn_type"]
        faults.append(f"spatial_transformer_attn_type={kind!r} must be one of {', '.join(ATTENTION_TYPES)}")
    return faults


def _attended_widths(args: Mapping[str, Any]) -> list[int]:
    """Channels of the levels that have attention, the middle included."""
    mults = list(args["channel_mult"])
    attended = [mult for level, mult in enumerate(mults) if 2**level in list(args["attention_resolutions"])]
    return sorted({mult * args["model_channels"] for mult in [*attended, mults[-1]]})


def _width_faults(args: Mapping[str, Any], attended: Sequence[int]) -> list[str]:
    """Channels must split into groups at every level, and into heads where there is attention."""
    groups = args["num_groups"]
    widths = sorted({mult * args["model_channels"] for mult in [1, *args["channel_mult"]]})
    bad = [width for width in widths if width % groups]
    faults = [f"channels {bad} do not divide into num_groups={groups}"] if bad else []
    by_size = args["num_head_channels"] != -1
    names = ["num_head_channels"] if by_size else ["num_heads", "num_heads_upsample"]
    for name in names:
        value = args[name]
        bad = [width for width in attended if value != -1 and width % value]
        if bad:
            faults.append(f"channels {bad} do not divide into {name}={value}")
    return faults
