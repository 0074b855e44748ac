"""What a checkpoint of a run holds, and how it is written and read.

ema.safetensors     the first average, which sample.py takes; ema_0.999.safetensors ... the others
state.pt            weights and optimizer; with FSDP the folder state/, to which every process adds its shards
progress.json       counters, and the loss scale of fp16
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffit import distributed
from diffit.checkpoint import CheckpointConfig, load_weights, save_checkpoint
from diffit.distributed import World
from diffit.training.ema import EMA
from diffit.training.parallel import is_sharded, whole_state

EMA_FILE, STATE_FILE, STATE_FOLDER, PROGRESS_FILE = "ema.safetensors", "state.pt", "state", "progress.json"


def ema_files(decays: Sequence[float], half_life: bool) -> list[str]:
    """The file of each average; the first is the one to sample from."""
    kind = "half_life_" if half_life else ""
    return [EMA_FILE, *(f"ema_{kind}{decay:g}.safetensors" for decay in decays[1:])]


class RunState:
    """Network, averages and optimizer of a run, to and from a folder.

    Args:
        averages: by file name.
        world: the processes; all of them must call `save` and `load`.
    """

    def __init__(
        self, model: nn.Module, averages: dict[str, EMA], optimizer: torch.optim.Optimizer, world: World
    ) -> None:
        self.model, self.averages, self.optimizer, self.world = model, averages, optimizer, world

    def save(self, folder: Path, description: CheckpointConfig, progress: dict[str, Any]) -> None:
        """Write everything into an empty folder.

        Raises:
            OSError, RuntimeError: on every rank, if any rank cannot write.
        """
        for name, ema in self.averages.items():
            weights = whole_state(ema.model)
            distributed.on_main(self.world, partial(save_checkpoint, folder / name, weights, description))
        text = json.dumps(progress)
        distributed.on_main(self.world, lambda: (folder / PROGRESS_FILE).write_text(text))
        if is_sharded(self.model):
            import torch.distributed.checkpoint as dcp

            dcp.save(self._shards(), checkpoint_id=folder / STATE_FOLDER)
        else:
            distributed.on_main(self.world, lambda: self._save_whole(folder / STATE_FILE))

    def _save_whole(self, path: Path) -> None:
        with open(path, "wb") as file:
            torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file)

    def load(self, folder: Path, description: CheckpointConfig, device: torch.device) -> dict[str, Any]:
        """Take everything from a folder; returns the progress.

        Raises:
            ValueError: if the folder holds another kind of run.
        """
        there = (folder / STATE_FOLDER).exists()
        if there != is_sharded(self.model):
            kinds = ("fsdp", "ddp") if there else ("ddp", "fsdp")
            raise ValueError(f"{folder} was written with --parallel {kinds[0]}: go on with it, not with {kinds[1]}")
        for name, ema in self.averages.items():
            if not (folder / name).exists():
                raise ValueError(
                    f"{folder} has no {name}: go on with the averages (--ema_decay) that it was begun with"
                )
            self._load_average(ema.model, load_weights(folder / name, description))
        if there:
            self._load_shards(folder / STATE_FOLDER)
        else:
            state = torch.load(folder / STATE_FILE, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            for group in state["optimizer"]["param_groups"]:  # it may have been written on another kind of device
                group["fused"] = self.optimizer.defaults["fused"]
            self.optimizer.load_state_dict(state["optimizer"])
        return json.loads((folder / PROGRESS_FILE).read_text())

    def _load_average(self, average: nn.Module, source: nn.Module) -> None:
        if not is_sharded(average):
            average.load_state_dict(source.state_dict())
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(average, source.state_dict(), options=StateDictOptions(full_state_dict=True))

    def _shards(self) -> dict[str, Any]:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _load_shards(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        state = self._shards()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
