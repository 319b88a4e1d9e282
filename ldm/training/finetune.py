"""Training a small part of a model, or a small part added to it, and nothing else: LoRA and textual inversion.

Each is a callback, so the model's config stays that of its base:

    lightning.callbacks.lora: {target: ldm.training.finetune.LoRA, params: {rank: 8}}

A checkpoint holds only what is trained, and a fingerprint of the rest, which comes again from `model.params.ckpt_path`: a resumed run
goes on exactly, or says that its base has changed. With every checkpoint the result is written beside it as a small file that
`--lora` or `--embedding` takes.
"""
# ruff: noqa: D102 (what a hook is for is documented by Lightning)

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from ldm.modules.encoders.text import FrozenOpenCLIPEmbedder
from ldm.modules.lora import LowRank
from ldm.modules.textual_inversion import add_word, text_encoders, vectors_of_text
from ldm.util import CheckpointError, ConfigError, get_obj_from_str

log = logging.getLogger(__name__)

_ADAPTER = "default"  # peft's name for the only one


class FineTuning(Callback):
    """What both have in common: everything else is frozen, small checkpoints, a file with the result."""

    file: ClassVar[str]  # of the result, in the run's folder
    changes_text: bool = False  # the text encoder, so that cached embeddings of captions would be wrong

    def __init__(self) -> None:
        self.trained: tuple[str, ...] = ()  # names in the state dict
        self.base: str = ""  # fingerprint of all else

    # ------------------------------------------------------------------ of the subclasses
    def add(self, model: Any) -> None:
        """Put into a frozen model what is to be trained."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it trains")

    def export(self, trained: Mapping[str, Tensor], path: Path) -> None:
        """Write the result."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its result is written")

    # ------------------------------------------------------------------ hooks
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or self.trained:
            return
        names = [type(c).__name__ for c in trainer.callbacks if isinstance(c, FineTuning)]  # type: ignore[attr-defined]
        if len(names) > 1:
            raise ConfigError(f"a run trains one thing: leave only one of the callbacks {', '.join(names)}")
        if getattr(pl_module, "use_ema", False):
            raise ConfigError("fine-tuning a part keeps no moving average of all weights: add model.params.use_ema=false")
        pl_module.requires_grad_(False)
        frozen = pl_module.state_dict()
        self.base = fingerprint(frozen)
        self.add(pl_module)
        state = pl_module.state_dict(keep_vars=True)
        self.trained = tuple(name for name, value in state.items() if isinstance(value, nn.Parameter) and value.requires_grad)
        pl_module.register_load_state_dict_pre_hook(self._fill_in)
        count = sum(state[name].numel() for name in self.trained)
        log.info("%s: %d values in %d tensors are trained, all else is frozen", type(self).__name__, count, len(self.trained))

    def _fill_in(self, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        """A checkpoint of this run has only what was trained: all else stays as it is."""
        for name, value in module.state_dict().items():
            if name not in self.trained:
                state_dict.setdefault(name, value)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in self.trained if name in state}
        if trainer.is_global_zero:
            self.export(checkpoint["state_dict"], Path(trainer.default_root_dir) / self.file)

    def state_dict(self) -> dict[str, str]:
        return {"base": self.base}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        if state_dict["base"] != self.base:
            raise CheckpointError(
                "this run was started from other weights than the config names now (model.params.ckpt_path), and what it has learnt "
                "belongs to those: put them back, or start a new run"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        log.info("the result goes to %s", Path(trainer.default_root_dir) / self.file)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.changes_text and isinstance(batch, Mapping) and "c" in batch:
            raise ConfigError("the data brings cached embeddings of its captions, and the text encoder is trained: drop their text_encoder")


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and exact values: by sums of whole numbers, so fast on any device; not safe against intent."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        whole = value.detach().clone().reshape(-1).view(torch.uint8)
        words = whole[: len(whole) // 4 * 4].view(torch.int32)
        place = torch.arange(1, len(words) + 1, device=words.device)  # so that their order counts
        sums = [int(one.sum(dtype=torch.int64)) for one in (words * place, words, whole[len(words) * 4 :])]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {sums}\n".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------- LoRA
class LoRA(FineTuning):
    """Low-rank changes of the denoising network (arXiv:2106.09685), on request of the CLIP text encoders too, trained by peft.

    The result is `lora.safetensors` in kohya's form.
    """

    file = "lora.safetensors"

    def __init__(
        self,
        rank: int = 8,
        alpha: float | None = None,  # changes are scaled by alpha / rank; None: rank
        targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),  # ends of names of the network's layers; []: none
        text_encoder: bool = False,
        text_targets: Sequence[str] | None = None,  # of the text encoder; None: its attention
        dropout: float = 0.0,  # before the first factor
        init: str = "kaiming",  # of the first factor, the second starts at zero: kaiming or gaussian
        rank_pattern: Mapping[str, int] | None = None,  # layer, by the end of its name or a regular expression -> its own rank
        alpha_pattern: Mapping[str, float] | None = None,
        rslora: bool = False,  # scale by alpha / sqrt(rank) (arXiv:2312.03732)
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("peft") is None:
            raise ConfigError('LoRA training needs the package peft: pip install "peft>=0.17" (drawing with a LoRA does not)')
        inits = {"kaiming": True, "gaussian": "gaussian"}
        wrong = [f"rank is {rank}, it must be at least 1"] if rank < 1 else []
        wrong += [f"dropout is {dropout}, it must lie in 0 to below 1"] if not 0 <= dropout < 1 else []
        wrong += [f"init {init!r} is unknown: use {' or '.join(inits)}"] if init not in inits else []
        wrong += ["targets is empty and text_encoder is off: nothing would be trained"] if not targets and not text_encoder else []
        wrong += ["dropout has no effect in a text encoder: drop one of them"] if dropout and text_encoder else []
        if wrong:
            raise ConfigError(f"LoRA: {'; '.join(wrong)}")
        self.changes_text = text_encoder
        self.targets, self.text_targets = list(targets), None if text_targets is None else list(text_targets)
        self.options = {
            "r": rank,
            "lora_alpha": rank if alpha is None else alpha,
            "lora_dropout": dropout,
            "init_lora_weights": inits[init],
            "use_rslora": rslora,
        }
        self.patterns = {"rank_pattern": dict(rank_pattern or {}), "alpha_pattern": dict(alpha_pattern or {})}
        self.matched: set[str] = set()  # patterns that fit a layer
        self.layers: dict[str, tuple[str, float]] = {}  # path of a layer's factors -> (weight, alpha)
        self.names: list[str] = []  # of all weights of the base

    def add(self, model: Any) -> None:
        self.names = list(model.state_dict())
        if self.targets:
            self._inject(model.model.diffusion_model, self.targets, [], "the network")
        for encoder in text_encoders(model) if self.changes_text else []:
            fused = isinstance(encoder, FrozenOpenCLIPEmbedder)
            targets = self.text_targets or (["in_proj_weight", "out_proj"] if fused else ["q_proj", "k_proj", "v_proj", "out_proj"])
            whole = [name for name, _ in encoder.named_parameters() if name.endswith(tuple(f".{one}" for one in targets))]
            self._inject(encoder, [one for one in targets if not one.endswith("_weight")], whole, "the text encoder")
            if hasattr(encoder, "is_trainable"):  # of a GeneralConditioner, which then lets gradients through
                encoder.is_trainable = True
        self.layers = dict(_peft_layers(model))
        if lost := sorted({name for patterns in self.patterns.values() for name in patterns} - self.matched):
            raise ConfigError(f"LoRA: {', '.join(lost)} of rank_pattern or alpha_pattern fits no layer that is trained")

    def _inject(self, part: nn.Module, targets: list[str], parameters: list[str], what: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        layers = [name for name, _ in part.named_modules() if name.endswith(tuple(targets))] + parameters
        patterns = {option: {p: v for p, v in own.items() if _fits_any(p, layers)} for option, own in self.patterns.items()}
        self.matched |= {name for own in patterns.values() for name in own}
        try:
            config = LoraConfig(target_modules=targets, target_parameters=parameters or None, **self.options, **patterns)
            inject_adapter_in_model(config, part, adapter_name=_ADAPTER)
        except ValueError as error:
            kinds = (nn.Linear, nn.Conv2d)
            ends = sorted({".".join(name.split(".")[-2:]) for name, module in part.named_modules() if isinstance(module, kinds)})
            raise ConfigError(
                f"LoRA: {' or '.join(targets)} cannot be changed in {what} ({str(error).splitlines()[0][:120]}); its layers end in "
                f"{', '.join(ends)}"
            ) from None

    def export(self, trained: Mapping[str, Tensor], path: Path) -> None:
        found = {}
        for place, (weight, alpha) in self.layers.items():
            down, up = (trained[f"{place}.lora_{side}.{_ADAPTER}.weight"] for side in "AB")
            found[weight] = LowRank(down.detach().cpu(), up.detach().cpu(), alpha=alpha)
        get_obj_from_str("ldm.inference.weights.lora_files.write_lora")(path, found, self.names, overwrite=True)


def _fits_any(pattern: str, layers: Sequence[str]) -> bool:
    """Whether peft takes `pattern` for the name of one of these layers."""
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in layers)


def _peft_layers(model: nn.Module) -> Any:
    """(path of the factors, (weight that they change, alpha)) of all layers that peft has put into a model, by published names."""
    from peft.tuners.lora import LoraLayer

    published = get_obj_from_str("ldm.inference.weights.key_names.published")
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = f"{path}.{getattr(layer, 'parameter_name', 'weight')}".replace(".base_layer.", ".")
            yield published(path), (published(weight), layer.scaling[_ADAPTER] * layer.r[_ADAPTER])


# ----------------------------------------------------------------------------------------------------- textual inversion
class TextualInversion(FineTuning):
    """A new word (arXiv:2208.01618): a few vectors in the token table of each text encoder. Captions of the data must have the word.

    The result is `embedding.safetensors`.
    """

    file = "embedding.safetensors"
    changes_text = True

    def __init__(
        self,
        word: str,  # such as <mine>
        start: str,  # text, of one or several tokens, whose vectors the new ones begin as
        vectors: int | None = None,  # how many; None: as many as `start` has tokens
        caption_key: str = "caption",
    ) -> None:
        super().__init__()
        self.word, self.start, self.vectors, self.caption_key = word, start, vectors, caption_key
        if vectors is not None and vectors < 1:
            raise ConfigError(f"TextualInversion: vectors is {vectors}, it must be at least 1")

    def add(self, model: Any) -> None:
        for encoder in text_encoders(model):
            add_word(encoder, self.word, vectors_of_text(encoder, self.start, self.vectors), trainable=True)
            if hasattr(encoder, "is_trainable"):  # of a GeneralConditioner, which then lets gradients through
                encoder.is_trainable = True

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        captions = batch.get(self.caption_key, ()) if isinstance(batch, Mapping) else ()
        if not any(self.word.lower() in text.lower() for text in captions):
            raise ConfigError(f"no caption of a batch has the word {self.word!r}, such as {list(captions)[:1]}: set the data's word")

    def export(self, trained: Mapping[str, Tensor], path: Path) -> None:
        embedding, write = (get_obj_from_str(f"ldm.inference.weights.embedding_files.{name}") for name in ("Embedding", "write_embedding"))
        vectors = tuple(trained[name].detach().cpu() for name in self.trained)
        write(path, embedding(self.word, vectors), overwrite=True)
