"""Where the time of a call goes, by operator; on CUDA, by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from diffit.benchmark.timing import synchronize

_CALLS, _SHOWN = 3, 8


def shares(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The largest shares of the time of a call that has been called before, and `the rest`; they add up to 1.

    Time counts where it is spent, not in what called it.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        for _ in range(_CALLS):
            call()
        synchronize(device)
    times = {event.key.removeprefix("aten::"): _own_time(event, device) for event in profiled.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=times.__getitem__, reverse=True)[:_SHOWN]
    found = {name: times[name] / total for name in largest}
    return found | {"the rest": 1 - sum(found.values())}


def _own_time(event: Any, device: torch.device) -> float:
    return event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
