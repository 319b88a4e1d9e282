"""What a picture says about how it was drawn, and what of it must be so again for `--reproduce`. Draws nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import ldm
from ldm.inference.additions import FLAGS, split_spec
from ldm.inference.facts import REPO, read_config
from ldm.inference.options import Options, recorded_options
from ldm.inference.prompts import MAX_SEED, Batch
from ldm.util import CheckpointError, UserError

log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".json", ".ckpt", ".pt", ".pth")  # what counts of a diffusers folder
MOST_PICTURES = 1024  # in a recorded batch
_FOUND = "found from the weights"  # instead of a config's path


def version() -> str:
    """The version of this package."""
    return str(getattr(ldm, "__version__", "unknown"))


def weights_hash(path: str | Path) -> str:
    """SHA-256 of a weights file; of a diffusers folder, that of the names and hashes of its weights and settings."""
    path = Path(path)
    if path.is_file():
        return _file_hash(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r} is neither a file nor a folder")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.suffix in _WEIGHTS and p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {_file_hash(file)}\n".encode())
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hashes(options: Options) -> dict[str, dict[str, str]]:
    """Every weights file a run draws with, where it lies and its hash, by the record's names: model, vae, refiner, lora1, ..."""
    paths = {"model": options.ckpt, "vae": options.vae, "refiner": options.refiner}
    paths |= {f"{flag}{i}": split_spec(text)[0] for flag in FLAGS for i, text in enumerate(getattr(options, flag), 1)}
    found = {name: {"ckpt": shown(path), "sha256": weights_hash(path)} for name, path in paths.items() if path is not None}
    for name, config in (("model", options.config), ("refiner", options.refiner_config)):
        if (path := paths[name]) is not None:
            found[name]["config"] = shown(config) if isinstance(config, str) else _FOUND
            found[name]["config_sha256"] = config_hash(config, path)
    return found


def config_hash(config: Any, ckpt: str | Path) -> str:
    """SHA-256 of what a config says of its model, wherever it stands and however it is laid out.

    A config found from the weights may name their folder, which may be moved: there `ckpt` is left out.
    """
    text = json.dumps(_with_text_keys(read_config(config)["model"]), sort_keys=True, default=str)
    if not isinstance(config, (str, Path)):
        text = text.replace(json.dumps(str(Path(ckpt))), '"."')
    return hashlib.sha256(text.encode()).hexdigest()


def _with_text_keys(value: Any) -> Any:
    """As JSON has it; numbers and text among the keys of one mapping could not be sorted."""
    if isinstance(value, Mapping):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def shown(path: str) -> str:
    """A path as it may stand in a picture: inside the project relative to it, otherwise as it was given."""
    full = Path(path).resolve()
    return full.relative_to(REPO).as_posix() if full.is_relative_to(REPO) else path


def thread_count(recorded: Mapping[str, Any] | None) -> int:
    """CPU threads of a recorded run, otherwise those of this one."""
    machine = (recorded or {}).get("machine")
    count = machine.get("threads") if isinstance(machine, dict) else None
    return count if isinstance(count, int) and 1 <= count <= 1024 else torch.get_num_threads()


def describe(
    options: Options,  # of this batch
    batch: Batch,
    index: int,  # of the picture within the batch
    *,
    weights: Mapping[str, Mapping[str, str]],
    inputs: Mapping[str, str],  # hashes of the picture files, by option
    device: str,
    threads: int,
    rng_state: Sequence[bytes] | None,  # with --rng legacy, before the batch
) -> dict[str, Any]:
    """The record of a picture, but for what the finishing steps say about it."""
    record: dict[str, Any] = {
        "prompt": batch.prompts[index],
        "negative_prompt": batch.negatives[index],
        "seed": batch.seeds[index],
        "options": {**recorded_options(options), "device": device},
        **weights,
        "batch": {
            "index": index,
            "start": batch.start,
            "prompts": list(batch.prompts),
            "negatives": list(batch.negatives),
            "seeds": list(batch.seeds),
        },
        "machine": {"device": device, "threads": threads},
        "versions": {"ldm": version(), "torch": str(torch.__version__), "python": platform.python_version()},
    }
    if inputs:
        record["inputs"] = dict(inputs)
    if rng_state is not None:
        record["rng_state"] = [base64.b64encode(part).decode("ascii") for part in rng_state]
    return record


