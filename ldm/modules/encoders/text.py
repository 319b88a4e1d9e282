"""Text encoders: CLIP as Stable Diffusion 1.x uses it (transformers) and as 2.x uses it (open_clip's layout).

Owns: architectures and tokenisation; no weights. The weights come with the checkpoint of the whole model or from a local file,
and nothing here ever opens a connection. Ids and features live where the weights live.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.modules.encoders.clip_towers import TextTower
from ldm.modules.encoders.tokenizers import CONTEXT_LENGTH, END, START, ClipTokenizer
from ldm.modules.encoders.weighted import Prompt, encode_prompts
from ldm.util import CheckpointError, ConfigError, UserError, names_weights

if TYPE_CHECKING:
    from transformers import CLIPTextModel

log = logging.getLogger(__name__)

# (width, layers, heads) of the text towers that OpenAI published.
_OPENAI_TEXT = {
    "openai/clip-vit-large-patch14": (768, 12, 12),
    "openai/clip-vit-large-patch14-336": (768, 12, 12),
    "openai/clip-vit-base-patch16": (512, 12, 8),
    "openai/clip-vit-base-patch32": (512, 12, 8),
}
_MAX_CUT_WARNINGS = 50  # then a training on long captions stays readable


class AbstractEncoder(nn.Module):
    """What a `cond_stage_config` describes: `encode(batch entry) -> conditioning`."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """The conditioning of one batch entry."""
        raise NotImplementedError(f"{type(self).__name__} does not implement encode()")


class IdentityEncoder(AbstractEncoder):
    """Gives back what it gets."""

    def encode(self, x: Any) -> Any:
        """`x` itself."""
        return x

    def forward(self, x: Any) -> Any:
        """`x` itself."""
        return x


class TextEncoder(AbstractEncoder):
    """Shared by the text encoders: freezing, tokenising with a warning about words that are cut off, and where the weights are."""

    tokenizer: Any  # texts -> ids (B, max_length); .cut(text) -> the words that do not fit
    max_length: int  # ids a text, marks included
    marks = 2  # of these ids

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self.cut_reported: set[str] = set()  # texts whose cut has been told; encoders of one model may share it

    def freeze(self) -> None:
        """No gradients, and evaluation mode for good: a surrounding `model.train()` does not change it."""
        self.frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """As nn.Module.train, but a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def tokenize(self, text: str | Sequence[str]) -> Tensor:
        """Ids (B, max_length) on the device of the weights; logs the words that do not fit."""
        texts = [text] if isinstance(text, str) else list(text)
        ids = self.tokenizer(texts)
        for row, one in zip(ids, texts, strict=True):
            if self._is_full(row) and one not in self.cut_reported:  # only a full row can have lost words
                self._report_cut(one)
        return ids.to(self.device)

    def _is_full(self, row: Tensor) -> bool:
        return int(row[-1]) == END

    def _report_cut(self, text: str) -> None:
        lost = self.tokenizer.cut(text)
        if lost and len(self.cut_reported) < _MAX_CUT_WARNINGS:
            self.cut_reported.add(text)
            log.warning("a prompt is longer than %d tokens; cut off: %r", self.max_length - self.marks, lost)
            if len(self.cut_reported) == _MAX_CUT_WARNINGS:
                log.warning("further prompts that are cut are not named")

    def encode_with_transformer(self, ids: Tensor) -> Tensor:
        """Ids (B, L) -> features (B, L, D)."""
        raise NotImplementedError

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """B texts -> features (B, max_length, D)."""
        return self.encode_with_transformer(self.tokenize(text))

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """B texts -> features (B, max_length, D)."""
        return self(text)


