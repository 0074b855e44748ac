"""What a network must do at least, counted from shapes, and what the device can do at most, measured.

Letters: B images, N tokens, C channels, D = C/H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffit.benchmark.timing import interleaved
from diffit.models.config import NetworkConfig, build_model
from diffit.nn.attention import TMSA
from diffit.nn.fast import FastLinear


@dataclass(frozen=True)
class Work:
    """Of one forward pass.

    Args:
        flops: a multiplication and an addition are two.
        values: numbers read and written by the matrix products and the attention, weights included: what even perfect
            fusion of everything between them has to move.
    """

    flops: int
    values: int


@dataclass(frozen=True)
class Device:
    """What was measured: operations a second of large matrix products, bytes a second of large copies."""

    flops: float
    bandwidth: float


def count_work(network: NetworkConfig, batch: int) -> Work:
    """Count a forward pass of B images on shapes without numbers."""
    with torch.device("meta"):
        model = build_model(network).eval()
        x = torch.empty(batch, network.in_channels, network.input_size, network.input_size)
        inputs = x, torch.empty(batch), torch.zeros(batch, dtype=torch.int64)
    values = 0

    def count(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal values
        if isinstance(module, TMSA):  # queries, keys, values, what comes out, and the bias
            values += 4 * output.numel() + module.relative_position_bias_table.numel()
        else:
            values += arguments[0].numel() + output.numel() + sum(p.numel() for p in module.parameters())

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | TMSA):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return Work(counter.get_total_flops(), values)


def measure_device(device: torch.device, dtype: torch.dtype) -> Device:
    """Peak rates at this precision: of the best of some large square products, and of a large copy."""
    sides = (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048)
    ways: dict[str, Callable[[], object]] = {}
    for side in sides:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        ways[str(side)] = partial(torch.mm, a, b)
    source = torch.empty(1 << 26, dtype=torch.float32, device=device)  # 256 MiB, more than caches hold
    ways["copy"] = partial(torch.empty_like(source).copy_, source)
    times = interleaved(ways, device, 9, 20)
    flops = max(2 * side**3 / times[str(side)].seconds for side in sides)
    return Device(flops, 2 * 4 * source.numel() / times["copy"].seconds)


def products_alone(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """All matrix products of a forward pass and nothing else, with the network's own weights.

    Those of attention are two batched products of the same shapes.
    """
    calls: list[Callable[[], object]] = []
    operands: dict[Any, Tensor] = {}

    def operand(shape: tuple[int, ...], like: Tensor) -> Tensor:
        """One tensor serves all products of a shape: its numbers do not matter."""
        strides = like.stride() if like.shape == shape else None
        key = (shape, strides, like.dtype)
        if key not in operands:
            fresh = torch.randn_like(like) if strides else like.new_empty(shape).normal_()
            operands[key] = fresh
        return operands[key]

    def record(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        x = arguments[0]
        if isinstance(module, nn.Linear | nn.Conv2d):
            calls.append(partial(module.forward, operand(x.shape, x)))
            return
        if isinstance(module, FastLinear):
            calls.append(partial(F.linear, operand(x.shape, x.to(module.dtype)), module.weight, module.bias))
            return
        B, W, N, C = x.shape
        H = cast(int, module.num_heads)
        q, weights = operand((B * W * H, N, C // H), output), operand((B * W * H, N, N), output)
        calls.extend([partial(torch.bmm, q, q.transpose(1, 2)), partial(torch.bmm, weights, q)])

    hooks = [
        module.register_forward_hook(record)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | FastLinear) or hasattr(module, "num_heads")
    ]
    model(*inputs)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for call in calls:
            call()

    return run
