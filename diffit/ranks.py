"""Which rank this is, from the variables of torchrun or Slurm. No tensor library is needed to read them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class World:
    """This rank among all: its number, their count, its number on this machine, and the group that waits long."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    patient: Any = None  # of `distributed.start`

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def _integers(*names: str) -> list[int] | None:
    """The values of environment variables, or None unless all are set."""
    values = [os.environ.get(name) for name in names]
    return None if any(value is None for value in values) else [int(value) for value in values if value is not None]


def detect_world() -> World:
    """Read torchrun's variables, else those of a Slurm task (srun), else be alone.

    An interactive Slurm shell also has variables of its job; SLURM_STEP_NUM_TASKS is set for tasks of srun alone.
    """
    launched = _integers("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if launched is None:
        launched = _integers("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return World(*launched[:3]) if launched else World()
