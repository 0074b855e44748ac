"""The ways to sample: the plain path, each switch alone, and all together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from diffit.benchmark.cases import Case
from diffit.benchmark.plain import twin, with_plain_attention
from diffit.device import Precision, autocast, product_dtype
from diffit.diffusion.config import GuidanceConfig
from diffit.diffusion.states import Sampler
from diffit.fast import SKIP_BELOW, compiles, fast_network, fast_precision
from diffit.models.fast import fix_weights, tabulate_conditions
from diffit.nn.fast import KERNELS


@dataclass(frozen=True)
class Way:
    """One way to compute: how the network is made, and how it is guided."""

    network: Any
    guidance: GuidanceConfig
    precision: Precision


def ways_to_sample(case: Case, model: Any, sampler: Sampler, device: torch.device, compiled: bool) -> dict[str, Way]:
    """The plain path, the default one, each switch alone on top of that, and all together."""
    exact: Precision = "tf32" if device.type == "cuda" else "fp32"
    low = fast_precision(device)
    dtype = product_dtype(low)
    both, skipping = case.guidance, replace(case.guidance, skip_below=SKIP_BELOW)
    times = sampler.times

    def way(network: Any, precision: Precision = exact, guidance: GuidanceConfig = both) -> Way:
        return Way(network, guidance, precision)

    ways = {
        "plain": way(with_plain_attention(twin(model))),
        "default (fused attention)": way(twin(model)),
        "+ weights fixed, attention fused": way(fix_weights(twin(model), kernel="fused")),
        "+ weights fixed, attention matmul": way(fix_weights(twin(model), kernel="matmul")),
        "+ conditions tabulated": way(tabulate_conditions(twin(model), times)),
    }
    if case.is_image:
        ways["+ channels-last weights"] = way(twin(model).to(memory_format=torch.channels_last))
    if low != "fp32":
        ways[f"+ {low} autocast"] = way(autocast(twin(model), device, low), low)
        for kernel in ("fused", "matmul"):
            ways[f"+ {low} weights, attention {kernel}"] = way(fix_weights(twin(model), dtype, kernel), low)
    if case.skips:
        ways["+ guidance skipped"] = way(twin(model), exact, skipping)
    if compiled or compiles(device):
        ways["+ compiled"] = way(torch.compile(twin(model), dynamic=False))
        for kernel in KERNELS:
            fixed = torch.compile(fix_weights(twin(model), dtype, kernel), dynamic=False)
            ways[f"+ {low} weights, compiled, attention {kernel}"] = way(fixed, low)
    if compiles(device):
        ways["+ CUDA graphs"] = way(torch.compile(twin(model), mode="reduce-overhead", dynamic=False))
    fast = fast_network(twin(model), times, low, device)
    if case.skips:
        ways["--fast True, both halves everywhere"] = way(fast, low)
    ways["--fast True"] = way(fast, low, skipping if case.skips else both)
    return ways
