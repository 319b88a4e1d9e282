"""The learning rate of a training, step by step. The factors themselves are in `ldm.lr_scheduler`, named by the configs."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ldm.util import instantiate_from_config


def with_schedule(optimizer: Optimizer, scheduler_config: Any) -> Any:
    """What `configure_optimizers` returns: the optimizer alone, or with its rate times `scheduler_config`'s factor at every step.

    scheduler_config: {target, params} of an object with schedule(step) -> factor, or None.
    """
    if scheduler_config is None:
        return optimizer
    schedule = LambdaLR(optimizer, lr_lambda=instantiate_from_config(scheduler_config).schedule)
    return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]
