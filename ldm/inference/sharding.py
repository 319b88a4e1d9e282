"""A run of pictures over several processes, and going on with one that stopped.

Started by torchrun or srun, process r of n draws every n-th batch from the r-th on. Picture k has the number, seed and batch that it has in
one process and goes to samples/k, so processes need not speak to each other. A folder of such a run can be filled up: pictures that
are there are looked at, never replaced. Imports no torch at module level.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.inference.additions import FLAGS, embedding_spec, lora_spec
from ldm.inference.options import Options, recorded_options
from ldm.inference.output import png_bytes, read_metadata, write_new
from ldm.inference.prompts import Batch, plan
from ldm.processes import rank_and_world
from ldm.util import UserError

if TYPE_CHECKING:
    from ldm.inference.session import Picture

_DRAWS_NOTHING = {"device", "skip_npz"}  # recorded options that may differ between the pictures of a run


@dataclass
class Share:
    """What one process of a run draws."""

    rank: int
    world: int
    options: Options
    everything: list[Batch]  # of the run, in order
    batches: list[Batch] = field(default_factory=list)  # of this process; whole ones: each picture is what it is in one process
    there: int = 0  # pictures of this process that need not be drawn
    _inputs: dict[str, dict[str, str]] = field(default_factory=dict)  # hashes of picture files, by the overrides of a batch

    @property
    def told(self) -> str:
        """In words."""
        whose = "" if self.world == 1 else f"process {self.rank} of {self.world}: "
        pictures = sum(map(len, self.batches))
        return f"{whose}{pictures} pictures to draw, {self.there} there; no grid"

    @cached_property
    def weights(self) -> dict[str, dict[str, str]]:
        """Where the weights lie, and their hashes; taken once, as it may take long."""
        from ldm.inference.record import weights_hashes

        return weights_hashes(self.options)

    def save(self, batch: Batch, picture: Picture) -> Path | None:
        """Write a picture under its number; None where it is there already."""
        path = self.path(batch, picture.index)
        return None if path.exists() else write_new(path, png_bytes(picture.image, picture.texts))

    def path(self, batch: Batch, index: int) -> Path:
        """Where a picture of a batch belongs."""
        return Path(self.options.outdir) / "samples" / f"{batch.start + index:05d}.png"

    def paths(self) -> list[Path]:
        """Where the pictures of the whole run belong, in order."""
        return [self.path(batch, i) for batch in self.everything for i in range(len(batch))]

    def check_all(self) -> None:
        """Raise `UserError` unless every picture of the run is there and is this run's."""
        for batch in self.everything:
            for i in range(len(batch)):
                self._check_picture(batch, i)

    def is_there(self, batch: Batch, index: int) -> bool:
        """Whether this very picture is there already. Raises `UserError` for another one in its place."""
        path = self.path(batch, index)
        if not path.exists():
            return False
        if not self.options.skip_existing:
            raise UserError(f"{str(path)!r} exists already: go on with that run by --skip_existing, or choose another --outdir")
        self._check_picture(batch, index)
        return True

    def _check_picture(self, batch: Batch, index: int) -> None:
        path = self.path(batch, index)
        found = read_metadata(path)
        options = dataclasses.replace(self.options, **batch.overrides)
        own = {"prompt": batch.prompts[index], "negative_prompt": batch.negatives[index], "seed": batch.seeds[index]}
        differing = list(_other_options(found, recorded_options(options) | own)) or list(self._other_files(found, batch, options))
        if differing:
            raise UserError(f"{str(path)!r} is a picture of another run ({', '.join(differing)}): choose another --outdir")

    def _other_files(self, found: Mapping[str, Any], batch: Batch, options: Options) -> Iterator[str]:
        """Weights, configs and picture files that are not those of the record."""
        from ldm.inference.record import recorded_inputs
        from ldm.inference.tasks import get_task

        for part, file in self.weights.items():
            recorded = found.get(part)
            then = recorded if isinstance(recorded, dict) else {}
            yield from _changed(f"{part} {file['ckpt']!r}", then.get("sha256"), file["sha256"])
            if "config_sha256" in then:  # older records have none
                yield from _changed(f"config of {part} {file.get('config')!r}", then["config_sha256"], file.get("config_sha256"))
        if inputs := recorded_inputs(found):
            now, names = self._input_hashes(batch, options), get_task(options.task).files
            for name, sha256 in inputs.items():
                yield from _changed(f"{names.get(name, name)} {getattr(options, name, None)!r}", sha256, now.get(name))

    def _input_hashes(self, batch: Batch, options: Options) -> dict[str, str]:
        """As the session records them."""
        from ldm.inference.session import input_hashes
        from ldm.inference.tasks import get_task

        key = json.dumps(batch.overrides, sort_keys=True)
        if key not in self._inputs:
            self._inputs[key] = input_hashes(get_task(options.task).read(options))
        return self._inputs[key]