class ClipTextEncoder(TextEncoder):
    """A text encoder of CLIP, which also reads `Prompt`s: weights on words, several chunks, blocks left out."""

    layer: str  # which features it gives, by the names of its class

    @property
    def n_blocks(self) -> int:
        """Blocks of the transformer."""
        raise NotImplementedError

    def check_clip_skip(self, clip_skip: int | None) -> None:
        """Raises UserError if features of the `clip_skip`-th block from the end cannot be had."""
        if clip_skip is None:
            return
        if self.layer == "pooled":
            raise UserError(f"clip_skip {clip_skip} has no meaning for {type(self).__name__} with layer 'pooled': leave it out")
        if not 1 <= clip_skip <= self.n_blocks:
            raise UserError(f"clip_skip {clip_skip} is out of range: this text encoder takes 1 (its last block) to {self.n_blocks}")

    def encode_with_transformer(self, ids: Tensor, clip_skip: int | None = None) -> Any:
        """Ids (B, L) -> features (B, L, D); `clip_skip`: of the last block (1), the last but one (2), ..."""
        raise NotImplementedError

    def features(self, ids: Tensor, clip_skip: int | None = None) -> Any:
        """What the encoder gives for texts of these ids: features (B, L, D), or these and pooled ones (B, E)."""
        self.check_clip_skip(clip_skip)
        return self.encode_with_transformer(ids, clip_skip)

    def forward(self, text: str | Prompt | Sequence[str | Prompt]) -> Any:
        """B texts or prompts -> features (B, max_length, D), for prompts of n chunks (B, n * max_length, D)."""
        texts = [text] if isinstance(text, (str, Prompt)) else list(text)
        if any(isinstance(one, Prompt) for one in texts):
            return encode_prompts(self, texts)
        return self.features(self.tokenize(texts))

    def encode(self, text: str | Prompt | Sequence[str | Prompt]) -> Any:
        """As calling the module."""
        return self(text)


class FrozenCLIPEmbedder(ClipTextEncoder):
    """CLIP text encoder of Stable Diffusion 1.x, on transformers' CLIPTextModel.

    Its state dict carries the names of published checkpoints (`transformer.text_model.*`) whatever the installed transformers calls
    them, and `load_state_dict` takes both spellings.
    """

    LAYERS = ("last", "pooled", "hidden")

    def __init__(
        self,
        version: str = "openai/clip-vit-large-patch14",  # a published architecture, or a local folder with config.json
        device: str | None = None,  # accepted for old configs; the ids follow the weights
        max_length: int = CONTEXT_LENGTH,
        freeze: bool = True,
        layer: str = "last",  # last: after the final norm; pooled: its end mark only; hidden: layer_idx
        layer_idx: int | None = None,  # for layer="hidden": 0 is the embedding, 12 (or -1) the last block, before the final norm
    ) -> None:
        super().__init__()
        self._check_layer(layer, layer_idx)
        self.layer, self.layer_idx, self.max_length = layer, layer_idx, max_length
        folder = Path(version)
        if folder.is_dir():
            self.transformer, self.tokenizer = _from_folder(folder, max_length)
        else:
            self.transformer, self.tokenizer = _openai_text_model(version), ClipTokenizer("hf", max_length)
        positions, blocks = self.transformer.config.max_position_embeddings, self.transformer.config.num_hidden_layers
        if max_length > positions:
            raise ConfigError(f"max_length {max_length} is more than the {positions} positions of {version}")
        if layer_idx is not None and not -blocks - 1 <= layer_idx <= blocks:
            raise ConfigError(f"layer_idx {layer_idx} is outside -{blocks + 1} to {blocks} for {version}")
        _keep_buffers_real(self.transformer)
        self.register_state_dict_post_hook(_publish_names)
        self.register_load_state_dict_pre_hook(_accept_names)
        if folder.is_dir() and self.device.type != "meta":
            from ldm.inference.checkpoint import load_weights  # lies above this layer

            load_weights(self, _text_folder(folder))
        if freeze:
            self.freeze()

    def _check_layer(self, layer: str, layer_idx: int | None) -> None:
        if layer not in self.LAYERS:
            raise ConfigError(f"FrozenCLIPEmbedder: layer {layer!r} is unknown; use {', '.join(self.LAYERS)}")
        if layer == "hidden" and layer_idx is None:
            raise ConfigError("FrozenCLIPEmbedder: layer 'hidden' needs layer_idx, 0 (embedding) to 12 (last block)")

    @property
    def n_blocks(self) -> int:
        """Blocks of the transformer."""
        return self.transformer.config.num_hidden_layers

    def encode_with_transformer(self, ids: Tensor, clip_skip: int | None = None) -> Any:
        """Ids (B, L) -> features (B, L, D), or (B, 1, D) for the layer "pooled".

        `clip_skip` goes through the final norm, unless the layer is "hidden", whose features never do.
        """
        return self._run(ids, clip_skip)[0]

    def _run(self, ids: Tensor, clip_skip: int | None) -> tuple[Tensor, Tensor]:
        """Features, and the pooled feature (B, D), which is always that of the last block."""
        hidden = self.layer == "hidden"
        out = self.transformer(input_ids=ids, output_hidden_states=hidden or clip_skip is not None)
        if clip_skip is not None:
            features = out.hidden_states[-clip_skip]
            if not hidden:
                features = getattr(self.transformer, "text_model", self.transformer).final_layer_norm(features)
        elif hidden:
            features = out.hidden_states[self.layer_idx]
        else:
            features = out.last_hidden_state if self.layer == "last" else out.pooler_output[:, None, :]
        return features, out.pooler_output


