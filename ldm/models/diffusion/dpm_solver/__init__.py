"""DPM-Solver and DPM-Solver++: public address of `DPMSolverSampler`."""

from ldm.models.diffusion.dpm_solver.sampler import DPMSolverSampler

__all__ = ["DPMSolverSampler"]
