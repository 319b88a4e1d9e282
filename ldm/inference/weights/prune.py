"""From a training checkpoint to a file worth shipping: no optimizer state, one set of weights, any precision.

Owns the choice; reading, names and writing are `checkpoint`'s. Knows no model.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ldm.inference.checkpoint import EMA_MODES, choose_ema, read_metadata, read_state_dict, save_weights
from ldm.inference.facts import read_config
from ldm.inference.weights import key_names
from ldm.inference.weights.families import EMBEDDED_CONFIG
from ldm.util import CheckpointError, UserError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def prune(
    source: str | Path,
    target: str | Path,
    *,
    ema: str = "auto",
    dtype: str = "float16",
    part: str | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
    metadata: dict[str, str] | None = None,
) -> dict[str, int]:
    """Write the weights in `source` (a file or a diffusers folder) to `target` (.safetensors); gives {tensors, elements, bytes}.

    Args:
        ema: "auto" takes moving averages where there are any, "ema" insists on them, "raw" takes the trained weights.
        dtype: of the stored weights, one of `DTYPES`. Schedules and single numbers keep theirs.
        part: keep only names under this prefix, without it (such as `first_stage_model`).
        config: YAML to put into the file's header, so that the file alone is enough to draw.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use {', '.join(DTYPES)}")
    if ema not in EMA_MODES:
        raise UserError(f"ema {ema!r} is unknown; use {', '.join(EMA_MODES)}")
    source = Path(source)
    found = key_names.spelled(read_state_dict(source))
    state, used = choose_ema(found, {}, ema, source)
    state = {n: v for n, v in state.items() if not key_names.is_ema_state(n) and not key_names.is_loss(n)}
    if part is not None:
        prefix = part.rstrip(".") + "."
        state = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
        if not state:
            raise CheckpointError(f"{source} has nothing under {prefix}; it holds {key_names.likely_content(found)}")
    header = {**_kept_metadata(source), "source": source.name, "averages": used, "dtype": dtype, **(metadata or {})}
    if config is not None:
        content = read_config(config)
        header[EMBEDDED_CONFIG] = json.dumps({key: content[key] for key in ("model", "sampling") if key in content})
    path = save_weights(state, target, metadata=header, dtype=DTYPES[dtype], overwrite=overwrite)
    return {"tensors": len(state), "elements": sum(v.numel() for v in state.values()), "bytes": path.stat().st_size}


def _kept_metadata(source: Path) -> dict[str, str]:
    """Text in the header of a .safetensors file: title, licence, config, and whatever else its author wrote."""
    return {} if source.is_dir() else read_metadata(source)