class FrozenOpenCLIPEmbedder(ClipTextEncoder):
    """CLIP text encoder of Stable Diffusion 2.x: features of the last or last but one block, through the final norm.

    Holds the text tower only, under open_clip's names (`model.*`). `freeze=False` makes it trainable with the diffusion model.
    """

    LAYERS = ("last", "penultimate")  # position = number of blocks left out at the end

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "ViT-H-14",  # a name open_clip knows, or a mapping {embed_dim, text_cfg[, vision_cfg]}
        version: str = "laion2b_s32b_b79k",  # a local weights file to read; a published name only says which weights belong here
        device: str | None = None,  # accepted for old configs; the ids follow the weights
        max_length: int = CONTEXT_LENGTH,
        freeze: bool = True,
        layer: str = "last",
    ) -> None:
        super().__init__()
        if layer not in self.LAYERS:
            raise ConfigError(f"FrozenOpenCLIPEmbedder: layer {layer!r} is unknown; use {', '.join(self.LAYERS)}")
        self.layer, self.layer_idx = layer, self.LAYERS.index(layer)
        self.model = TextTower(arch)
        if max_length > self.model.context_length:
            raise ConfigError(f"max_length {max_length} is more than the context_length {self.model.context_length} of {arch}")
        self.max_length = max_length
        self.tokenizer = ClipTokenizer("open_clip", max_length)
        if names_weights(version) and self.device.type != "meta":
            from ldm.inference.checkpoint import load_weights  # lies above this layer

            load_weights(self.model, version, ignore=("visual.",))  # of a whole CLIP, or of a whole diffusion model
        if freeze:
            self.freeze()
        else:
            self._freeze_unused()

    def _freeze_unused(self) -> None:
        """Parameters the features do not depend on: distributed training stops at those that never get a gradient."""
        unused: list[nn.Parameter] = [self.model.logit_scale, self.model.text_projection]
        for block in list(self.model.transformer.resblocks)[len(self.model.transformer.resblocks) - self.layer_idx :]:
            unused += block.parameters()
        for parameter in unused:
            parameter.requires_grad_(False)

    @property
    def n_blocks(self) -> int:
        """Blocks of the transformer."""
        return self.model.config.layers

    def encode_with_transformer(self, ids: Tensor, clip_skip: int | None = None) -> Any:
        """Ids (B, L) -> features (B, L, D), through the final norm."""
        return self.model.hidden(ids, skip_last=self.layer_idx if clip_skip is None else clip_skip - 1)


def _openai_text_model(version: str) -> CLIPTextModel:
    """CLIPTextModel of a published OpenAI architecture, randomly initialised."""
    if version not in _OPENAI_TEXT:
        raise ConfigError(f"CLIP text model {version!r} is neither a folder nor known here; known: {', '.join(_OPENAI_TEXT)}")
    from transformers import CLIPTextConfig, CLIPTextModel

    width, layers, heads = _OPENAI_TEXT[version]
    config = CLIPTextConfig(
        vocab_size=END + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
        bos_token_id=START,
        eos_token_id=END,  # with this id, and not the historical 2, the pooled feature is at the first end mark
    )
    return CLIPTextModel(config)


