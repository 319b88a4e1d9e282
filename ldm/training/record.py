"""Where a run lives and what it goes on from; what is written down about it.

Knows no trainer: folders, checkpoint files, seeds, versions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import pickle
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.processes import is_first, started_by_another
from ldm.training.cli import load_yaml
from ldm.util import CheckpointError, UserError

log = logging.getLogger(__name__)

DEFAULT_SEED = 23


@dataclass(frozen=True)
class RunFolder:
    """Where a run lives, and what it goes on from."""

    path: Path
    checkpoint: Path | None  # of --resume
    configs: tuple[Path, ...]  # the resumed run's
    new: bool = False  # has yet to be made, see `claim`

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"


def locate(options: argparse.Namespace, now: str) -> RunFolder:
    """The folder of a new run, or that of the run to resume with its checkpoint and configs."""
    if not options.resume:
        return RunFolder(_new_path(options, now, Path(options.base[0]).stem if options.base else "run"), None, (), new=True)
    path = Path(options.resume)
    if not path.exists():
        raise CheckpointError(f"--resume {options.resume}: there is no such folder or file")
    if path.is_dir():
        checkpoint, configs = path / "checkpoints" / "last.ckpt", _saved_configs(path)
        if checkpoint.exists():
            return RunFolder(path, checkpoint, configs)
        if others := sorted((path / "checkpoints").glob("**/*.ckpt")):
            raise CheckpointError(
                f"--resume {options.resume}: there is no {checkpoint}; give the .ckpt file to go on from, such as {others[0]}"
            )
        if not configs:
            raise CheckpointError(f"--resume {options.resume}: neither {checkpoint} nor configs are there; is it the folder of a run?")
        log.info("%s stopped before its first checkpoint: it starts again from the beginning", path)
        return RunFolder(path, None, configs)
    for folder in path.resolve().parents:
        if configs := _saved_configs(folder):
            return RunFolder(folder, path, configs)
    if not options.base:
        raise CheckpointError(f"--resume {options.resume}: no configs folder was found above this file; add --base CONFIG.yaml")
    return RunFolder(_new_path(options, now, path.stem), path, (), new=True)


def check_flags(options: argparse.Namespace, folder: RunFolder) -> None:
    """Flags that would be of no effect are refused."""
    given = {"--init_from": options.init_from} if options.resume else {}
    if not folder.new:
        given |= {"--name": options.name, "--project": options.project, "--postfix": options.postfix}
    if vain := [flag for flag, value in given.items() if value]:
        raise UserError(f"--resume goes on with the weights and in the folder of its run: leave out {', '.join(vain)}")
    if options.init_ema != "auto" and not options.init_from:
        raise UserError(f"--init_ema {options.init_ema} chooses among the weights of --init_from, which is not given")


def _new_path(options: argparse.Namespace, now: str, stem: str) -> Path:
    name = re.sub(r"[^A-Za-z0-9._=+-]+", "-", options.name or stem)
    return Path(options.logdir) / options.project / f"{now}_{name}{options.postfix}"


def claim(folder: RunFolder) -> RunFolder:
    """Make the folder of a new run: with -2, -3, ... at its end where there is one of that second and name, if only just begun."""
    if not folder.new or not is_first() or started_by_another():  # the first process chooses
        return folder
    for name in itertools.chain([folder.path.name], (f"{folder.path.name}-{i}" for i in itertools.count(2))):
        path = folder.path.with_name(name)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"the run's folder {path} cannot be made ({error.strerror}): choose another place with --logdir") from None
        return replace(folder, path=path)
    raise AssertionError("names never end")


def give_up(folder: RunFolder, logdir: str) -> None:
    """Take away a claimed folder in which nothing was written, and what was empty around it, up to `logdir`."""
    with contextlib.suppress(OSError):
        for path in (folder.path, *folder.path.parents) if folder.new else ():
            path.rmdir()
            if path == Path(logdir):
                return


def _saved_configs(folder: Path) -> tuple[Path, ...]:
    """Configs of all starts of a run. A start without its project file was killed while it wrote them, and does not count."""
    starts = sorted(path.name.removesuffix("-project.yaml") for path in (folder / "configs").glob("*-project.yaml"))
    files = (folder / "configs" / f"{start}-{part}.yaml" for start in starts for part in ("lightning", "project"))
    return tuple(path for path in files if path.exists())


def choose_seed(options: argparse.Namespace, folder: RunFolder) -> int:
    """--seed, else the resumed run's, else 23."""
    if options.seed is not None:
        return options.seed
    for path in sorted((folder.path / "configs").glob("*-run.yaml"), reverse=True):
        return int(load_yaml(path).get("seed", DEFAULT_SEED))
    return DEFAULT_SEED


def describe_run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What to write beside the run: command line, seed, git hash, versions, platform."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "pytorch-lightning", "numpy", "omegaconf", "transformers", "open_clip_torch"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "overrides": list(options.overrides),
        "seed": seed,
        "git": _git_state(),
        "versions": versions,
        "platform": platform.platform(),
    }


def _git_state() -> str:
    """Commit of this source tree, with `+changes` when files differ from it; `unknown` outside a repository."""
    root = Path(__file__).resolve().parents[2]
    try:
        output = [
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return output[0] + ("+changes" if output[1] else "")


def read_resumed(path: Path) -> dict[str, int]:
    """Look into a checkpoint before anything is built: it must be whole, safe, and hold a training rather than weights only."""
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        what = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        raise CheckpointError(f"checkpoint {path} holds more than tensors and plain values, and is not loaded: {what}") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read, it may be cut short: {str(error).splitlines()[0]}") from None
    missing = [key for key in ("loops", "optimizer_states", "state_dict", "global_step") if key not in checkpoint]
    if missing:
        raise CheckpointError(f"checkpoint {path} holds weights but no training state ({', '.join(missing)}): use --init_from {path}")
    counters = checkpoint.get("callbacks") or {}
    updates = counters.get("UpdateCounter", {}).get("updates", checkpoint["global_step"])
    return {"global_step": checkpoint["global_step"], "updates": updates, "epoch": checkpoint["epoch"]}
