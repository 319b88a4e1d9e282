"""Parts of models; configs name the conditioner here."""

from ldm.modules.encoders.conditioner import GeneralConditioner

UNCONDITIONAL_CONFIG = {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": []}}

__all__ = ["UNCONDITIONAL_CONFIG", "GeneralConditioner"]
