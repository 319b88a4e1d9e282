"""Freezing of modules that a model uses but does not train.

A frozen module changes its class to a subclass of it, made here, whose `train()` always means `eval()`. So the parent's
`train()` cannot wake its dropout or batch statistics, `isinstance`, names and the state dict stay as they were, and the
module can still be copied and pickled.
"""

from __future__ import annotations

from functools import cache
from types import new_class
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Put a module into eval mode for good and turn its gradients off; returns the module. Freezing twice is harmless."""
    module.requires_grad_(False)
    if not is_frozen(module):
        module.__class__ = _frozen_class(type(module))
    return module.eval()


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` was applied to this very module."""
    return isinstance(module, _Frozen)


class _Frozen(nn.Module):
    """What a frozen class has in front of its base."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # A class made at run time cannot be found by name: rebuild it from the class that can.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # object's own since Python 3.11
        return _blank, (type(self).__mro__[2],), state


@cache
def _frozen_class(base: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return new_class(base.__name__, (_Frozen, base), exec_body=lambda namespace: namespace.update(names))


def _blank(base: type[nn.Module]) -> nn.Module:
    """An unfilled instance of the frozen form of `base`, for copy and pickle."""
    cls = _frozen_class(base)
    return cls.__new__(cls)
