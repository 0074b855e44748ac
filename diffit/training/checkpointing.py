"""A run's checkpoints: folders named by their step, and what they hold; the settings of every start are beside them.

ema.safetensors     the first EMA, which sample.py takes; ema_0.999.safetensors ... the others
state.pt            weights and optimizer; with FSDP the folder state/, to which every rank adds its shards
progress.json       counters, and the loss scale of fp16
complete.json       the marker: size and checksum of every other file

A checkpoint is written into NNNNNNNN.part; the marker is its last file, and the rename to NNNNNNNN makes it count.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint import state_dict as state_dicts

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.folder import (
    EMA_FILE,
    MARKER,
    STATE_FILE,
    STATE_FOLDER,
    checksum,
    complete_checkpoints,
    integrity_error,
)
from diffit.checkpoint.resolve import find_checkpoint
from diffit.checkpoint.weights import load_weights, save_checkpoint
from diffit.settings import FREE, SAME, settings_that
from diffit.system import distributed
from diffit.system.distributed import World
from diffit.system.files import as_tree, difference, first_line, write_atomically
from diffit.training.config import TrainConfig
from diffit.training.parallel import find_desynced_parameter, is_sharded, whole_state
from diffit.training.step import TrainState

PROGRESS_FILE = "progress.json"


def ema_files(config: TrainConfig) -> list[str]:
    """The file of each EMA; the first is the one to sample from."""
    kind = "" if config.ema_half_life is None else "half_life_"
    return [EMA_FILE, *(f"ema_{kind}{rate:g}.safetensors" for rate in config.ema_rates[1:])]


def save_run(
    state: TrainState, folder: Path, config: TrainConfig, description: CheckpointConfig, world: World, must: bool
) -> str | None:
    """Write the checkpoint of this step into `folder`, then drop those that need not be kept.

    Returns a sentence if it could not be written and need not be: the run goes on.

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
        _write_state(state, part, description, world)
        distributed.on_main(world, partial(_finish, part, final, config))
    except (OSError, RuntimeError) as error:
        distributed.on_main(world, lambda: shutil.rmtree(part, ignore_errors=True))  # gives back its space
        failed = f"the checkpoint of step {state.step} could not be written ({write_failure(error)})"
        if must:
            raise ValueError(
                f"{failed}: mend that and give the same command, which goes on from the newest checkpoint"
            ) from error
        return f"{failed}; the run goes on"
    return None


