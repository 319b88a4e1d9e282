"""Fully sharded training: every process keeps its share of weights, gradients, optimizer state and EMA (ZeRO stage 3).

Built on `torch.distributed.fsdp.fully_shard`, which works with any device (Lightning's FSDPStrategy refuses the CPU). The networks of a
model are sharded block by block: a block's weights are whole only while it computes. Trainable parameters outside of them stay whole,
their gradients are averaged. Checkpoints are those of one process: whole tensors under the usual names, written by the first process, so
`--resume` works from and to any number of processes and any strategy, and so do all tools for weights.

Sources: ZeRO (arXiv:1910.02054), PyTorch FSDP (arXiv:2304.11277).
"""
# ruff: noqa: D102 (what a hook is for is documented by Lightning)

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.modules.ema import LitEma, local_part
from ldm.util import CheckpointError, ConfigError

log = logging.getLogger(__name__)

_NETWORK = "model.diffusion_model"
_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


class ShardedStrategy(DDPStrategy):
    """DDP's processes, with the model cut up instead of copied."""

    strategy_name = "fsdp"
    draws_together = True  # no process has the whole model, so pictures of it take all

    def __init__(
        self,
        parts: Sequence[str] | str | None = None,  # names of modules to shard; None: the denoising network, or all that has a forward
        min_size: int = 1_000_000,  # parameters; a block with fewer is sharded together with what surrounds it
        reshard_after_forward: bool = True,  # False keeps weights whole until the backward pass: faster, more memory
    ) -> None:
        super().__init__()
        self.parts = [parts] if isinstance(parts, str) else parts
        self.min_size = min_size
        self.reshard_after_forward = reshard_after_forward
        self._whole: list[nn.Parameter] | None = None  # trainable, but not sharded; None: nothing is sharded yet

    # -- setting up
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        first = self._whole is None
        if first:
            self._shard(self.model)
        self.model_to_device()
        if first:
            self._share_whole(self.model)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                _one_by_one(optimizer)
        self.setup_precision_plugin()

    def _shard(self, model: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        networks = find_networks(model, self.parts)
        for network in networks.values():
            for block in [*find_blocks(network, self.min_size), network]:
                fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        _shard_averages(model)
        self._whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        sharded = sum(p.numel() for p in model.parameters() if isinstance(p, DTensor))
        rest = sum(p.numel() for p in self._whole)
        message = "fsdp: %s, %.4g M parameters in %d shards; %.4g M trainable ones whole"
        log.info(message, ", ".join(networks), sharded / 1e6, mesh.size(), rest / 1e6)

    def _share_whole(self, model: nn.Module) -> None:
        """What is not sharded begins everywhere as on the first process, as DDP sees to: what a process drew before may differ."""
        for tensor in [*model.parameters(), *model.buffers()]:
            if not isinstance(tensor, DTensor):
                torch.distributed.broadcast(tensor.detach(), 0)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the gradients of what is not sharded. Doing so after every accumulated batch gives the same as doing so once."""
        super().post_backward(closure_loss)
        for parameter in self._whole or []:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            used = torch.tensor(float(parameter.grad is not None), device=gradient.device)
            torch.distributed.all_reduce(used)
            torch.distributed.all_reduce(gradient)
            parameter.grad = gradient.div_(self.world_size) if used else None

    # -- checkpoints: whole tensors, on the first process
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state = optimizer.state_dict()
        groups = [{**group, **_ways(optimizer.defaults)} for group in state["param_groups"]]
        return {"state": {i: self._gathered(values) for i, values in state["state"].items()}, "param_groups": groups}

    def _gathered(self, values: Mapping[str, Any]) -> dict[str, Any]:
        whole = {}
        for name, value in values.items():  # in the same order everywhere: every process takes part
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_global_zero:
                whole[name] = value.cpu() if isinstance(value, Tensor) else value
        return whole

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shares = {i: _shares(parameters[i], values) for i, values in state["state"].items()}
            optimizer.load_state_dict({**state, "state": shares})
            _one_by_one(optimizer)


# ---------------------------------------------------------------------- what is cut, and where
def find_networks(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The modules to shard, by name: those named, else the denoising network, else every trainable part at the top that can be called."""
    known = dict(model.named_modules())
    if names is None:
        children = [name for name, child in model.named_children() if _trains(child) and _has_forward(child)]
        names = [_NETWORK] if _NETWORK in known else children
    if missing := [name for name in names if name not in known]:
        top = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(f"lightning.fsdp.parts: the model has no part {', '.join(missing)}; at its top are {top}")
    if not names:
        raise ConfigError("--strategy fsdp: nothing can be sharded in this model; use --strategy ddp")
    return {name: known[name] for name in names}


def find_blocks(network: nn.Module, min_size: int) -> list[nn.Module]:
    """Parts of `network` that are made whole one at a time. Lists are opened, and so is a part that holds most of the network."""
    half = _size(network) / 2

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if _size(child) < min_size:
                continue
            if not _has_forward(child) or _size(child) > half:
                yield from visit(child)
            else:
                yield child

    return list(visit(network))


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _shard_averages(model: nn.Module) -> None:
    """Cut every average as the parameter that it follows: a process averages its own share."""
    averages = [module for module in model.modules() if isinstance(module, LitEma)]
    for module in list(model.modules()) if averages else []:
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for average in [a for a in averages if a.m_name2s_name.keys() == parameters.keys()]:
            averages.remove(average)
            for name, shadow in average.m_name2s_name.items():
                if average.device is not None and average.device.type != parameters[name].device.type:
                    raise ConfigError(f"--strategy fsdp shards the average, so it cannot be kept on {average.device}: leave out ema_device")
                average._buffers[shadow] = _share(parameters[name], average._buffers[shadow])


# ---------------------------------------------------------------------- shares
def _share(parameter: Tensor, whole: Any) -> Any:
    """This process's share of a tensor that is shaped as `parameter`; anything else as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(whole, Tensor):
        return whole
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def _shares(parameter: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's state of one parameter."""
    odd = [name for name, value in values.items() if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape]
    if odd and isinstance(parameter, DTensor):
        raise CheckpointError(f"--strategy fsdp: the optimizer's {', '.join(odd)} is not shaped as its parameter, and cannot be sharded")
    return {name: _share(parameter, v) if getattr(v, "shape", None) == parameter.shape else v for name, v in values.items()}


# ---------------------------------------------------------------------- optimizers
def _ways(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("foreach", "fused") if name in options}


def _one_by_one(optimizer: Any) -> None:
    """Where sharded and whole parameters meet in a group, they are updated one by one: no call takes both."""
    for group in optimizer.param_groups:
        if len({isinstance(p, DTensor) for p in group["params"]}) > 1:
            group.update(dict.fromkeys(_ways(group), False))


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients, whole and sharded, as one process with whole ones has it."""
    squares: dict[bool, Tensor] = {}
    for gradient in gradients:
        sharded = isinstance(gradient, DTensor)
        square = local_part(gradient).float().square().sum()
        squares[sharded] = squares[sharded] + square if sharded in squares else square
    if True in squares:
        torch.distributed.all_reduce(squares[True])
    return torch.stack(list(squares.values())).sum().sqrt()


class _Clipping:
    """Gradient clipping for groups in which some gradients are sharded."""

    def clip_grad_by_norm(self, optimizer: Any, clip_val: float) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            scale = (clip_val / (total_norm(gradients) + _EPS)).clamp(max=1.0)
            for gradient in gradients:
                local_part(gradient).mul_(scale.to(gradient.dtype))

    def clip_grad_by_value(self, optimizer: Any, clip_val: float) -> None:
        for gradient in [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]:
            local_part(gradient).clamp_(-clip_val, clip_val)


class ShardedPrecision(_Clipping, Precision):
    """32-true."""


class ShardedMixedPrecision(_Clipping, MixedPrecision):
    """bf16-mixed."""


def sharded_precision(name: Any, accelerator: str) -> Precision:
    """The precision plugin of `lightning.trainer.precision` for sharded training. Raises `ConfigError` for fp16 and others."""
    if str(name) in ("None", "32", "32-true"):
        return ShardedPrecision()
    if str(name) in ("bf16", "bf16-mixed"):
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = "cpu" if accelerator == "cpu" or there is None else there.type
        return ShardedMixedPrecision("bf16-mixed", device)
    raise ConfigError(f"--strategy fsdp cannot be used with lightning.trainer.precision={name}: it takes 32-true or bf16-mixed")
