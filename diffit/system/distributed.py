"""Ranks: who am I, and what all must agree on. Works alone, under torchrun, and from Slurm's variables."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from diffit.system.ranks import World, detect_world

T = TypeVar("T")

# For rank 0 alone to download, encode or look at images, and for ranks that sample at their own pace, all wait long.
_PATIENCE = timedelta(days=7)


def start(device: torch.device, minutes: float = 10.0) -> World:
    """Join the other ranks, if there are any; give this one its GPU.

    Small messages (agreement, barriers) go over gloo and gradients of GPUs over NCCL. Collectives that all ranks reach
    at the same pace fail after these minutes; `barrier` and `on_main` wait for days.
    """
    world = detect_world()
    if device.type == "cuda":
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    if world.size == 1:
        return world
    if not dist.is_initialized():
        if "RANK" not in os.environ:  # tasks of Slurm meet on the first host of its list, 'gpu03' of 'gpu[03-07,9]'
            nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
            host = re.sub(r"^([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?.*$", lambda m: m[1] + (m[2] or ""), nodes)
            os.environ.setdefault("MASTER_ADDR", host)
            os.environ.setdefault("MASTER_PORT", str(29500 + int(os.environ.get("SLURM_JOB_ID", 0)) % 1000))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(minutes=minutes)
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=limit)
    return replace(world, patient=dist.new_group(backend="gloo", timeout=_PATIENCE))


@contextlib.contextmanager
def explained_timeout() -> Iterator[None]:
    """Around collectives of `start`'s patience: says in a sentence that another rank did not come."""
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's have no kind of their own for it
        if "timed out" not in str(error).lower():
            raise
        raise ValueError(
            "another rank did not come to the same step in time: see what it printed, or whether its machine hangs, "
            "and give --rank_timeout more minutes if it was only slow; the same command goes on from the newest "
            "checkpoint"
        ) from error


def stop() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(device: torch.device, minutes: float = 10.0) -> Iterator[World]:
    """`start` for a block, and `stop` at its end."""
    try:
        yield start(device, minutes)
    finally:
        stop()


def barrier(world: World) -> None:
    """Wait for all."""
    if world.size > 1:
        dist.all_reduce(torch.zeros(1), group=world.patient)  # on the CPU: waits without occupying a GPU


def on_main(world: World, function: Callable[[], T]) -> T:
    """Run a function on rank 0 alone; every rank gets its result, or raises its error."""
    if world.size == 1:
        return function()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if world.is_main:
        try:
            outcome = [(function(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0, group=world.patient)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def main_only(world: World, context: contextlib.AbstractContextManager[T]) -> Iterator[T]:
    """A block around which rank 0 alone enters a context; every rank gets its value, or raises its error of entering.

    Ranks leave the block each at its own time: what rank 0 alone holds must outlive the last use by others, as by a
    `barrier`.
    """
    with contextlib.ExitStack() as held:
        yield on_main(world, lambda: held.enter_context(context))


def main_first(world: World, function: Callable[[], T]) -> T:
    """Call a function on rank 0, then on the others, which find what it has downloaded; its error is everyone's."""
    made: list[T] = []
    on_main(world, lambda: made.append(function()))
    return made[0] if made else function()
