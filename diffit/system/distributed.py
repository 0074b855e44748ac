"""Ranks: who am I, and what all must agree on. Works alone, under torchrun, and from Slurm's variables."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diffit.system.console import warn
from diffit.system.ranks import World, detect_world

T = TypeVar("T")

# Timeout of waits that may take hours: rank 0 downloads or encodes, or ranks sample at different speeds.
_PATIENCE = timedelta(days=7)
_GRACE = 10.0  # seconds from the end of rank 0 or the launcher to that of the other ranks


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
        _meeting_point()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(minutes=minutes)
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=limit)
    return replace(world, patient=_patient())


@functools.cache
def _patient() -> Any:
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def current() -> World:
    """This rank among those that have met; alone if none have. All ranks call it."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), patient=_patient())


@contextlib.contextmanager
def explained_timeout() -> Iterator[None]:
    """Turn the timeout of a collective, after the minutes that `start` was given, into a ValueError of one sentence."""
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
        _patient.cache_clear()


@contextlib.contextmanager
def joined(device: torch.device, minutes: float = 10.0) -> Iterator[World]:
    """`start` for a block, and `stop` at its end; within, the rank ends when rank 0 or its launcher is gone."""
    with watching(detect_world(), minutes):
        try:
            yield start(device, minutes)
        finally:
            stop()


def _meeting_point() -> tuple[str, int]:
    """Host and port of the store by which ranks find one another: torchrun's, else of rank 0."""
    if "RANK" not in os.environ:  # tasks of Slurm meet on the first host of its list, 'gpu03' of 'gpu[03-07,9]'
        nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
        host = re.sub(r"^([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?.*$", lambda m: m[1] + (m[2] or ""), nodes)
        os.environ.setdefault("MASTER_ADDR", host)
        os.environ.setdefault("MASTER_PORT", str(29500 + int(os.environ.get("SLURM_JOB_ID", 0)) % 1000))
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


@contextlib.contextmanager
def watching(world: World, minutes: float) -> Iterator[None]:
    """Around the work of a rank: its process ends when its launcher, or who holds the store, is gone.

    Ranks that sample or encode wait for nobody: they would go on for hours, in a folder that is another's by then.

    Raises:
        ValueError: if the store cannot be reached: its holder was gone before this rank had imported its libraries.
    """
    launched = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the store is torchrun's, from the beginning
    if world.size == 1 or (world.is_main and not launched):
        yield
        return
    parent, left, deadline = os.getppid(), threading.Event(), time.monotonic() + (_GRACE if launched else 60 * minutes)
    holder = None
    while holder is None:
        try:
            holder = socket.create_connection(_meeting_point(), timeout=_GRACE)
        except OSError as error:
            if time.monotonic() > deadline:
                raise ValueError("rank 0 or its launcher is gone: start the same command again") from error
            time.sleep(0.5)

    def watch() -> None:
        while not left.wait(1):
            gone = os.getppid() != parent or select.select([holder], [], [], 0)[0]  # closed at the other end
            if gone and not left.wait(_GRACE):  # at the end of the work, rank 0 may be the first to leave
                warn(f"rank {world.rank} ends, as rank 0 or its launcher is gone")
                os._exit(1)

    with holder:
        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            left.set()


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


def on_all(world: World, function: Callable[[], T]) -> T:
    """Run a function on every rank; what fails on one of them is raised on all, so that none waits for it."""
    if world.size == 1:
        return function()
    result: Any = None
    failure: Exception | None = None
    try:
        result = function()
    except Exception as error:
        failure = error
    for each in gather(world, failure):
        if each is not None:
            raise each
    return result


def gather(world: World, value: T) -> list[T]:
    """The values of all ranks, on each of them."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value, group=world.patient)
    return values


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
