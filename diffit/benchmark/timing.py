"""Timing ways against each other: in turns, in one process, medians."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Of one way: median seconds of a call, and, on CUDA, the bytes that it needs at most beside what there was."""

    seconds: float
    peak_memory: int | None


def interleaved(
    ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Call the ways in turn; the first calls of each, which compile and record CUDA graphs, are not counted.

    Args:
        rounds: counted calls of each way, at most.
        seconds: no further round starts once the counted ones took this long; there is always one.
    """
    # Of first calls: CUDA graphs allocate what they need once.
    memory = {name: _peak_memory(way, device) for name, way in ways.items()}
    for _ in range(2 if device.type == "cuda" else 0):
        for way in ways.values():
            way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    start = time.perf_counter()
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_seconds(way, device))
        if time.perf_counter() - start > seconds:
            break
    return {name: Timing(median(times[name]), memory[name]) for name in ways}


def synchronize(device: torch.device) -> None:
    """Wait for everything that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def _seconds(way: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    way()
    synchronize(device)
    return time.perf_counter() - start


def _peak_memory(way: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        way()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
