"""Small real runs: a tiny pixel network on files in Fashion-MNIST's own format."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffit.cli.train import parse_train
from diffit.data.loader import Batch
from diffit.training import loop
from diffit.training.config import TrainConfig
from diffit.training.loop import train
from diffit.training.step import TrainState
from tests.conftest import ROOT
from tests.small_models import write_fashion_files

NETWORK = (
    "{in_channels: 1, num_classes: 10, channels: [8, 8], blocks: [1, 1], head_dim: 4, cond_dim: 8, window_size: 2}"
)
TINY = [
    *["--model", "ImageDiffit-Tiny", "--network", NETWORK, "--process", "edm", "--device", "cpu"],
    *["--codec.vae", "pixels", "--codec.factor", "1", "--precision", "fp32", "--sampling.sampler", "heun"],
    *["--sampling.num_sampling_steps", "3", "--data.name", "fashion_mnist"],
    *["--batch_size", "8", "--steps", "6", "--save_every", "2", "--log_every", "1", "--optimizer.lr", "1e-3"],
    *["--data.workers", "0"],
]
TRAIN = [sys.executable, str(ROOT / "train.py")]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TIMING = ("images_per_s", "mfu", "peak_memory")


def tiny_flags(folder: Path) -> list[str]:
    write_fashion_files(folder / "fashion", count=70, stem="t10k")
    return [*TINY, "--data.path", str(write_fashion_files(folder / "fashion", count=32))]


def run(flags, run_dir, *more) -> Path:
    return train(parse_train([*flags, "--run_dir", str(run_dir), *more]))


@dataclass
class Begun(Exception):
    """What `train` hands to its first step, in place of taking it."""

    state: TrainState
    batch: Batch
    config: TrainConfig


def begun(flags, run_dir, *more) -> Begun:
    """A run up to its first step; one that has come to its end is to take one step more."""

    def give(state, batch, config, world, asked=()):
        raise Begun(state, batch, config)

    with replaced(loop, "train_step", give), pytest.raises(Begun) as raised:
        run(flags, run_dir, *more)
    return raised.value


@contextlib.contextmanager
def replaced(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextlib.contextmanager
def poisoned(steps):
    """Runs whose images are not numbers in some steps, counted from 0."""
    take = loop.train_step

    def poison(state, batch, *others):
        if state.step in steps:
            batch.x_start[:] = float("nan")
        return take(state, batch, *others)

    with replaced(loop, "train_step", poison):
        yield


@contextlib.contextmanager
def remembered():
    """What `everything` is after each step that runs take."""
    states, take = [], loop.train_step

    def remember(state, *others):
        result = take(state, *others)
        states.append(everything(state))
        return result

    with replaced(loop, "train_step", remember):
        yield states


def log_of(run_dir: Path) -> list[dict]:
    """The log without what a clock has measured."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def everything(state: TrainState) -> dict[str, bytes]:
    """The bits of all that a step changes: weights, EMAs, moments, AdamW's counters; those that are held here."""
    states = {"weights": state.model.state_dict()}
    states |= {name: ema.model.state_dict() for name, ema in state.emas.items()}
    for number, moments in enumerate(state.optimizer.state.values()):
        states |= {f"{key}/{number}": {"": value} for key, value in moments.items()}
    found = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
    held = {key: value.to_local() if hasattr(value, "to_local") else value for key, value in found.items()}
    return {key: value.numpy().tobytes() for key, value in held.items()}


def changed(one: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    """The kinds of values that differ."""
    assert one.keys() == other.keys()
    return {key.split("/")[0] for key in one if one[key] != other[key]}
