"""LoRAs merged into a checkpoint file for good: a model that needs no `--lora` any more. Builds no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ldm.inference.additions import lora_spec
from ldm.inference.checkpoint import choose_ema, read_metadata, read_state_dict, save_weights
from ldm.inference.record import weights_hash
from ldm.inference.weights import key_names
from ldm.inference.weights.lora_files import gather
from ldm.inference.weights.prune import DTYPES
from ldm.modules.lora import with_changes
from ldm.util import UserError


def merge_into_file(
    source: str | Path,
    target: str | Path,
    loras: Sequence[str],  # FILE or FILE:WEIGHT each
    *,
    ema: str = "auto",
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the weights in `source` (.safetensors, .ckpt) with LoRAs added to `target` (.safetensors); gives {tensors, changed, bytes}.

    Args:
        ema: "auto" takes moving averages where there are any, "ema" insists on them, "raw" takes the trained weights.
        dtype: of the stored weights, a name of `prune.DTYPES`; None keeps each tensor's.
    """
    source, specs = Path(source), [lora_spec(text) for text in loras]
    if source.is_dir():
        raise UserError(f"{source} is a diffusers folder: make a file of it first, with scripts/convert.py {source} MODEL.safetensors")
    if not specs:
        raise UserError("nothing to merge: name files by --lora FILE[:WEIGHT]")
    found = key_names.spelled(read_state_dict(source))
    state, _ = choose_ema(found, {}, ema, source)
    state = {name: value for name, value in state.items() if not key_names.is_ema_state(name)}
    changes = gather(state, specs)
    state |= {name: with_changes(state[name], its_changes) for name, its_changes in changes.items()}
    merged = [{"file": Path(path).name, "weight": weight, "sha256": weights_hash(path)} for path, weight in specs]
    header = {**read_metadata(source), "merged_loras": json.dumps(merged)}
    path = save_weights(state, target, metadata=header, dtype=None if dtype is None else DTYPES[dtype], overwrite=overwrite)
    return {"tensors": len(state), "changed": len(changes), "bytes": path.stat().st_size}
