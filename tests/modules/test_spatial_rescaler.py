"""SpatialRescaler against stored numbers of the published code, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.encoders.modules import SpatialRescaler
from ldm.util import ConfigError
from tests.reference_rule import fill


@torch.no_grad()
def test_reference(reference):
    ref = reference("i05_spatial_rescaler")
    x = ref.input("x")
    outputs = {method: SpatialRescaler(method=method)(x) for method in ("nearest", "bicubic", "area")}
    outputs["plain"] = SpatialRescaler()(x)
    outputs["zero"] = SpatialRescaler(n_stages=0)(x)
    outputs["x03"] = SpatialRescaler(multiplier=0.3)(x)
    outputs["two"] = fill(SpatialRescaler(n_stages=2, in_channels=6, out_channels=3))(x)
    outputs["bias"] = fill(SpatialRescaler(n_stages=1, in_channels=6, out_channels=3, bias=True)).encode(x)
    ref.check_all(outputs)


def test_no_parameters_without_out_channels():
    assert list(SpatialRescaler().state_dict()) == []
    assert list(SpatialRescaler(out_channels=3).state_dict()) == ["channel_mapper.weight"]


def test_refusals():
    with pytest.raises(ConfigError, match="'cubic' is unknown; use nearest, linear, bilinear"):
        SpatialRescaler(method="cubic")
    with pytest.raises(ConfigError, match="n_stages -1 must be 0 or more"):
        SpatialRescaler(n_stages=-1)
