"""What a run starts from: its data set, as batches of this process, and its network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from diffit.checkpoint import find_checkpoint, load_weights
from diffit.codec import create_codec
from diffit.data.batches import Batches
from diffit.data.datasets import fitting_labels
from diffit.data.order import Plan
from diffit.data.prepare import TrainingData, prepare_data
from diffit.diffusion import create_process
from diffit.distributed import World
from diffit.models.config import NetworkConfig, build_model, model_config
from diffit.training.adapt import adapt_state
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


def initial_model(config: TrainConfig, network: NetworkConfig, say: Callable[[str], None]) -> nn.Module:
    """A fresh network, or the one that --init_from names; `say` is told in what it had to be changed."""
    if config.init_from is None:
        return build_model(network)
    source, found = find_checkpoint(path=config.init_from)
    trained = load_weights(source.fetch(), found)
    model = build_model(network)
    weights, changes = adapt_state(trained.state_dict(), model.state_dict())
    model.load_state_dict(weights)
    for change in changes:
        say(f"--init_from {source}: {change}")
    return model
