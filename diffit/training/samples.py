"""Samples of a network in training: those that sample.py draws with the settings that its checkpoint recommends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffit.checkpoint import CheckpointConfig
from diffit.codec import create_codec
from diffit.device import Precision, autocast
from diffit.diffusion import create_sampler
from diffit.sampling.images import batch_labels, sample_batch


class TrainingSampler:
    """Draws numbered samples, always from the same noise.

    Args:
        checkpoint: what is being trained.
        device, precision: of sampling.
    """

    def __init__(self, checkpoint: CheckpointConfig, device: torch.device, precision: Precision) -> None:
        self.checkpoint, self.device, self.precision = checkpoint, device, precision
        self.sampler = create_sampler(checkpoint.process_config, checkpoint.sampling)
        self.codec = create_codec(checkpoint.codec, device)

    def draw(self, model: nn.Module, indices: Sequence[int], wanted: Sequence[int] = ()) -> Tensor:
        """Samples of these numbers from a network in eval mode: uint8 [B, H, W, C], on the device.

        wanted: classes, repeated in turn; drawn at random by default.
        """
        labels = batch_labels(self.checkpoint, indices, 0, wanted, self.device)
        network = autocast(model, self.device, self.precision)
        return sample_batch(network, self.checkpoint, self.sampler, self.codec, indices, labels)
