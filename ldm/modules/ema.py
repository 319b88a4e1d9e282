"""Exponential moving average of a model's trainable parameters.

    shadow <- d shadow + (1 - d) parameter,   d = min(decay, (1 + n) / (10 + n)) at update n

The shadows are buffers, so they travel in the state dict: the parameter's name without dots, as published checkpoints
have it. They are kept in float32 or better: in half precision a step of 1e-4 of the difference rounds to nothing, and a
decay of 0.9999 rounds to 1, so that the average would stand still for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
_HALF = (torch.float16, torch.bfloat16)


class LitEma(nn.Module):
    """Average of the parameters of `model` that require a gradient when it is built; call it after each optimizer step."""

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        use_num_upates: bool = True,  # warm up with the number of updates; the spelling is the published one
        device: str | torch.device | None = None,  # keep the average there (cpu: to spare an accelerator's memory); None: beside the model
    ):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay={decay} must be between 0 and 1")
        self.m_name2s_name: dict[str, str] = {}
        self.collected_params: list[Tensor] | None = None
        self.device = None if device is None else torch.device(device)
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        for name, p in model.named_parameters():
            if p.requires_grad:
                self._track(name, p)

    def _track(self, name: str, p: Tensor) -> None:
        shadow = name.replace(".", "")
        if hasattr(self, shadow):
            raise ValueError(f"parameter {name!r} cannot be averaged: the buffer name {shadow!r} is taken")
        self.m_name2s_name[name] = shadow
        self.register_buffer(shadow, _at_least_float32(p.detach()).to(self.device or p.device, copy=True))

    def reset_num_updates(self) -> None:
        """Start the warm-up anew."""
        self.num_updates.zero_()

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Take the parameters of `model` into the average."""
        decay = self.decay.item()
        n = int(self.num_updates.item()) + 1
        if n > 0:  # -1 in the buffer: no warm-up
            self.num_updates.fill_(n)
            decay = min(decay, (1 + n) / (10 + n))
        shadows, values = [], []
        for name, p in self._tracked(model):
            shadow = local_part(self._buffers[self.m_name2s_name[name]])
            shadows.append(shadow)
            values.append(local_part(p.detach()).to(shadow))
        if shadows:
            torch._foreach_lerp_(shadows, values, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the averages into the parameters of `model`, in their dtype and on their device."""
        for name, p in self._tracked(model):
            p.copy_(self._buffers[self.m_name2s_name[name]])

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep a copy of the parameters for `restore`."""
        self.collected_params = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write back what `store` kept, and let go of it."""
        if self.collected_params is None:
            raise RuntimeError("nothing to restore: call store() first")
        for kept, p in zip(self.collected_params, parameters, strict=True):
            p.copy_(kept)
        self.collected_params = None

    def _tracked(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The averaged parameters of `model`, by name; all must be there, and no other may be trainable."""
        parameters = dict(model.named_parameters())
        missing = [name for name in self.m_name2s_name if name not in parameters]
        extra = [name for name, p in parameters.items() if p.requires_grad and name not in self.m_name2s_name]
        if missing or extra:
            raise RuntimeError(
                f"the average does not fit this model: {missing[:3]} are averaged but not in it, {extra[:3]} are trainable "
                "but not averaged; build LitEma after freezing and adding parameters"
            )
        return ((name, parameters[name]) for name in self.m_name2s_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LitEma:
        """Follow `.to()`, `.half()` and the like to another device (unless one is set), but never into half precision."""

        def held(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            moved = tensor.to(moved.device) if moved.dtype in _HALF else moved
            return moved if self.device is None or moved.is_meta else moved.to(self.device)

        return super()._apply(held, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take half-precision averages from a pruned checkpoint as float32, and not its rounded decay."""
        names = [key for key in state_dict if key.startswith(prefix)]
        halves = {key: state_dict[key] for key in names if state_dict[key].dtype in _HALF}
        widened = {**state_dict, **{key: value.float() for key, value in halves.items()}}
        if prefix + "decay" in halves:
            widened[prefix + "decay"] = self.decay.clone()
        super()._load_from_state_dict(widened, prefix, *args, **kwargs)


def local_part(tensor: Any) -> Tensor:
    """What this process holds of a sharded tensor (a DTensor), sharing its memory; an ordinary tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _reshard(model: nn.Module) -> None:
    """Cut again what a forward pass without a backward one has left whole (FSDP's modules that do so): averages are kept as shares."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


@contextmanager
def ema_scope(ema: LitEma | None, model: nn.Module, context: str | None = None) -> Iterator[None]:
    """Inside the block `model` has the averaged weights; its own come back at the end, also after an error.

    ema: None leaves the model as it is, for models built without an average. context: what it is for, for the log.
    """
    if ema is None:
        yield
        return
    _reshard(model)
    ema.store(model.parameters())
    try:
        ema.copy_to(model)
        if context:
            log.info("%s: switched to EMA weights", context)
        yield
    finally:
        _reshard(model)
        ema.restore(model.parameters())
        if context:
            log.info("%s: restored training weights", context)
