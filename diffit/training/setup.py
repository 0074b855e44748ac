"""What a run learns from: its data set, as batches of this rank."""

from __future__ import annotations

from pathlib import Path

import torch

from diffit.codec import create_codec
from diffit.data.batches import Batches
from diffit.data.datasets import fitting_labels
from diffit.data.order import Plan
from diffit.data.prepare import TrainingData, prepare_data
from diffit.diffusion import create_process
from diffit.distributed import World
from diffit.models.config import NetworkConfig, model_config
from diffit.training.config import TrainConfig


def load_data(config: TrainConfig, cache: Path, world: World, device: torch.device) -> TrainingData:
    """The data set as the network is to see it; a latent model's is encoded first, into the folder `cache`."""
    network = model_config(config.model, **config.network)
    codec = create_codec(config.codec, device)
    size = network.input_size * config.codec.factor
    return prepare_data(config.data, codec, size, network.in_channels, cache, world, device)


def create_batches(
    config: TrainConfig, network: NetworkConfig, data: TrainingData, world: World, device: torch.device
) -> Batches:
    """This process's part of every batch.

    Raises:
        ValueError: if a batch cannot be shared out, or the network does not take such images or labels.
    """
    plan = Plan(config.seed, len(data.labels), config.batch_size, share(config, world), data.flip)
    clean = data.clean(plan)
    expected = (network.in_channels, network.input_size, network.input_size)
    if clean.shape != expected:
        raise ValueError(
            f"the data are {'x'.join(map(str, clean.shape))} and {config.model} takes "
            f"{'x'.join(map(str, expected))}: set --network or --codec to fit"
        )
    labels = torch.from_numpy(fitting_labels(data.labels, network.num_classes)).to(device)
    return Batches(clean, labels, plan, create_process(config.process_config), network.class_dropout_prob)


def share(config: TrainConfig, world: World) -> slice:
    """Which images of a batch are this process's.

    Raises:
        ValueError: if the processes, or the parts that each computes it in, cannot have equal shares.
    """
    size, processes = config.batch_size, world.size
    if size % processes:
        raise ValueError(f"--batch_size {size} cannot be shared by {processes} processes: choose a multiple")
    if size % (processes * config.accumulate):
        raise ValueError(
            f"--batch_size {size} cannot be shared by {processes} processes in {config.accumulate} parts "
            "each: choose a multiple, or another --accumulate"
        )
    return slice(world.rank * size // processes, (world.rank + 1) * size // processes)
