"""Which of several processes this one is, told by its launcher's environment. Imports nothing heavy.

torchrun sets RANK and WORLD_SIZE, srun sets SLURM_PROCID and SLURM_STEP_NUM_TASKS. The script of a SLURM job has a SLURM_PROCID
too, but is no step: it is one process. Lightning sets LOCAL_RANK and NODE_RANK for processes that it starts itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ldm.util import UserError


def rank_and_world(environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """(number of this process from 0 on, how many there are); (0, 1) where nothing is said. Raises `UserError` for nonsense."""
    env = os.environ if environment is None else environment
    for rank_name, world_name in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank_name in env and world_name in env:
            try:
                rank, world = int(env[rank_name]), int(env[world_name])
            except ValueError:
                rank, world = -1, 0
            if not 0 <= rank < world:
                told = f"{rank_name}={env[rank_name]} and {world_name}={env[world_name]}"
                raise UserError(f"{told} are no process of several: start with torchrun or srun, or unset both")
            return rank, world
    return 0, 1


def is_first(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this is the process that speaks for all, before any of them have met."""
    env = os.environ if environment is None else environment
    rank, world = rank_and_world(env)
    return rank == 0 if world > 1 else env.get("LOCAL_RANK", "0") == "0" and env.get("NODE_RANK", "0") == "0"


def started_by_another(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the first process has started this one (Lightning's own launcher), and so has made its choices already."""
    env = os.environ if environment is None else environment
    return "LOCAL_RANK" in env and rank_and_world(env)[1] == 1


def stands_alone(environment: Mapping[str, str] | None = None) -> bool:
    """Whether nobody has started this process together with others: not Lightning's launcher, torchrun or SLURM."""
    env = os.environ if environment is None else environment
    return not started_by_another(env) and rank_and_world(env)[1] == 1


def label(environment: Mapping[str, str] | None = None) -> str:
    """` (process 3)` for what a process other than the first says; empty for the first."""
    env = os.environ if environment is None else environment
    if is_first(env):
        return ""
    rank, world = rank_and_world(env)
    return f" (process {rank})" if world > 1 else f" (node {env.get('NODE_RANK', '0')}, process {env.get('LOCAL_RANK', '0')})"
