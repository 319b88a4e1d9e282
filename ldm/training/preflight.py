"""What can be told from a config before anything is built: weights it starts from that are not there. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ldm.util import CheckpointError, names_weights

_CONFIGS = (".yaml", ".yml", ".json")


def start_weights(config: Any, place: str) -> Iterator[tuple[str, str]]:
    """(key, path) of every `ckpt_path` in a config, and of a text encoder's `version` that is a file; keys as on the command line."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if (key == "ckpt_path" and value is not None) or (key == "version" and _is_file_name(value)):
                yield f"{place}.{key}", str(value)
            else:
                yield from start_weights(value, f"{place}.{key}")
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            yield from start_weights(value, f"{place}.{i}")


def _is_file_name(version: Any) -> bool:
    """A folder is right for transformers' text encoders: the encoder says what it takes."""
    return isinstance(version, str) and not Path(version).is_dir() and names_weights(version)


def check_start_weights(config: Mapping[str, Any]) -> None:
    """Raise a CheckpointError that names all files of weights that the model's config asks for and that are not there."""
    wrong = [(key, reason) for key, path in start_weights(config["model"], "model") if (reason := _unusable(Path(path)))]
    if wrong:
        key = wrong[0][0]
        raise CheckpointError(
            f"weights that the model starts from are not there: {'; '.join(f'{reason} ({key})' for key, reason in wrong)}. Put them there, "
            f"or name another file with {key}=FILE (for random weights {key}=null)"
        )


def _unusable(path: Path) -> str | None:
    if path.suffix in _CONFIGS:
        return f"{path} is a config and holds no weights"
    return None if path.exists() else f"{path} does not exist"
