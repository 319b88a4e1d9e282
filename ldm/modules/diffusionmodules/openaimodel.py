"""The diffusion UNet and the noisy classifier built from its encoder.

One `UNetModel` reads the configs of latent-diffusion, Stable Diffusion 1 and 2 and of SDXL, and has the state-dict keys of
their checkpoints (arXiv:2105.05233 for the layout, arXiv:2112.10752 for the transformers in it, arXiv:2307.01952 for SDXL).
Device and dtype come from the weights: inputs are cast to them, the output comes back in the input's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.diffusionmodules.unet_blocks import (
    AttentionBlock,
    AttentionPool2d,
    Downsample,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    Timestep,
    TimestepBlock,
    TimestepEmbedSequential,
    Upsample,
)
from ldm.modules.diffusionmodules.unet_plan import (
    build_down,
    build_up,
    check_encoder,
    check_unet,
    label_embedding,
    mlp,
    per_level,
    plan_blocks,
)
from ldm.modules.diffusionmodules.util import conv_nd, normalization, timestep_embedding, zero_module

__all__ = [
    "AttentionBlock",
    "AttentionPool2d",
    "Downsample",
    "EncoderUNetModel",
    "QKVAttention",
    "QKVAttentionLegacy",
    "ResBlock",
    "Timestep",
    "TimestepBlock",
    "TimestepEmbedSequential",
    "UNetModel",
    "Upsample",
    "convert_module_to_f16",
    "convert_module_to_f32",
]


def convert_module_to_f16(module: nn.Module) -> None:
    """Cast a module's parameters and floating buffers to float16."""
    module.to(torch.float16)


def convert_module_to_f32(module: nn.Module) -> None:
    """Cast a module's parameters and floating buffers to float32."""
    module.to(torch.float32)


