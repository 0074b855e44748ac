"""The network as the training loop calls it: recomputing, compiled, in parallel.

DDP keeps a whole copy of everything in each rank. FSDP2 (`fully_shard`) shares parameters, gradients, optimizer
state and EMAs out over the ranks, and gathers the parameters of one block at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from diffit.system.distributed import World
from diffit.training.config import TrainConfig


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network names: they are recomputed, and sharded, one at a time.

    Raises:
        ValueError: if it names none.
    """
    found: list[nn.Module] = getattr(model, "blocks_in_order", list)()
    if not found:
        raise ValueError(
            f"{type(model).__name__} names no blocks to recompute or to shard: give it a method blocks_in_order, or "
            "train it with --parallel ddp and without --activation_checkpointing"
        )
    return found


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Keep what enters each block only, and compute the rest again in the backward pass."""
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Share the parameters of a network out over all ranks, in place."""
    mesh = init_device_mesh(device.type, (world.size,))
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def parallelize(model: nn.Module, config: TrainConfig, device: torch.device, world: World) -> Any:
    """The network as the loss calls it: compiled if asked for, and in DDP unless it is sharded or alone."""
    forward: Any = torch.compile(model) if config.compile else model
    if world.size == 1 or config.parallel == "fsdp":
        return forward
    ids = [torch.cuda.current_device()] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(forward, device_ids=ids)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """A network's state dict; that of a sharded network is gathered, on rank 0 alone, and all ranks must call."""
    if not is_sharded(model):
        return model.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def find_desynced_parameter(models: list[nn.Module], world: World) -> str | None:
    """The first parameter that is not bit for bit the same in all ranks. Sharded networks have no copies.

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
