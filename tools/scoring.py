"""What the tools score samples by: Frechet distance to real images, and the share that shows the class asked for.

By default both are seen by the classifier of Fashion-MNIST; with a reference file of your own, by Inception.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffit import sample_images
from diffit.checkpoint.config import CheckpointConfig
from diffit.codec import VAECodec, create_codec
from diffit.data.datasets import fashion_mnist
from diffit.diffusion import create_process
from diffit.diffusion.noise import keyed_generator
from diffit.evaluation.fashion import FEATURES, bundled_reference
from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import collect, load_reference
from diffit.evaluation.statistics import frechet_distance
from diffit.system.console import progress
from diffit.system.device import to_device

HELD_OUT_IMAGES = 2000
_BATCH = 500
_HELD_OUT = 31  # its stream of random numbers


def open_scorer(
    device: torch.device, reference: str | None = None
) -> Callable[[NDArray[np.uint8], NDArray[np.int64]], dict[str, float]]:
    """A function from uint8 images [N, H, W, C], and the classes [N] that they were asked to show, to their scores.

    Scores are `samples` (N), `frechet` and, of the classifier of Fashion-MNIST, `accuracy` in 0..1. It compares with
    its training set; with a `reference` .npz, Inception compares with that.

    Raises:
        ValueError, FileNotFoundError: in one sentence, if reference or weights cannot be had.
    """
    backend = create_backend("torch", features=None if reference else FEATURES, device=device)
    real = load_reference(reference, backend, manifold=False) if reference else bundled_reference(backend)

    def score(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, float]:
        found = collect((images[i : i + _BATCH] for i in range(0, len(images), _BATCH)), backend)
        distance = frechet_distance(real.mean, real.covariance, found.moments.mean, found.moments.covariance())
        scores = {"samples": len(images), "frechet": float(distance)}
        if not reference:
            scores["accuracy"] = float((found.probabilities.argmax(1) == labels).mean())
        return scores

    return score


def draw(
    model: nn.Module, config: CheckpointConfig, count: int, batch_size: int, device: torch.device, title: str
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Samples of random classes from seed 0, with the settings of `config`: images [N, H, W, C], labels [N]."""
    with progress(title=title, total=count, unit="img", leave=False) as bar:
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
    for start in progress(range(0, HELD_OUT_IMAGES, _BATCH), "held-out loss", leave=False):
        part = slice(start, min(start + _BATCH, HELD_OUT_IMAGES))
        images, y = to_device(test.images[part], device), to_device(test.labels[part], device)
        generator = keyed_generator(0, start // _BATCH, _HELD_OUT)
        t = to_device(process.draw_t(generator, len(images)), device)
        shape = (len(images), config.network.in_channels, *(config.network.input_size,) * 2)
        noise, posterior = (to_device(generator.standard_normal(shape, np.float32), device) for _ in range(2))
        if isinstance(codec, VAECodec):
            x_start = codec.latents(codec.encode_moments(images), posterior)
        else:
            x_start = codec.encode(images)
        total += process.training_losses(lambda x, t, y=y: model(x, t, y), x_start, t, noise).loss.sum().item()
    return total / HELD_OUT_IMAGES
