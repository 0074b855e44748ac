"""The network as the training loop calls it: recomputing, compiled, in parallel, under autocast.

DDP keeps a whole copy of everything in each process. FSDP2 (`fully_shard`) shares parameters, gradients, optimizer
state and averages out over the processes, and gathers the parameters of one block at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffit.device import autocast
from diffit.distributed import World
from diffit.models.image import DiffiTResBlock
from diffit.nn.block import BLOCKS
from diffit.training.config import TrainConfig


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a network, outermost ones only: they are recomputed, and sharded, one at a time.

    Raises:
        ValueError: if it has none of a known kind.
    """
    res_blocks: list[nn.Module] = [module for module in model.modules() if isinstance(module, DiffiTResBlock)]
    found = res_blocks or [module for module in model.modules() if isinstance(module, tuple(BLOCKS.values()))]
    if not found:
        raise ValueError(
            "activation checkpointing and FSDP work block by block, and this network has no block of diffit.nn.block: "
            "leave --activation_checkpointing and --parallel fsdp out, or enter its block in BLOCKS"
        )
    return found


def recompute_blocks(model: nn.Module) -> None:
    """Activation checkpointing: keep what enters each block only, and compute the rest again in the backward pass."""
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Share the parameters of a network out over all processes, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world.size,))
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


class Parallel:
    """Calls the network for the loss.

    Args:
        model: the network; with FSDP it is already sharded.
        config: asks for compilation, precision, kind of parallelism.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device, world: World) -> None:
        self.sharded = config.parallel == "fsdp"
        self.model: Any = model
        outer: Any = torch.compile(model) if config.compile else model
        if world.size > 1 and not self.sharded:
            ids = [torch.cuda.current_device()] if device.type == "cuda" else None
            outer = nn.parallel.DistributedDataParallel(outer, device_ids=ids)
        self.outer = outer
        self.call = autocast(outer, device, config.precision)

    def __call__(self, *inputs: Tensor, **conditions: Tensor) -> Tensor:
        return self.call(*inputs, **conditions)

    @contextlib.contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        """Around a forward and backward pass: gradients are shared with the other processes after the last only."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            yield
        elif last or not isinstance(self.outer, nn.parallel.DistributedDataParallel):
            yield
        else:
            with self.outer.no_sync():
                yield


def gradient_norm(parameters: list[nn.Parameter], clip: float) -> Tensor:
    """The norm of all gradients [], which are clipped to `clip` unless that is 0."""
    norm: Any = nn.utils.clip_grad_norm_(parameters, clip or float("inf"))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A network's state dict; that of a sharded network is gathered, on rank 0 alone, and all ranks must call."""
    if not is_sharded(model):
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(  # type: ignore[return-value]
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def out_of_step(models: list[nn.Module], world: World) -> str | None:
    """The first parameter that is not bit for bit the same in all processes. Sharded networks have no copies.

    A parameter's hash is the sum of its bits taken as integers: one changed bit changes it.
    """
    named = [(n, p) for model in models if not is_sharded(model) for n, p in model.named_parameters()]
    if world.size == 1 or not named:
        return None
    sums = torch.stack([p.detach().view(torch.int32).sum(dtype=torch.int64) for _, p in named]).cpu()
    low, high = sums.clone(), sums
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    return next((named[i][0] for i in (low != high).nonzero().flatten().tolist()), None)