# ---------------------------------------------------------------------- drawing again
def is_first_version(recorded: Mapping[str, Any]) -> bool:
    """Whether a record is of the first version, which knew one picture file, the init image."""
    return "init_image" in recorded


def recorded_inputs(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of the picture files by option."""
    if is_first_version(recorded) and isinstance(recorded["init_image"], dict):
        return {"init_img": recorded["init_image"].get("sha256")}
    inputs = recorded.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def recorded_batch(recorded: Mapping[str, Any], name: str) -> tuple[Batch, int]:
    """The batch a picture was drawn in, and its place there. Raises `UserError` when the record makes no sense."""
    try:
        batch = recorded["batch"]
        texts = [tuple(batch[key]) for key in ("prompts", "negatives")]
        seeds, index, start = tuple(batch["seeds"]), batch["index"], batch["start"]
        valid = (
            all(isinstance(text, str) for group in texts for text in group)
            and all(isinstance(seed, int) and 0 <= seed <= MAX_SEED for seed in seeds)
            and len(texts[0]) == len(texts[1]) == len(seeds)
            and isinstance(index, int)
            and isinstance(start, int)
            and 0 <= index < len(seeds) <= MOST_PICTURES
        )
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise UserError(f"the record of the batch in picture {name!r} is damaged")
    return Batch(start, texts[0], texts[1], seeds), index


def recorded_rng(recorded: Mapping[str, Any], name: str) -> list[bytes]:
    """The global generators' states before the batch. Raises `UserError` when they are damaged."""
    try:
        return [base64.b64decode(text, validate=True) for text in recorded["rng_state"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the random state in {name!r} cannot be used: {error}") from None


def check_record(
    recorded: Mapping[str, Any],
    path: str,
    weights: Mapping[str, Mapping[str, str]],
    inputs: Mapping[str, str],
    files: Mapping[str, str],  # what the task's files are, by option
    device: str,
) -> None:
    """Refuse to draw again what cannot come out the same; warn of what may not."""
    name = repr(path)
    recorded_batch(recorded, path)
    parts = [("model", "ckpt", "weights"), ("vae", "vae", "first stage"), ("refiner", "refiner", "refiner")]
    parts += [(part, flag, f"file for --{flag}") for flag in FLAGS for part in weights if part.startswith(flag)]
    for part, flag, what in parts:
        then, now = (_part(found, part).get("sha256") for found in (recorded, weights))
        if then != now:
            told = f"another {what}" if part != "model" else f"other {what}"
            raise UserError(f"{name} was drawn with {told} (sha256 {str(then)[:12]}...): name them by --{flag}")
    for part, flag in (("model", "config"), ("refiner", "refiner_config")):
        _check_config(_part(recorded, part), _part(weights, part), name, flag, _part(recorded, "versions").get("ldm") == version())
    for option, then in recorded_inputs(recorded).items():
        if inputs.get(option) != then:
            raise UserError(f"{name} was drawn from another {files.get(option, option)}: name it by --{option.replace('_', '-')}")
    machine = _part(recorded, "machine")
    if machine.get("device") != device:
        log.warning("%s was drawn on %s: on %s the bits may differ", name, machine.get("device"), device)
    for package, now in (("ldm", version()), ("torch", str(torch.__version__))):
        then = _part(recorded, "versions").get(package)
        if then != now:
            log.warning("%s was drawn with %s %s: with %s the bits may differ", name, package, then, now)


def _check_config(then: Mapping[str, Any], now: Mapping[str, Any], name: str, flag: str, same_version: bool) -> None:
    """The config says the same of its model. Older records do not tell; what is found from weights, another version may find otherwise."""
    told = then.get("config_sha256")
    found = then.get("config") == _FOUND
    if told is None or told == now.get("config_sha256") or (found and not same_version):
        return
    cure = f"leave out --{flag} and take away what lies beside the weights" if found else f"name that one by --{flag}"
    raise UserError(f"{name} was drawn with another config ({then.get('config')}, sha256 {str(told)[:12]}...): {cure}")


def _part(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry that must be a mapping; a picture may come from anywhere."""
    part = record.get(name)
    return part if isinstance(part, Mapping) else {}
