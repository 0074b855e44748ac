"""Where to compute, and in which precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffit.config import Precision
from diffit.system.files import first_line

# Words of PyTorch and the system in errors without a class of their own when memory has run out.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "ALLOC_FAILED", "out of memory")
_LOST_WORKER = "DataLoader worker (pid"


def resolve_device(name: str) -> torch.device:
    """The device that a name means; auto takes CUDA, else Apple's MPS, else the CPU.

    Raises:
        ValueError: if the machine does not have it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise ValueError(f"this machine has no {name} device that PyTorch can use: choose --device cpu")
    return torch.device(name)


def to_device(values: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Values on the CPU as a tensor on the device; pinned on the way, so that the copy does not wait for the device."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def set_matmul_precision(precision: Precision) -> None:
    """Let float32 products of matrices and convolutions use TF32 tensor cores, or not."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


def product_dtype(precision: Precision) -> torch.dtype:
    """What matrix products take in at this precision; TF32 takes float32."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def autocast(model: nn.Module, device: torch.device, precision: Precision) -> Any:
    """The model, called under autocast where the precision or its weights have 16 bits; float64 weights see float64."""
    weights = getattr(model, "dtype", next(model.parameters()).dtype)  # diffusers may store them in yet fewer bits
    dtype = product_dtype(precision) if weights == torch.float32 else weights
    if dtype == torch.float32:
        return model

    def call(x: Tensor, *inputs: Tensor, **conditions: Tensor) -> Tensor:
        if dtype == torch.float64:  # guidance and sampler stay in float32
            return model(x.to(dtype), *inputs, **conditions).float()
        with torch.autocast(device.type, dtype):
            return model(x, *inputs, **conditions)

    return call


@contextlib.contextmanager
def explained_memory(advice: str) -> Iterator[None]:
    """Turn an error of memory that has run out, of the GPU or the machine, into a ValueError that ends in advice."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        reason = first_line(error)
        if _LOST_WORKER in str(error):  # the kernel ends the largest process when memory runs out
            raise ValueError(
                f"a data worker was ended from outside, for want of memory if not by hand ({reason}): "
                f"{advice}, or take fewer --data.workers"
            ) from error
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in _NO_MEMORY):
            raise ValueError(f"memory has run out ({reason}): {advice}") from error
        raise
