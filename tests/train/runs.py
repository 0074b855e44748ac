"""Small real runs: a tiny pixel network on files in Fashion-MNIST's own format."""

import json
import sys
from pathlib import Path

import torch

from diffit.config.train import parse_train
from diffit.distributed import World
from diffit.training import Training, train
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


class Poisoned:
    """Batches of which some have images that are not numbers."""

    def __init__(self, batches, steps) -> None:
        self.batches, self.steps = batches, steps

    def __getitem__(self, step):
        batch = self.batches[step]
        if step in self.steps:
            batch.x_start[:] = float("nan")
        return batch
