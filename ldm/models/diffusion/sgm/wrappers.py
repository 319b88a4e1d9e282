"""Networks behind the one call that denoisers make: `network(x, c_noise, cond)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["IdentityWrapper", "OpenAIWrapper"]


class IdentityWrapper(nn.Module):
    """Passes its arguments on. The network's weights are named `diffusion_model.*`, compiled or not."""

    def __init__(self, diffusion_model: nn.Module, compile_model: bool = False) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        if compile_model:
            self.diffusion_model.compile()  # in place: torch.compile() would rename the weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer."""
        return self.diffusion_model(*args, **kwargs)


class OpenAIWrapper(IdentityWrapper):
    """For UNetModel: `concat` joins the channels of x, `crossattn` is the context, `vector` is y."""

    def forward(self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], **kwargs: Any) -> Tensor:
        """x (B, C, H, W), t (B,), c as GeneralConditioner gives it."""
        if c.get("concat") is not None:
            x = torch.cat([x, c["concat"].to(x.dtype)], dim=1)
        return self.diffusion_model(x, timesteps=t, context=c.get("crossattn"), y=c.get("vector"), **kwargs)
