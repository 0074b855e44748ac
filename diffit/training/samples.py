"""Samples of a network in training, as sample.py would draw them with the settings that its checkpoint recommends.

Letters: B images, c channels and h = w side of what the network sees, H x W x C of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffit.checkpoint import CheckpointConfig
from diffit.codec import create_codec
from diffit.device import Precision, autocast
from diffit.diffusion import SampleNoise, create_sampler, guided_model

_SEED = 0


class TrainingSampler:
    """Draws numbered samples, always from the same noise.

    Args:
        checkpoint: what is being trained.
        device, precision: of sampling.
    """

    def __init__(self, checkpoint: CheckpointConfig, device: torch.device, precision: Precision) -> None:
        self.checkpoint, self.device, self.precision = checkpoint, device, precision
        self.process = checkpoint.edm if checkpoint.process == "edm" else checkpoint.diffusion
        self.sampler = create_sampler(self.process, checkpoint.sampling)
        self.codec = create_codec(checkpoint.codec, device)

    @torch.inference_mode()
    def draw(self, model: nn.Module, indices: Sequence[int], labels: Tensor | None = None) -> Tensor:
        """Samples of these numbers from a network in eval mode; labels: int64 [B], drawn at random by default.

        Returns uint8 [B, H, W, C], on the device.
        """
        network = self.checkpoint.network
        shape = (network.in_channels, network.input_size, network.input_size)
        noise = SampleNoise(_SEED, indices, shape, self.device)
        if labels is None:
            labels = noise.labels(max(network.num_classes, 1))
        call = autocast(model, self.device, self.precision)
        denoiser = guided_model(call, labels, network.num_classes, self.checkpoint.guidance, self.process, shape[-1])
        for state in self.sampler(denoiser, noise.start(), noise):
            x = state.x  # [B, c, h, w]
        return self.codec.decode(x.float())
