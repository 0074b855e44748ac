"""What `--fast True` stands for on a device: precision, prepared network, compilation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffit.device import Precision, product_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and Arm processors that multiply bf16


def fast_precision(device: torch.device) -> Precision:
    """The 16 bits that the device computes with at full speed, else fp32."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _processor_flags() & _BF16_FLAGS:
        return "bf16"
    return "fp32"


def _processor_flags() -> set[str]:
    """What Linux says of the first processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((set(line.split()) for line in lines if line.lower().startswith(("flags", "features"))), set())


def compiles(device: torch.device) -> bool:
    """Whether compilation can be had and pays for itself: on CUDA; on a CPU it takes longer than most runs."""
    if device.type != "cuda":
        return False
    from torch.utils._triton import has_triton

    return has_triton()  # not on Windows or old GPUs


def fast_network(model: Any, precision: Precision, device: torch.device) -> nn.Module:
    """The network as sampling calls it, prepared in place and, on CUDA, compiled to CUDA graphs: one a shape."""
    import torch

    from diffit.models.fast import fix_weights

    prepared = fix_weights(model, product_dtype(precision))
    if not compiles(device):
        return prepared
    return torch.compile(prepared, mode="reduce-overhead", dynamic=False)  # type: ignore[return-value]
