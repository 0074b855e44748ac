"""What all processes agree on in a step, without waiting for it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.distributed import World


class Flags:
    """Flags that are up in all processes if they are up in one: at once on the device, on the host when they are read.

    A host that reads them one step later never waits for what it has just queued.

    Args:
        flags: float, 0 or 1; `.here` are those of all processes, on the same device.
    """

    def __init__(self, flags: Tensor, world: World) -> None:
        if world.size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        self.here = flags
        self._copy = flags.to("cpu", non_blocking=flags.is_cuda)  # into pinned memory, where it does not wait
        self._arrived = torch.cuda.Event() if flags.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> list[bool]:
        """The flags; waits for what was queued before them, and for nothing after."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [flag > 0 for flag in self._copy.tolist()]