def write_failure(error: BaseException) -> str:
    """Why a file could not be written: torch.save hides the system's error behind one of its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return first_line(error)
    return "the disk is full" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else cause.strerror or first_line(cause)


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
    if found.network != description.network:
        raise ValueError(f"{folder.parent} holds a run of another network ({found.network}): choose another --run_dir")
    if found.class_names != description.class_names:
        raise ValueError(
            f"{folder.parent} holds a run of other classes ({', '.join(found.class_names)}), the data now have "
            f"{', '.join(description.class_names)}: give the same images, or choose another --run_dir"
        )
    sharded = (newest / STATE_FOLDER).exists()
    if sharded != is_sharded(state.model):
        kinds = ("fsdp", "ddp") if sharded else ("ddp", "fsdp")
        raise ValueError(f"{newest} was written with --parallel {kinds[0]}: go on with it, not with {kinds[1]}")
    for name, ema in state.emas.items():
        if not (newest / name).exists():
            raise ValueError(f"{newest} has no {name}: go on with the EMAs (--ema_decay) that it was begun with")
        weights = load_weights(newest / name, found).state_dict()
        if sharded:
            options = state_dicts.StateDictOptions(full_state_dict=True)
            state_dicts.set_model_state_dict(ema.model, weights, options=options)
        else:
            ema.model.load_state_dict(weights)
    if sharded:
        shards = _shards(state)
        dcp.load(shards, checkpoint_id=newest / STATE_FOLDER)
        state_dicts.set_state_dict(
            state.model, state.optimizer, model_state_dict=shards["model"], optim_state_dict=shards["optimizer"]
        )
    else:
        whole = torch.load(newest / STATE_FILE, map_location=device, weights_only=True)
        state.model.load_state_dict(whole["model"])
        for group in whole["optimizer"]["param_groups"]:  # it may have been written on another kind of device
            group["fused"] = state.optimizer.defaults["fused"]
        state.optimizer.load_state_dict(whole["optimizer"])
    progress = json.loads((newest / PROGRESS_FILE).read_text())
    state.step, state.skipped = progress["step"], progress["skipped"]
    if state.scaler.is_enabled():
        state.scaler.load_state_dict(progress["scaler"])


def _write_state(state: TrainState, folder: Path, description: CheckpointConfig, world: World) -> None:
    """Write everything into an empty folder; an error of one rank is raised on all."""
    for name, ema in state.emas.items():
        weights = whole_state(ema.model)
        distributed.on_main(world, partial(save_checkpoint, folder / name, weights, description))
    progress = {"step": state.step, "skipped": state.skipped, "scaler": state.scaler.state_dict()}
    distributed.on_main(world, lambda: (folder / PROGRESS_FILE).write_text(json.dumps(progress)))
    if is_sharded(state.model):
        try:
            dcp.save(_shards(state), checkpoint_id=folder / STATE_FOLDER)
        except dcp.api.CheckpointException as error:  # of all ranks; it is no Exception
            raise next(iter(error.failures.values()))[0] from error
    else:
        distributed.on_main(world, lambda: _save_whole(state, folder / STATE_FILE))


def _save_whole(state: TrainState, path: Path) -> None:
    with open(path, "wb") as file:
        torch.save({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}, file)


def _shards(state: TrainState) -> dict[str, Any]:
    model, optimizer = state_dicts.get_state_dict(state.model, state.optimizer)
    return {"model": model, "optimizer": optimizer}


def record_start(run_dir: Path, config: TrainConfig, step: int) -> str:
    """Write config.yaml, and add the settings to starts.jsonl; returns what changed since the last start, if anything.

    Raises:
        ValueError: if a run that has taken steps cannot go on with these settings.
    """
    path, settings = run_dir / "starts.jsonl", as_tree(config)
    starts = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    before = starts[-1]["settings"] if starts and step else settings
    fixed = settings_that(SAME, TrainConfig)
    lost = difference({key: before[key] for key in fixed}, {key: settings[key] for key in fixed})
    if lost:
        raise ValueError(f"{run_dir} holds a run of other settings ({lost}): choose another --run_dir")
    changed = difference(before, settings, settings_that(FREE, TrainConfig))
    lines = [json.dumps(line) for line in (*starts, {"step": step, "changed": changed, "settings": settings})]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
    write_atomically(run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
    return changed


def newest_intact(folder: Path) -> Path | None:
    """The newest checkpoint whose files are what the marker says; broken ones are named and put aside."""
    for found in sorted((f for f in folder.glob("[0-9]*") if f.name.isdigit()), reverse=True):
        wrong = integrity_error(found)
        if wrong is None:
            return found
        aside = found.with_suffix(".broken")
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
        print(f"checkpoint {found} is broken ({wrong}): it is now {aside.name}, and the one before is used")
    return None


def _begin(part: Path) -> None:
    """Make an empty folder; what a killed run has left half done goes."""
    for left in part.parent.glob("*.part"):
        shutil.rmtree(left)
    part.mkdir(parents=True)


def _finish(part: Path, final: Path, config: TrainConfig) -> None:
    """Sync, mark and rename what was begun; then drop what need not be kept."""
    write_atomically(part / MARKER, json.dumps(_checksums(part), indent=1).encode())
    _sync_folder(part)
    part.rename(final)
    _sync_folder(final.parent)
    for old in complete_checkpoints(final.parent)[: -config.keep]:
        if not config.keep_every or int(old.name) % config.keep_every:
            gone = old.with_suffix(".part")
            old.rename(gone)  # half a checkpoint never counts, not even one half removed
            shutil.rmtree(gone)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file but the marker, each synced to disk."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        found[path.relative_to(folder).as_posix()] = [path.stat().st_size, checksum(path)]
    return found


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
