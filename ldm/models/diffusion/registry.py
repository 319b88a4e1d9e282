"""Every sampler by name: what `--sampler NAME` may be, and what is behind it.

Owns the names and nothing else: no torch here, so that `--help` can list them. `make_sampler` builds one; all have the public interface
of `ldm.models.diffusion.sampler.Sampler`. Names are read without regard to case, blanks and hyphens, and `++` may stand for `pp`, so that
"DPM++ 2M Karras" is `dpmpp_2m_karras`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from ldm.util import UserError, get_obj_from_str

if TYPE_CHECKING:
    from ldm.models.diffusion.sampler import Sampler

__all__ = ["ALIASES", "RECOMMENDED", "SAMPLERS", "SPACINGS", "SamplerInfo", "make_sampler", "sampler_info"]

RECOMMENDED = "fast"  # what measures best from 5 to 30 model calls, see docs/samplers.md

# Where the steps of a walk lie (`ldm.models.diffusion.sigmas`); the first five are trained timesteps.
SPACINGS = (
    "uniform",
    "quad",
    "linspace",
    "leading",
    "trailing",
    "time_uniform",
    "time_quadratic",
    "logSNR",
    "karras",
    "exponential",
)

_DIFFUSION = "ldm.models.diffusion"


@dataclass(frozen=True)
class SamplerInfo:
    """One named sampler: a class and the arguments that make it this one."""

    name: str
    target: str  # address of the class
    options: dict[str, Any] = field(hash=False)  # arguments of its constructor
    summary: str  # one line for --help
    order: int  # of convergence, as measured; of the mean and variance of the samples if stochastic
    stochastic: bool  # draws noise in its steps unless eta says otherwise
    invertible: bool  # has encode(): a deterministic way from x0 to noise


def _named(
    name: str, cls: str, summary: str, order: int = 1, options: dict[str, Any] | None = None, stochastic: bool = False, grids: bool = False
) -> list[SamplerInfo]:
    """The sampler, and with `grids` the same one on two other grids of noise levels, down to a clean picture."""
    target, given, both = f"{_DIFFUSION}.{cls}", options or {}, (stochastic, not stochastic)
    infos = [SamplerInfo(name, target, given, summary, order, *both)]
    for grid in ("karras", "exponential") if grids else ():
        line = f"{name} on {grid} noise levels"
        infos.append(SamplerInfo(f"{name}_{grid}", target, {**given, "spacing": grid, "final": "clean"}, line, order, *both))
    return infos


def _dpm(name: str, summary: str, algorithm: str, order: int, measured: int, grids: bool = False, **options: Any) -> list[SamplerInfo]:
    """A DPM-Solver of `order` by name and `measured` order of convergence."""
    options = {"algorithm": algorithm, "order": order, "spacing": "logSNR", **options}
    return _named(name, "dpm_solver.DPMSolverSampler", summary, measured, options, algorithm.startswith("sde"), grids)


_SINGLE: dict[str, Any] = {"method": "singlestep"}
_UNIPC_FULL: dict[str, Any] = {"lower_order_final": False, "spacing": "logSNR", "final": "first"}
_FULL: dict[str, Any] = {"exact_weights": True, "second_order_start": True, "lower_order_final": False}
_ALL = [
    *_named("ddim", "ddim.DDIMSampler", "DDIM on the published grid; eta 0 deterministic, 1 as random as DDPM"),
    *_named("plms", "plms.PLMSSampler", "pseudo linear multistep (PNDM) on the published grid", 2),
    *_named("dpm_solver", "dpm_solver.DPMSolverSampler", "DPM-Solver++ 2M in even time steps, as published", 2),
    *_named("ddpm", "posterior.DDPMSampler", "DDPM ancestral sampling in any number of steps", stochastic=True),
    *_named("euler", "euler.EulerSampler", "Euler steps in the noise level", grids=True),
    *_named("euler_a", "euler.EulerAncestralSampler", "Euler steps with renewed noise", stochastic=True, grids=True),
    *_named("heun", "heun.HeunSampler", "Heun: two model calls a step", 2, grids=True),
    *_dpm("dpm_2m", "DPM-Solver 2, multistep", "dpmsolver", 2, 2),
    *_dpm("dpm_3m", "DPM-Solver 3, multistep, as usually coded", "dpmsolver", 3, 2),
    *_dpm("dpm_2s", "DPM-Solver 2, singlestep", "dpmsolver", 2, 2, **_SINGLE),
    *_dpm("dpm_3s", "DPM-Solver 3, singlestep, as usually coded", "dpmsolver", 3, 2, **_SINGLE),
    *_dpm("dpmpp_2m", "DPM-Solver++ 2, multistep", "dpmsolver++", 2, 2, True),
    *_dpm("dpmpp_3m", "DPM-Solver++ 3, multistep, as usually coded", "dpmsolver++", 3, 2, True),
    *_dpm("dpmpp_2s", "DPM-Solver++ 2, singlestep", "dpmsolver++", 2, 2, **_SINGLE),
    *_dpm("dpmpp_3s", "DPM-Solver++ 3, singlestep, as usually coded", "dpmsolver++", 3, 2, **_SINGLE),
    *_dpm("dpm_3m_full", "DPM-Solver 3, multistep, third order throughout", "dpmsolver", 3, 3, **_FULL),
    *_dpm("dpm_3s_full", "DPM-Solver 3, singlestep, third order throughout", "dpmsolver", 3, 3, lower_order_final=False, **_SINGLE),
    *_dpm("dpmpp_3m_full", "DPM-Solver++ 3, multistep, third order throughout", "dpmsolver++", 3, 3, **_FULL),
    *_dpm("dpmpp_3s_full", "DPM-Solver++ 3, singlestep, third order throughout", "dpmsolver++", 3, 3, lower_order_final=False, **_SINGLE),
    *_dpm("dpm_2m_sde", "DPM-Solver 2, multistep, with noise", "sde-dpmsolver", 2, 2),
    *_dpm("dpmpp_sde", "DPM-Solver++ 1 with noise", "sde-dpmsolver++", 1, 1),
    *_dpm("dpmpp_2m_sde", "DPM-Solver++ 2, multistep, with noise", "sde-dpmsolver++", 2, 2, True),
    *_dpm("dpmpp_3m_sde", "DPM-Solver++ 3, multistep, with noise", "sde-dpmsolver++", 3, 2, True),
    *_named("unipc", "unipc.UniPCSampler", "UniPC 2 (bh2): a corrector that costs no model call", 2, grids=True),
    *_named("unipc_bh1", "unipc.UniPCSampler", "UniPC 2 (bh1)", 2, {"variant": "bh1"}),
    *_named("unipc_3", "unipc.UniPCSampler", "UniPC 3 (bh2)", 2, {"order": 3}, grids=True),
    *_named("unipc_full", "unipc.UniPCSampler", "UniPC 2 (bh2), third order throughout", 3, _UNIPC_FULL),
    *_named(
        "fast",
        "fast.FastSampler",
        "recommended one for 5 to 30 steps: DPM-Solver 3 in eps; grid, end and weights by the number of steps",
        2,
    ),
]

SAMPLERS: dict[str, SamplerInfo] = {info.name: info for info in _ALL}

# Other names in use, in the form `_normal` gives them.
ALIASES: dict[str, str] = {
    "dpm": "dpm_solver",
    "dpmsolver": "dpm_solver",
    "euler_ancestral": "euler_a",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_euler_ancestral": "euler_a",
    "k_heun": "heun",
    "k_dpmpp_2m": "dpmpp_2m",
    "ancestral": "ddpm",
    "pndm": "plms",
    "recommended": RECOMMENDED,
}


def _normal(name: str) -> str:
    return name.strip().lower().replace("++", "pp").replace("-", "_").replace(" ", "_")


def sampler_info(name: str) -> SamplerInfo:
    """The sampler called `name` (or an alias of it); `UserError` with the nearest names if there is none."""
    key = _normal(name)
    key = ALIASES.get(key, key)
    if key in SAMPLERS:
        return SAMPLERS[key]
    near = get_close_matches(key, [*SAMPLERS, *ALIASES], n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UserError(f"unknown sampler {name!r}: {hint}There are {', '.join(SAMPLERS)}")


def make_sampler(name: str, model: Any, *, noise: Any = None, **overrides: Any) -> Sampler:
    """The sampler called `name` for `model`; `noise` replaces the global generator.

    `overrides` change arguments of its constructor (spacing, final, ...); None keeps the sampler's own.
    """
    info = sampler_info(name)
    changed = {key: value for key, value in overrides.items() if value is not None}
    return get_obj_from_str(info.target)(model, noise=noise, **{**info.options, **changed})
