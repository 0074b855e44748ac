"""A run's checkpoints: folders named by their step, and what they hold.

ema.safetensors     the first EMA, which sample.py takes; ema_0.999.safetensors ... the others
state/              weights and optimizer, to which every rank adds its share (torch.distributed.checkpoint)
progress.json       counters, sums for the log, and the loss scale of fp16
complete.json       the marker: size and checksum of every other file

A checkpoint is written into NNNNNNNN.part; the marker is its last file, and the rename to NNNNNNNN makes it count.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import state_dict as state_dicts
from torch.distributed.checkpoint.filesystem import FileSystem

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import (
    EMA_FILE,
    MARKER,
    STATE_FILE,
    STATE_FOLDER,
    complete_checkpoints,
    find_checkpoint,
    integrity_error,
)
from diffit.checkpoint.weights import load_weights, plain_errors, save_checkpoint
from diffit.system import distributed
from diffit.system.console import say
from diffit.system.distributed import World
from diffit.system.files import as_tree, difference, write_atomically, write_failure
from diffit.training.config import TrainConfig
from diffit.training.parallel import find_desynced_parameter, is_sharded, whole_state
from diffit.training.step import TrainState

PROGRESS_FILE = "progress.json"


def ema_files(config: TrainConfig) -> list[str]:
    """The file of each EMA; the first is the one to sample from, those of power functions come last."""
    kind = "" if config.ema_half_life is None else "half_life_"
    rates = [f"ema_{kind}{rate:g}.safetensors" for rate in config.ema_rates[1:]]
    return [EMA_FILE, *rates, *(f"ema_power_{length}.safetensors" for length in config.ema_powers)]


def save_run(
    state: TrainState, folder: Path, config: TrainConfig, description: CheckpointConfig, world: World, must: bool
) -> str:
    """Write the checkpoint of this step into `folder`, then drop those that need not be kept.

    Returns a sentence if it could not be written and need not be, for the run goes on; else nothing.

    Raises:
        ValueError: if the ranks hold different weights, or it cannot be written and must be.
    """
    odd = find_desynced_parameter([state.model, *(ema.model for ema in state.emas.values())], world)
    if odd is not None:
        raise ValueError(
            f"the ranks hold different values of {odd} at step {state.step}: a device or the network between "
            "them is faulty; the same command goes on from the checkpoint before"
        )
    final = folder / f"{state.step:08d}"
    part = final.with_suffix(".part")
    try:
        distributed.on_main(world, partial(_begin, part))
        checksums = _write_state(state, part, description, world)
        distributed.on_main(world, partial(_finish, part, final, config, checksums))
    except (OSError, RuntimeError) as error:
        distributed.on_main(world, lambda: shutil.rmtree(part, ignore_errors=True))  # gives back its space
        failed = f"the checkpoint of step {state.step} could not be written ({write_failure(error)})"
        if must:
            raise ValueError(
                f"{failed}: fix that and give the same command, which goes on from the newest checkpoint"
            ) from error
        return f"{failed}; the run goes on"
    return ""


def load_run(
    state: TrainState, folder: Path, description: CheckpointConfig, device: torch.device, world: World
) -> None:
    """Go on from the newest checkpoint in `folder` that is whole, if there is one.

    Raises:
        ValueError: if it is one of another kind of run.
    """
    newest = distributed.on_main(world, partial(newest_intact, folder))
    if newest is None:
        return
    _, found = find_checkpoint(path=newest / EMA_FILE)
    other = difference(as_tree(found.network), as_tree(description.network))
    if other or type(found.network) is not type(description.network):
        raise ValueError(
            f"{folder.parent} holds a run of another network ({other or found.model}): choose another --run_dir"
        )
    if found.class_names != description.class_names:
        raise ValueError(
            f"{folder.parent} holds a run of other classes ({', '.join(found.class_names)}), the data now have "
            f"{', '.join(description.class_names)}: give the same images, or choose another --run_dir"
        )
    for name, ema in state.emas.items():
        weights: dict[str, Any] = distributed.on_all(world, partial(_averaged, newest / name, found, world))
        options = state_dicts.StateDictOptions(full_state_dict=True, broadcast_from_rank0=world.size > 1)
        state_dicts.set_model_state_dict(ema.model, weights, options=options)
    if (newest / STATE_FILE).exists():
        _load_single_file(state, newest, device)
    else:
        _load_state(state, newest / STATE_FOLDER, world)
    progress = json.loads((newest / PROGRESS_FILE).read_text())
    state.step, state.skipped = progress["step"], progress["skipped"]
    sums = torch.tensor(progress.get("sums", [[0.0] * 4]), device=device)  # [ranks, 4], of the ranks that wrote it
    state.sums = sums[world.rank] if len(sums) == world.size else sums.mean(0)
    state.summed, state.images = progress.get("summed", 0), progress.get("images", 0)
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(progress["scaler"])


def _write_state(state: TrainState, folder: Path, description: CheckpointConfig, world: World) -> dict[str, int]:
    """Write everything into an empty folder; an error of one rank is raised on all.

    Returns the CRC-32 of every file, of which none is read again.
    """
    checksums = {}
    for name, ema in state.emas.items():
        weights = whole_state(ema.model)
        checksums[name] = distributed.on_main(world, partial(save_checkpoint, folder / name, weights, description))
    tree = {"step": state.step, "skipped": state.skipped, "scaler": state.scaler.state_dict()}
    tree |= {"sums": distributed.gather(world, state.sums.tolist()), "summed": state.summed, "images": state.images}
    progress = json.dumps(tree).encode()
    distributed.on_main(world, partial(write_atomically, folder / PROGRESS_FILE, progress))
    checksums[PROGRESS_FILE] = zlib.crc32(progress)
    writer = dcp.FileSystemWriter(folder / STATE_FOLDER)
    writer.fs = files = _SummedFiles()
    with plain_errors():
        dcp.save(_tensors(state), storage_writer=writer, process_group=world.patient)
    for own in distributed.gather(world, files.checksums):
        checksums |= own
    return checksums


class _SummedFile(io.BufferedWriter):
    """A file to be written, and the CRC-32 of what was."""

    checksum = 0

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return super().write(data)


class _SummedFiles(FileSystem):
    """What torch.distributed.checkpoint writes by; `checksums` are those of the files of this rank."""

    def __init__(self) -> None:
        self.checksums: dict[str, int] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with _SummedFile(io.FileIO(path, mode)) as file:
            yield file
        self.checksums[f"{STATE_FOLDER}/{Path(path).name.removesuffix('.tmp')}"] = file.checksum  # .metadata is renamed


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Weights and AdamW's moments, those themselves, by names that do not depend on --parallel."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for kind, value in state.optimizer.state.get(parameter, {}).items():  # none before the first step
            tensors[f"optimizer.state.{name}.{kind}"] = value
    return tensors


def _averaged(path: Path, description: CheckpointConfig, world: World) -> dict[str, Tensor]:
    """An EMA's state dict, on rank 0 alone, which reads for all."""
    if not world.is_main:
        return {}
    if not path.exists():
        raise ValueError(
            f"{path.parent} has no {path.name}: go on with the EMAs that it was begun with (--ema_decay, "
            "--ema_half_life, --ema_power)"
        )
    return load_weights(path, description).state_dict()


