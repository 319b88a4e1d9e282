"""Public address: the average of the weights."""

from ldm.modules.ema import LitEma

__all__ = ["LitEma"]