class UNetModel(nn.Module):
    """UNet with timestep, class, vector and cross-attention conditioning.

    Arguments have the names, order and defaults of the originals. Lists may come from YAML. A bad combination raises one
    ConfigError that names every fault.
    """

    def __init__(
        self,
        image_size: int | None = None,  # kept for configs: any size works. SDXL's configs have none
        in_channels: int | None = None,
        model_channels: int | None = None,  # width of the first level
        out_channels: int | None = None,
        num_res_blocks: int | Sequence[int] | None = None,  # residual blocks a level; one for all or one for each
        attention_resolutions: Sequence[int] | None = None,  # downsampling factors (not sizes) that get attention
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),  # width of each level in units of model_channels
        conv_resample: bool = True,  # learned convolutions in up- and downsampling
        dims: int = 2,  # spatial dims of the signal: 1, 2 or 3
        num_classes: int | str | None = None,  # a count, "continuous", "timestep" or "sequential"
        use_checkpoint: bool = False,  # recompute activations in the backward pass
        use_fp16: bool = False,  # accepted for old configs: the dtype is that of the weights
        num_heads: int = -1,  # heads of every attention, or:
        num_head_channels: int = -1,  # channels of every head (takes precedence)
        num_heads_upsample: int = -1,  # heads of AttentionBlocks on the way up; default num_heads
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,  # residual blocks do the up- and downsampling
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool | None = None,  # default: when there is a context_dim, or no image_size (SDXL)
        transformer_depth: int | Sequence[int] = 1,  # blocks a transformer; one for all or one for each level
        context_dim: int | Sequence[int] | None = None,  # channels of the context
        n_embed: int | None = None,  # predict codebook ids (logits over n_embed) instead of the signal
        legacy: bool = True,  # with num_head_channels: heads share all channels of a transformer
        disable_self_attentions: Sequence[bool] | None = None,  # for each level: attend to the context only
        num_attention_blocks: Sequence[int] | None = None,  # for each level: blocks, from the first, that have attention
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
        adm_in_channels: int | None = None,  # channels of y for num_classes="sequential"
        transformer_depth_middle: int | None = None,  # default: that of the last level
        disable_middle_transformer: bool = False,
        spatial_transformer_attn_type: str = "softmax",
        use_bf16: bool = False,  # as use_fp16
        upcast_attention: bool = False,  # attend in float32 when the weights are in half precision (SD 2.1)
        num_groups: int = 32,  # groups of every GroupNorm
    ):
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_unet(arguments)
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = per_level(num_res_blocks, len(channel_mult))
        self.attention_resolutions = list(attention_resolutions)
        self.channel_mult = list(channel_mult)
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_head_channels = num_head_channels
        self.predict_codebook_ids = n_embed is not None

        blocks, up_blocks, plan = plan_blocks(arguments)
        self.time_embed = mlp(model_channels, blocks.emb_channels)
        if num_classes is not None:
            self.label_emb = label_embedding(num_classes, model_channels, blocks.emb_channels, adm_in_channels)
        first = conv_nd(dims, in_channels, model_channels, 3, padding=1)
        self.input_blocks, skips = build_down(blocks, plan, first, model_channels)
        ch = plan.widths[-1]
        depth_middle = plan.depths[-1] if transformer_depth_middle is None else transformer_depth_middle
        self.middle_block = TimestepEmbedSequential(
            blocks.res(ch, ch),
            nn.Identity() if disable_middle_transformer else blocks.attention(ch, depth_middle, disable_middle_self_attn),
            blocks.res(ch, ch),
        )
        self.output_blocks = build_up(up_blocks, plan, skips)
        ch = plan.widths[0]
        self.out = nn.Sequential(normalization(ch, num_groups), nn.SiLU(), zero_module(conv_nd(dims, ch, out_channels, 3, padding=1)))
        if self.predict_codebook_ids:
            self.id_predictor = nn.Sequential(normalization(ch, num_groups), conv_nd(dims, ch, n_embed, 1))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which inputs are cast to."""
        return self.time_embed[0].weight.dtype

    def convert_to_fp16(self) -> None:
        """Cast the network to float16."""
        convert_module_to_f16(self)

    def convert_to_fp32(self) -> None:
        """Cast the network to float32."""
        convert_module_to_f32(self)

    def forward(
        self,
        x: Tensor,  # (B, in_channels, *spatial)
        timesteps: Tensor | None = None,  # (B,), may be fractional
        context: Tensor | Sequence[Tensor] | None = None,  # (B, M, context_dim)
        y: Tensor | None = None,  # classes (B,), or vectors (B, adm_in_channels), where num_classes is set
    ) -> Tensor:
        """The prediction (B, out_channels, *spatial); logits (B, n_embed, *spatial) of a model built with n_embed."""
        if timesteps is None:
            raise ValueError("the UNet needs timesteps: one for each sample of x")
        if (y is None) != (self.num_classes is None):
            need = "needs y" if y is None else "takes no y"
            raise ValueError(f"a UNet with num_classes={self.num_classes!r} {need}")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        if y is not None:
            emb = emb + self._embed_label(y)
        context = _cast(context, self.dtype)
        h = x.to(self.dtype)
        skips = []
        for module in self.input_blocks:
            h = module(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for module in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            # Sizes that do not halve evenly come back as the skip they meet next.
            h = module(h, emb, context, skips[-1].shape[2:] if skips else None)
        head = self.id_predictor if self.predict_codebook_ids else self.out
        return head(h).to(x.dtype)

    def _embed_label(self, y: Tensor) -> Tensor:
        if self.num_classes == "timestep":
            sinusoid, layers = self.label_emb
            return layers(sinusoid(y).to(self.dtype))
        return self.label_emb(y.to(self.dtype) if y.is_floating_point() else y)


class EncoderUNetModel(nn.Module):
    """The first half of the UNet with a pooled head: a classifier of noisy inputs, (B, in_channels, H, W) to (B, out_channels)."""

    def __init__(
        self,
        image_size: int,  # size of x; matters to pool="attention" only
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = 1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,  # no way up here; accepted as in the original
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        pool: str = "adaptive",  # adaptive, attention, spatial or spatial_v2
        num_groups: int = 32,
    ):
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        check_encoder(arguments)
        self.model_channels = model_channels
        self.pool = pool
        blocks, _, plan = plan_blocks(arguments)
        self.time_embed = mlp(model_channels, blocks.emb_channels)
        first = conv_nd(dims, in_channels, model_channels, 3, padding=1)
        self.input_blocks, widths = build_down(blocks, plan, first, model_channels)
        ch = widths[-1]
        self.middle_block = TimestepEmbedSequential(blocks.res(ch, ch), blocks.attention(ch), blocks.res(ch, ch))
        if pool.startswith("spatial"):
            self.out = _feature_head(sum(widths) + ch, out_channels, num_groups if pool == "spatial_v2" else None)
        elif pool == "attention":
            size = -(-image_size // 2 ** (len(channel_mult) - 1))
            heads = AttentionPool2d(size, ch, num_head_channels, out_channels)
            self.out = nn.Sequential(normalization(ch, num_groups), nn.SiLU(), heads)
        else:
            last = zero_module(conv_nd(dims, ch, out_channels, 1))
            average = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims](1)
            self.out = nn.Sequential(normalization(ch, num_groups), nn.SiLU(), average, last, nn.Flatten())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, which inputs are cast to."""
        return self.time_embed[0].weight.dtype

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Logits (B, out_channels) of noisy inputs x (B, in_channels, H, W) at timesteps (B,)."""
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        h = x.to(self.dtype)
        means = []
        for module in [*self.input_blocks, self.middle_block]:
            h = module(h, emb)
            means.append(h.flatten(2).mean(dim=2))
        return self.out(torch.cat(means, dim=1) if self.pool.startswith("spatial") else h).to(x.dtype)


def _feature_head(features: int, out_channels: int, num_groups: int | None, hidden: int = 2048) -> nn.Sequential:
    """Two linear layers on the means of all feature maps, normalised between when num_groups is given."""
    between = [nn.ReLU()] if num_groups is None else [normalization(hidden, num_groups), nn.SiLU()]
    return nn.Sequential(nn.Linear(features, hidden), *between, nn.Linear(hidden, out_channels))


def _cast(context: Tensor | Sequence[Tensor] | None, dtype: torch.dtype) -> Tensor | list[Tensor] | None:
    """The context, or each context of a list, in `dtype`."""
    if context is None:
        return None
    return context.to(dtype) if isinstance(context, Tensor) else [c.to(dtype) for c in context]
