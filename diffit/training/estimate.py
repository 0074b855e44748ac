"""What a run costs, counted from shapes alone: parameters, operations, memory. Nothing is computed on the way."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from diffit.config import Precision
from diffit.models.config import DiffiTConfig, NetworkConfig, build_model
from diffit.system.device import product_dtype, set_matmul_precision
from diffit.training.config import TrainConfig


@dataclass(frozen=True)
class Estimate:
    """Of a network, for one image in float32.

    Args:
        parameters: their number, the fixed position embedding included.
        flops: operations of a forward and backward pass; a multiplication and an addition are two.
        activations: bytes kept for the backward pass, at most: a fused attention keeps less.
    """

    parameters: int
    flops: int
    activations: int


@cache
def estimate(network: NetworkConfig) -> Estimate:
    """Count a network's work by running it on shapes without numbers."""
    with torch.device("meta"):
        model = build_model(network)
        x = torch.empty(1, network.in_channels, network.input_size, network.input_size)
        t, y = torch.empty(1), torch.zeros(1, dtype=torch.int64)
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    alive: list[Tensor] = []  # a freed storage's address would be used again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            alive.append(tensor)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, t, y)
    parameters = sum(p.numel() for p in model.parameters())
    flops = 3 * counter.get_total_flops()  # the backward pass computes two products for each one of the forward pass
    return Estimate(parameters, flops, sum(kept.values()))


def report(
    config: TrainConfig, class_names: tuple[str, ...] = (), ranks: int = 1, device: torch.device | None = None
) -> str:
    """Lines for --dry_run: what would be trained, in how much memory and, on a device, for how long."""
    network = config.checkpoint_config(class_names, "").network
    found = estimate(network)
    share = ranks if config.parallel == "fsdp" else 1
    # Weights, gradients, two moments of AdamW, and the EMAs, all float32.
    powers = len(config.ema_powers)
    fixed = 4 * found.parameters * (4 + len(config.ema_rates) + powers) / share
    at_once = config.batch_size / ranks / config.accumulate
    activations = found.activations * at_once / (2 if config.precision in ("bf16", "fp16") else 1)
    if config.activation_checkpointing:
        depth = network.depth if isinstance(network, DiffiTConfig) else 2 * sum(network.blocks)
        activations *= 2 / depth  # one block as a whole, and what enters each of the others
    lines = [
        f"parameters: {found.parameters:,}",
        f"steps: {config.steps:,} of {config.batch_size} images ({config.steps * config.batch_size:,} images), on "
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} with {at_once:g} images at once",
        f"operations: {found.flops / 1e9:,.1f} GFLOP per image, "
        f"{found.flops * config.batch_size * config.steps / 1e18:,.3g} EFLOP in all (forward and backward pass)",
        f"memory per rank, estimated: {fixed / 2**30:.2f} GiB of weights, gradients, moments and EMAs, and at "
        f"most {activations / 2**30:.2f} GiB of activations",
    ]
    if powers:
        count = powers * -(-config.steps // config.snapshot_every)
        gigabytes = count * 2 * found.parameters / 2**30
        lines.append(
            f"snapshots for tools/posthoc_ema.py: {count} files, {gigabytes:.2f} GiB on disk (--ema_snapshots)"
        )
    if device is not None:
        peak = measured_peak(device, config.precision)
        seconds = found.flops * config.batch_size * config.steps / ranks / peak
        lines.append(
            f"time on this machine: at least {in_words(seconds)}, at the {peak / 1e12:.3g} TFLOP/s that large matrix "
            "products reach here; small networks reach less"
        )
    return "\n".join(lines)


def in_words(seconds: float) -> str:
    """A duration: '40 s', '12 min', '3.5 h', '6 days'."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


@cache
def measured_peak(device: torch.device, precision: Precision) -> float:
    """Operations a second that a device reaches in large matrix products at a precision, which stays set."""
    set_matmul_precision(precision)
    on_gpu, repeats = device.type == "cuda", 20
    side = 8192 if on_gpu else 1024
    a, b = (torch.randn(side, side, device=device, dtype=product_dtype(precision)) for _ in range(2))
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return 2 * side**3 * repeats / seconds


def peak_memory(device: torch.device) -> int:
    """The most bytes this rank has held on its GPU, or, without one, in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # Windows has none

    used: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
