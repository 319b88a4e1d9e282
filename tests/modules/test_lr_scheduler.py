"""Learning-rate factors: reference numbers, end points, purity."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2
from ldm.util import ConfigError, instantiate_from_config

SD1 = {"warm_up_steps": [10000], "cycle_lengths": [10000000000000], "f_start": [1e-6], "f_max": [1.0], "f_min": [1.0]}
TWO = {"warm_up_steps": [100, 50], "cycle_lengths": [1000, 500], "f_start": [1e-6, 0.01], "f_max": [1.0, 0.5], "f_min": [0.1, 0.05]}
COSINE = {"warm_up_steps": 1000, "max_decay_steps": 50000, "lr_start": 0.001, "lr_max": 0.1, "lr_min": 0.0001}
STEPS = [0, 1, 10, 49, 50, 99, 100, 101, 500, 999, 1000, 1001, 1025, 1050, 1051, 1200, 1499, 1500]
LONG = [0, 1, 500, 999, 1000, 1001, 9999, 10000, 10001, 25000, 49999, 50000, 60000, 100000, 1000000]


def test_matches_the_reference(reference):
    def values(schedule, steps):
        return np.array([schedule.schedule(n) for n in steps])

    reference("f01_lr_schedulers").check_all(
        {
            "lin_sd1": values(LambdaLinearScheduler(**SD1), LONG),
            "lin_two": values(LambdaLinearScheduler(**TWO), STEPS),
            "cos2": values(LambdaWarmUpCosineScheduler2(**TWO), STEPS),
            "cos1": values(LambdaWarmUpCosineScheduler(**COSINE), LONG),
            "call": np.array([LambdaLinearScheduler(**TWO)(120), LambdaWarmUpCosineScheduler(**COSINE)(120)]),
        }
    )


@pytest.mark.parametrize("kind", [LambdaLinearScheduler, LambdaWarmUpCosineScheduler2])
def test_is_pure_and_keeps_its_end_value(kind):
    forward, backward = kind(**TWO), kind(**TWO)
    assert [forward(n) for n in STEPS] == [backward(n) for n in reversed(STEPS)][::-1]
    assert forward(1500) == pytest.approx(0.05)
    assert forward(10**9) == forward(1500)  # the original had no answer after the last cycle


def test_drives_a_torch_scheduler():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = instantiate_from_config({"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": TWO})
    torch_schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=schedule.schedule)
    for _ in range(120):
        optimizer.step()
        torch_schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * schedule(120))


def test_reports_when_asked(caplog):
    schedule = LambdaWarmUpCosineScheduler(**COSINE, verbosity_interval=10)
    with caplog.at_level(logging.INFO, logger="ldm.lr_scheduler"):
        for n in range(1, 21):
            schedule(n)
    assert [r.args[0] for r in caplog.records] == [10, 20]


def test_errors_name_the_fault():
    with pytest.raises(ConfigError, match="f_max has 1"):
        LambdaLinearScheduler(**{**TWO, "f_max": [1.0]})
    with pytest.raises(ConfigError, match="max_decay_steps=500 must be greater than warm_up_steps=1000"):
        LambdaWarmUpCosineScheduler(**{**COSINE, "max_decay_steps": 500})
