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


def detect_world() -> World:
    """Read torchrun's variables, else those of a Slurm task (srun), else be alone.

    An interactive Slurm shell also has variables of its job; SLURM_STEP_NUM_TASKS is set for tasks of srun alone.
    """
    torchrun, slurm = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for names in (torchrun, slurm):
        if all(name in os.environ for name in names):
            return World(*(int(os.environ[name]) for name in names))
    return World()
