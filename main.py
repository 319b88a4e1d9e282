"""Starts a training from YAML configs: `python main.py --base configs/shapes/tiny.yaml --train`. The code is in ldm.training.

The names below are addresses that configs use (`target: main.DataModuleFromConfig`).
"""

from __future__ import annotations

import sys
from typing import Any

_ADDRESSES = {
    "DataModuleFromConfig": "ldm.data.datamodule",
    "WrappedDataset": "ldm.data.datamodule",
    "ImageLogger": "ldm.training.callbacks",
    "SetupCallback": "ldm.training.callbacks",
    "CUDACallback": "ldm.training.callbacks",
}
__all__ = sorted(_ADDRESSES)  # resolved on demand, so that --help needs no torch


def __getattr__(name: str) -> Any:
    if name not in _ADDRESSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ADDRESSES[name]), name)


if __name__ == "__main__":
    from ldm.training.cli import main

    sys.exit(main())
