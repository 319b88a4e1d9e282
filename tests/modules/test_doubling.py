"""Doubling and a 3x3 convolution in one: the same numbers with 2x2 kernels at the small size, and only where that holds and pays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.diffusionmodules import stage_blocks, unet_blocks
from ldm.modules.diffusionmodules.util import double_and_convolve


def usual(x: torch.Tensor, conv: nn.Module) -> torch.Tensor:
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Kernel sizes of the convolutions to come."""
    seen: list[tuple[int, ...]] = []
    conv2d = F.conv2d

    def spy(x, weight, *rest, **named):
        seen.append(tuple(weight.shape[2:]))
        return conv2d(x, weight, *rest, **named)

    monkeypatch.setattr(F, "conv2d", spy)
    return seen


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "bias"), [((2, 6, 17, 31), True), ((1, 6, 64, 8), False)])
def test_the_same_numbers(shape, bias, order, monkeypatch) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 5, 3, padding=1, bias=bias).to(memory_format=order)
    x = torch.randn(shape).to(memory_format=order)
    with torch.no_grad():
        want, seen = usual(x, conv), calls(monkeypatch)
        got = double_and_convolve(x, conv)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert seen == [(2, 2)] * 4
        assert got.is_contiguous(memory_format=order)
        double = conv.double()
        torch.testing.assert_close(double_and_convolve(x.double(), double), usual(x.double(), double), rtol=1e-12, atol=1e-13)


def test_bfloat16_and_autocast() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.randn(1, 16, 32, 32)
    with torch.no_grad():
        want = usual(x, conv)
        with torch.autocast("cpu", torch.bfloat16):
            cast = double_and_convolve(x, conv)
        conv.bfloat16()
        half = double_and_convolve(x.bfloat16(), conv)
    assert cast.dtype == half.dtype == torch.bfloat16
    assert torch.equal(cast, half)  # whether weights are cast now or were before
    assert (half.float() - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=0),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 5, padding=1),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)),
    ],
)
def test_other_convolutions_stay(conv: nn.Module) -> None:
    x = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(double_and_convolve(x, conv), usual(x, conv))


def test_training_and_small_maps_stay(monkeypatch) -> None:
    conv, x, small = nn.Conv2d(4, 4, 3, padding=1), torch.randn(1, 4, 32, 32), torch.randn(1, 4, 8, 8)
    seen = calls(monkeypatch)
    double_and_convolve(x, conv).sum().backward()
    with torch.no_grad():
        double_and_convolve(small, conv)
    assert seen == [(3, 3)] * 2 and conv.weight.grad is not None


@torch.no_grad()
def test_both_networks_use_it(monkeypatch) -> None:
    x = torch.randn(1, 4, 32, 32)
    first_stage, network = stage_blocks.Upsample(4, True), unet_blocks.Upsample(4, True)
    seen = calls(monkeypatch)
    torch.testing.assert_close(first_stage(x), usual(x, first_stage.conv), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(network(x, (64, 64)), usual(x, network.conv), rtol=1e-5, atol=1e-6)
    odd = network(x, (63, 64))
    torch.testing.assert_close(odd, network.conv(F.interpolate(x, size=(63, 64), mode="nearest")))
    assert seen == ([(2, 2)] * 4 + [(3, 3)]) * 2 + [(3, 3)] * 2
