"""A grid of samples from the averaged weights, always from the same noise and labels.

Letters: B images, c channels and h = w side of what the network sees.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffit.checkpoint import CheckpointConfig
from diffit.codec import create_codec
from diffit.device import Precision, autocast
from diffit.diffusion import SampleNoise, create_sampler, guided_model
from diffit.output import save_grid

_IMAGES = 16
_SEED = 0


class Preview:
    """Samples as sample.py would with the settings that the checkpoint recommends.

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
    def save(self, model: nn.Module, path: Path | None) -> None:
        """Sample from a network in eval mode; the picture goes to `path`, or nowhere (a rank that only takes part)."""
        network = self.checkpoint.network
        shape = (network.in_channels, network.input_size, network.input_size)
        noise = SampleNoise(_SEED, range(_IMAGES), shape, self.device)
        labels = torch.arange(_IMAGES, device=self.device) % max(network.num_classes, 1)  # [B]
        call = autocast(model, self.device, self.precision)
        denoiser = guided_model(call, labels, network.num_classes, self.checkpoint.guidance, self.process, shape[-1])
        for state in self.sampler(denoiser, noise.start(), noise):
            x = state.x  # [B, c, h, w]
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(path, self.codec.decode(x.float()).cpu().numpy(), self._titles(labels.tolist()))

    def _titles(self, labels: list[int]) -> list[str]:
        names = self.checkpoint.class_names
        return [names[label] if names else str(number) for number, label in enumerate(labels)]


def read_picture(path: Path) -> np.ndarray:
    """A picture file as uint8 [H, W, C]."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