def _text_folder(folder: Path) -> Path:
    """Where in a local folder, of a text encoder or of a whole model, the text encoder is."""
    found = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    if not (found / "config.json").is_file():
        raise ConfigError(f"{found} has no config.json, so it is not a folder with a CLIP text model")
    return found


def _from_folder(folder: Path, max_length: int) -> tuple[CLIPTextModel, Any]:
    """Model, not filled yet, and tokeniser from a local folder as transformers or diffusers writes it."""
    from transformers import CLIPTextConfig, CLIPTextModel

    weights = _text_folder(folder)
    try:
        model = CLIPTextModel(CLIPTextConfig.from_pretrained(weights, local_files_only=True))
    except OSError as error:
        raise CheckpointError(f"cannot read a CLIP text model from {weights}: {error}") from error
    for place in (weights, folder / "tokenizer"):
        if any((place / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return model, _FolderTokenizer(place, max_length)
    return model, ClipTokenizer("hf", max_length)


class _FolderTokenizer:
    """A local folder's own tokeniser (it may know words learnt by textual inversion) behind the interface of ClipTokenizer."""

    def __init__(self, folder: Path, max_length: int) -> None:
        from transformers import CLIPTokenizer

        self.inner = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = self.inner(list(texts), truncation=True, max_length=self.max_length, padding="max_length")["input_ids"]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def cut(self, text: str) -> str:
        return self.inner.decode(self._ids(text)[self.max_length - 2 :])

    def words(self, text: str) -> list[list[int]]:
        ids, learnt = self._ids(text), set(self.inner.get_added_vocab().values())
        ends = [i for i, (one, token) in enumerate(zip(ids, self.inner.convert_ids_to_tokens(ids), strict=True), 1)
                if one in learnt or token.endswith("</w>")]  # fmt: skip
        return [ids[start:end] for start, end in pairwise([0, *ends])]

    def row(self, ids: Sequence[int]) -> list[int]:
        row = [self.inner.bos_token_id, *ids[: self.max_length - 2], self.inner.eos_token_id]
        return row + [self.inner.pad_token_id] * (self.max_length - len(row))

    def _ids(self, text: str) -> list[int]:
        return self.inner(text, add_special_tokens=False)["input_ids"]


def _keep_buffers_real(model: nn.Module) -> None:
    """Position numbers stay on the CPU when a model is built on the meta device: no checkpoint brings them."""
    for module in model.modules():
        if isinstance(getattr(module, "position_ids", None), Tensor) and module.position_ids.is_meta:
            count = module.position_ids.shape[-1]
            module.register_buffer("position_ids", torch.arange(count, device="cpu").expand(1, -1), persistent=False)


_LEVEL = "text_model."  # the level that transformers 5.6 dropped from CLIPTextModel and every published checkpoint has


def _installed_has_level(encoder: FrozenCLIPEmbedder) -> bool:
    return hasattr(encoder.transformer, "text_model")


def _publish_names(encoder: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """State-dict hook: write `transformer.text_model.*`."""
    if _installed_has_level(encoder):
        return
    prefix += "transformer."
    for name in [n for n in state_dict if n.startswith(prefix)]:
        state_dict[prefix + _LEVEL + name[len(prefix) :]] = state_dict.pop(name)


def _accept_names(encoder: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Load hook: take names with and without `text_model.`, and leave out `position_ids`, which follow from the architecture."""
    prefix += "transformer."
    for name in [n for n in state_dict if n.startswith(prefix)]:
        value, rest = state_dict.pop(name), name[len(prefix) :].removeprefix(_LEVEL)
        if rest != "embeddings.position_ids":
            state_dict[prefix + (_LEVEL if _installed_has_level(encoder) else "") + rest] = value
