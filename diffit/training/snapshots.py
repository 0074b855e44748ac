"""Snapshots of the EMAs of --ema_power, and EMAs of other lengths made of them when the training is over.

A snapshot is a checkpoint in fp16, named by its step, the images seen in steps that were taken, and its sigma_rel:
RUN_DIR/snapshots/00010000_2560000_0.05.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.weights import load_model, save_checkpoint
from diffit.system import distributed
from diffit.system.console import progress
from diffit.system.distributed import World
from diffit.training.config import TrainConfig
from diffit.training.ema import posthoc_coefficients
from diffit.training.parallel import whole_state
from diffit.training.step import TrainState

_LARGEST_ERROR = 0.01  # relative, of an EMA that is made of snapshots


class Snapshot(NamedTuple):
    """A file of RUN_DIR/snapshots; sigma_rel as it is written there."""

    step: int
    images: int
    sigma_rel: float
    path: Path


def find_snapshots(run_dir: Path) -> list[Snapshot]:
    """The snapshots of a run, those of earlier steps first."""
    files = [*(run_dir / "snapshots").glob("*.safetensors")]
    named = [(re.fullmatch(r"(\d+)_(\d+)_([\d.e-]+)", path.stem), path) for path in files]
    return sorted(Snapshot(int(m[1]), int(m[2]), float(m[3]), path) for m, path in named if m)


def save_snapshots(
    state: TrainState, run_dir: Path, config: TrainConfig, description: CheckpointConfig, world: World
) -> None:
    """Write a snapshot of each EMA of a power function. Raises OSError, in all ranks, if one cannot be written."""
    for length, ema in zip(config.ema_powers, [*state.emas.values()][len(config.ema_rates) :], strict=True):
        weights = {name: value.half() for name, value in whole_state(ema.model).items()}
        path = run_dir / "snapshots" / f"{state.step:08d}_{state.images}_{length}.safetensors"
        distributed.on_main(world, partial(save_checkpoint, path, weights, description))


def forget_later_snapshots(run_dir: Path, last_step: int) -> None:
    """Make the folder of snapshots; those after the step that a run goes on from, and what is half written, go."""
    (run_dir / "snapshots").mkdir(exist_ok=True)
    later = [snapshot.path for snapshot in find_snapshots(run_dir) if snapshot.step > last_step]
    for path in (*later, *(run_dir / "snapshots").glob("*.safetensors.*.part")):
        path.unlink()


def make_ema(run_dir: Path, lengths: Sequence[float], step: int | None = None) -> Iterator[tuple[Path, float]]:
    """Write EMAs of other lengths as checkpoints in RUN_DIR/posthoc, by the snapshots up to a step.

    Args:
        run_dir: of a run with snapshots.
        lengths: sigma_rel of each EMA, in (0, 0.28].
        step: that of a snapshot; the last one by default.

    Yields:
        The file of each EMA, and its relative error, estimated before anything is read.

    Raises:
        ValueError: if there is no such snapshot, an error is above 1%, or a file is damaged.
    """
    snapshots = find_snapshots(run_dir)
    if not snapshots:
        raise ValueError(f"{run_dir} has no snapshots: name a run that was trained with --ema_power 0.05 0.1")
    step = snapshots[-1].step if step is None else step
    used = [snapshot for snapshot in snapshots if snapshot.step <= step]
    if not used or used[-1].step != step:
        nearest = min((snapshot.step for snapshot in snapshots), key=lambda other: abs(other - step))
        raise ValueError(f"{run_dir} has no snapshot of step {step}: choose --step {nearest}, the nearest")
    known = [(snapshot.images, snapshot.sigma_rel) for snapshot in used]
    solved = {length: posthoc_coefficients(known, used[-1].images, length) for length in lengths}
    for length, (_, error) in solved.items():
        if error > _LARGEST_ERROR:
            raise ValueError(
                f"--sigma_rel {length} cannot be made of the {len(used)} snapshots up to step {step}: it would be off "
                f"by {error:.1%}, more than {_LARGEST_ERROR:.0%}; choose a length nearer to those of --ema_power, or "
                "train with more --ema_snapshots"
            )
    sums: dict[float, dict[str, Tensor]] = {length: {} for length in solved}
    for number, snapshot in enumerate(progress(used, "snapshots")):
        model, config = load_model(snapshot.path)
        for name, value in model.state_dict().items():
            for length, (coefficients, _) in solved.items():
                sums[length][name] = sums[length].get(name, 0) + float(coefficients[number]) * value
    for length, (_, error) in solved.items():
        path = run_dir / "posthoc" / f"{step:08d}_{length}.safetensors"
        path.parent.mkdir(exist_ok=True)
        made_by = f"{config.made_by}, EMA of sigma_rel {length} from {len(used)} snapshots"
        save_checkpoint(path, sums[length], replace(config, made_by=made_by))
        yield path, error
