"""Peak memory, asked of any accelerator, and of the process where there is none."""

from __future__ import annotations

import torch

from ldm.training import progress

DEVICE = torch.device("xpu")


def test_an_accelerator_is_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: asked.append(device) or 3 * 2**29)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", asked.append)
    progress.forget_peak_memory(DEVICE)
    assert progress.peak_memory(DEVICE) == 3 * 2**29 and progress.memory_in_use(DEVICE) == "1.5G" and asked == [DEVICE] * 3


def test_without_statistics_the_process_is_measured(monkeypatch):
    def refuse(device):
        raise RuntimeError("no statistics")

    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", refuse)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", refuse)
    for device in (DEVICE, torch.device("cpu")):
        progress.forget_peak_memory(device)
        assert progress.peak_memory(device) == 0 and float(progress.memory_in_use(device)[:-1]) > 0.1