def share_of(options: Options, environment: Mapping[str, str] | None = None) -> Share | None:
    """This process's share of the run; None for a run of one process that begins anew, which numbers its pictures on.

    Raises `UserError` for options that cannot be shared, and for pictures that are there and should not be.
    """
    rank, world = rank_and_world(environment)
    if world == 1 and not options.skip_existing:
        return None
    _check(options, world)
    everything = list(plan(options.prompts, options.negative_prompt, options.seed, options.n_iter, options.batch))
    share = Share(rank, world, options, everything)
    for batch in everything[rank::world]:
        there = [share.is_there(batch, i) for i in range(len(batch))]
        share.there += len(batch) if all(there) else 0
        if not all(there):
            share.batches.append(batch)
    return share


def _check(options: Options, world: int) -> None:
    what = f"{world} processes" if world > 1 else "--skip_existing"
    reasons = {
        "--reproduce draws one picture": options.reproduce is not None,
        "--skip_save leaves nothing behind": options.skip_save,
        "--rng legacy makes every picture depend on those before it": options.rng == "legacy",
    }
    problems = [reason for reason, holds in reasons.items() if holds]
    if options.skip_existing and options.save_progress:
        problems.append("--save_progress writes films beside pictures, and --skip_existing looks at pictures only")
    if problems:
        raise UserError(f"{what}: {'; '.join(problems)}")


def _other_options(found: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """Options that are not those of the record."""
    theirs = {**found["options"], **{name: found.get(name) for name in ("prompt", "negative_prompt", "seed")}}
    for name in sorted({*own, *theirs} - _DRAWS_NOTHING):
        if not _same(name, own.get(name), theirs.get(name)):
            yield f"{name} {theirs.get(name)!r}, not {own.get(name)!r}"


def _changed(what: str, then: Any, now: Any) -> Iterator[str]:
    if then != now:
        yield f"{what} had sha256 {str(then)[:12]}..., now {str(now)[:12]}..."


def _same(name: str, own: Any, recorded: Any) -> bool:
    if name in FLAGS and isinstance(own, list) and isinstance(recorded, list):
        return len(own) == len(recorded) and all(_same_addition(name, *pair) for pair in zip(own, map(str, recorded), strict=True))
    return bool(_plain(own) == _plain(recorded))


def _same_addition(flag: str, own: str, recorded: str) -> bool:
    """Whether an entry of --lora or --embedding means the recorded one, in which the weight or word as used is written out."""
    if own == recorded:
        return True
    then, _, said = recorded.rpartition(":")
    if flag == "lora":
        path, weight = lora_spec(own)
        return (path, repr(weight)) == (then, said)
    path, word = embedding_spec(own)
    return path == then and word in (None, said)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def take_own_device(environment: Mapping[str, str] | None = None) -> None:
    """Of several accelerators of this machine, let this process use its own."""
    import torch

    env = os.environ if environment is None else environment
    local = int(env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")))
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(local % torch.accelerator.device_count())