def _load_state(state: TrainState, folder: Path, world: World) -> None:
    """Load weights and AdamW's moments: each rank reads its shards, or rank 0 all, where all ranks hold the same."""
    written = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, parameter in state.model.named_parameters():
        if f"optimizer.state.{name}.step" in written:  # a fresh AdamW has no moments yet
            step = torch.zeros((), device=parameter.device if state.optimizer.defaults["fused"] else "cpu")
            moments = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
            state.optimizer.state[parameter] = {"step": step, **moments}
    tensors = _tensors(state)

    def read(group: Any) -> None:
        with plain_errors():
            dcp.load(tensors, checkpoint_id=folder, process_group=group)

    if world.size == 1 or is_sharded(state.model):
        read(world.patient)
        return
    alone = dist.new_group([0], backend="gloo")
    distributed.on_main(world, lambda: read(alone))
    for tensor in tensors.values():
        dist.broadcast(tensor, src=0)


def _load_single_file(state: TrainState, checkpoint: Path, device: torch.device) -> None:
    """Load state.pt, which earlier versions wrote with --parallel ddp."""
    if is_sharded(state.model):
        raise ValueError(
            f"{checkpoint} was written by an earlier version with --parallel ddp: go on with ddp until the next "
            "checkpoint, which goes on with fsdp too"
        )
    whole = torch.load(checkpoint / STATE_FILE, map_location=device, weights_only=True)
    state.model.load_state_dict(whole["model"])
    settings = state.optimizer.state_dict()["param_groups"]  # those of this start
    state.optimizer.load_state_dict({"state": whole["optimizer"]["state"], "param_groups": settings})


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what the marker says; broken ones are named and put aside."""
    candidates = sorted((each for each in folder.glob("[0-9]*") if each.name.isdigit()), reverse=True)
    for number, newest in enumerate(candidates):
        wrong = integrity_error(newest)
        if wrong is None:
            return newest
        aside = newest.with_suffix(".broken")
        shutil.rmtree(aside, ignore_errors=True)
        newest.rename(aside)
        then = "the one before is used" if candidates[number + 1 :] else "there is none before it"
        say(f"checkpoint {newest} is broken ({wrong}): it is now {aside.name}, and {then}")
    return None


def _begin(part: Path) -> None:
    """Make an empty folder; what a killed run has left half done goes."""
    for left in part.parent.glob("*.part"):
        shutil.rmtree(left)
    part.mkdir(parents=True)


def _finish(part: Path, final: Path, config: TrainConfig, checksums: dict[str, int]) -> None:
    """Mark and rename what was written; then drop what need not be kept."""
    files = {name: [(part / name).stat().st_size, checksum] for name, checksum in checksums.items()}
    write_atomically(part / MARKER, json.dumps(files, indent=1).encode())
    _sync_folder(part)
    part.rename(final)
    _sync_folder(final.parent)
    for old in complete_checkpoints(final.parent)[: -config.keep]:
        if not config.keep_every or int(old.name) % config.keep_every:
            gone = old.with_suffix(".part")
            old.rename(gone)  # half a checkpoint never counts, not even one half removed
            shutil.rmtree(gone)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
