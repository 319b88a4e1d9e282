"""DiffusionWrapper: hands each kind of conditioning to the argument of the network that takes it.

Owns the conditioning keys (None, concat, crossattn, hybrid, adm, hybrid-adm, crossattn-adm). Knows no schedule and no sampler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.util import ConfigError, instantiate_from_config, plain

CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")


class DiffusionWrapper(nn.Module):
    """The network of a diffusion model behind one call, whatever conditions it.

    Args:
        diff_model_config: config of the network (`{target, params}`); `sequential_crossattn: true` beside `target` hands
            `c_crossattn` on as a list instead of joining it along the tokens.
        conditioning_key: which of `CONDITIONING_KEYS` the network was made for.
    """

    def __init__(self, diff_model_config: Any, conditioning_key: str | None = None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ConfigError(f"conditioning_key {conditioning_key!r} is unknown; allowed are {', '.join(map(str, CONDITIONING_KEYS))}")
        config = plain(diff_model_config)
        self.sequential_cross_attn = bool(config.get("sequential_crossattn", False))
        self.diffusion_model = instantiate_from_config({k: v for k, v in config.items() if k != "sequential_crossattn"})
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: list[Tensor] | None = None,
        c_crossattn: list[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W), t (B,); `c_concat`: list of (B, C', H, W); `c_crossattn`: list of (B, L, D); `c_adm`: (B, D) or classes (B,)."""
        key = self.conditioning_key
        inputs: dict[str, Any] = {}
        if key in ("concat", "hybrid", "hybrid-adm"):
            x = torch.cat([x, *self._given("c_concat", c_concat)], dim=1)
        if key in ("crossattn", "hybrid", "hybrid-adm", "crossattn-adm"):
            tokens = self._given("c_crossattn", c_crossattn)
            inputs["context"] = tokens if self.sequential_cross_attn else torch.cat(tokens, dim=1)
        if key == "adm":
            inputs["y"] = self._given("c_crossattn", c_crossattn)[0]
        elif key in ("hybrid-adm", "crossattn-adm"):
            inputs["y"] = self._given("c_adm", c_adm)
        return self.diffusion_model(x, t, **inputs)

    def _given(self, name: str, value: Any) -> Any:
        if value is None:
            raise ConfigError(f"conditioning_key {self.conditioning_key!r} needs {name} in the conditioning, and none was given")
        return value
