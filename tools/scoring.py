"""What the tools score samples by: Frechet distance to real images, and the share that shows the class asked for.

By default both are seen by the classifier of Fashion-MNIST; with a reference file of your own, by Inception.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from diffit import sample_images
from diffit.codec import VAECodec, create_codec
from diffit.data.datasets import fashion_mnist
from diffit.device import to_device
from diffit.diffusion import create_process
from diffit.diffusion.noise import keyed_generator
from diffit.evaluation.fashion import FEATURES, bundled_reference
from diffit.evaluation.features import Backend, create_backend
from diffit.evaluation.scores import Reference, collect, load_reference
from diffit.evaluation.statistics import frechet_distance
from diffit.sources import CheckpointConfig

HELD_OUT_IMAGES = 2000
_HELD_OUT = 31  # its stream of random numbers


@dataclass(frozen=True)
class Scorer:
    """Features, the moments of real images in them, and whether their classes are those that samples are asked for."""

    backend: Backend
    reference: Reference
    knows_classes: bool

    def score(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, float]:
        """Scores of uint8 images [N, H, W, C] that were asked to show these classes [N]."""
        found, real = collect(_batches(images), self.backend), self.reference
        distance = frechet_distance(real.mean, real.covariance, found.moments.mean, found.moments.covariance())
        scores = {"samples": len(images), "frechet": float(distance)}
        if self.knows_classes:
            scores["accuracy"] = float((found.probabilities.argmax(1) == labels).mean())
        return scores


def open_scorer(device: torch.device, reference: str | None = None) -> Scorer:
    """The classifier of Fashion-MNIST with its training set; with a reference .npz, Inception with that.

    Raises:
        ValueError, FileNotFoundError: in one sentence, if reference or weights cannot be had.
    """
    if reference is not None:
        inception = create_backend("torch", device=device)
        return Scorer(inception, load_reference(reference, inception, manifold=False), False)
    backend = create_backend("torch", features=FEATURES, device=device)
    return Scorer(backend, bundled_reference(backend), True)


def _batches(images: NDArray[np.uint8], size: int = 500) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def draw(
    model: nn.Module, config: CheckpointConfig, count: int, batch_size: int, device: torch.device, title: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Samples of random classes from seed 0, with the settings of `config`: images [N, H, W, C], labels [N]."""
    with tqdm(total=count, desc=title, unit="img", leave=False) as bar:
        return sample_images(
            model,
            config,
            count,
            batch_size=batch_size,
            device=device,
            callback=lambda step, steps, x: bar.update(len(x) if step == steps else 0),
        )


@torch.no_grad()
def held_out_loss(model: nn.Module, config: CheckpointConfig, device: torch.device) -> float:
    """The training loss on images of Fashion-MNIST's test set; times and noise are the same for all networks."""
    process, codec = create_process(config.process_config), create_codec(config.codec, device)
    test, total = fashion_mnist(train=False), 0.0
    for number, start in enumerate(tqdm(range(0, HELD_OUT_IMAGES, 500), desc="held-out loss", leave=False)):
        images = to_device(test.images[start : start + 500], device)
        y = to_device(test.labels[start : start + 500], device)
        generator = keyed_generator(0, number, _HELD_OUT)
        t = to_device(process.draw_t(generator, len(images)), device)
        shape = (len(images), config.network.in_channels, *(config.network.input_size,) * 2)
        noise, posterior = (to_device(generator.standard_normal(shape, np.float32), device) for _ in range(2))
        if isinstance(codec, VAECodec):
            x_start = codec.latents(codec.encode_moments(images), posterior)
        else:
            x_start = codec.encode(images)
        losses = process.training_losses(lambda x, t, y=y: model(x, t, y), x_start, t, noise)
        total += losses.loss.sum().item()
    return total / HELD_OUT_IMAGES
