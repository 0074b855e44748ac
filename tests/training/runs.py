"""Small real runs: a tiny pixel network on files in Fashion-MNIST's own format."""

import json
import sys
from pathlib import Path

import torch

from diffit.cli.train import parse_train
from diffit.distributed import World
from diffit.training.loop import Training, train
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
]
TRAIN = [sys.executable, str(ROOT / "train.py")]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TIMING = ("images_per_s", "mfu", "peak_memory")


def tiny_flags(folder: Path) -> list[str]:
    return [*TINY, "--data.path", str(write_fashion_files(folder / "fashion", count=32))]


def run(flags, run_dir, *more) -> Path:
    return train(parse_train([*flags, "--run_dir", str(run_dir), *more]))


def training(flags, run_dir, *more) -> Training:
    """A run that has not begun."""
    return Training(parse_train([*flags, "--run_dir", str(run_dir), *more]), torch.device("cpu"), World())


def log_of(run_dir: Path) -> list[dict]:
    """The log without what a clock has measured."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def everything(trained: Training) -> dict[str, bytes]:
    """The bits of all that a step changes: weights, averages, moments, AdamW's counters; those that are held here."""
    states = {"weights": trained.model.state_dict()}
    states |= {name: ema.model.state_dict() for name, ema in trained.averages.items()}
    optimizer = trained.stepper.optimizer
    for number, parameter in enumerate(trained.stepper.trained):
        states |= {f"{key}/{number}": {"": value} for key, value in optimizer.state[parameter].items()}
    found = {f"{name}/{key}": value for name, state in states.items() for key, value in state.items()}
    held = {key: value.to_local() if hasattr(value, "to_local") else value for key, value in found.items()}
    return {key: value.numpy().tobytes() for key, value in held.items()}


def remembered(trained: Training) -> list[dict[str, bytes]]:
    """What `everything` is after each step that the run will take."""
    states, take = [], trained.stepper.take

    def remember(batch, step, asked):
        take(batch, step, asked)
        trained.stepper.settle()  # the averages follow once the host has learnt what became of the step
        states.append(everything(trained))

    trained.stepper.take = remember
    return states


def changed(one: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    """The kinds of values that differ."""
    assert one.keys() == other.keys()
    return {key.split("/")[0] for key in one if one[key] != other[key]}


class Poisoned:
    """Batches of which some have images that are not numbers."""

    def __init__(self, batches, steps) -> None:
        self.batches, self.steps = batches, steps

    def __getitem__(self, step):
        batch = self.batches[step]
        if step in self.steps:
            batch.x_start[:] = float("nan")
        return batch
