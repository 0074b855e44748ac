"""What the tools score samples by: Frechet distance to real images, and the share that shows the class asked for.

By default both are seen by the classifier of Fashion-MNIST; with a reference file of your own, by Inception.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from fashion.judge import WEIGHTS, load_features  # the one place where the tools know the classifier
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from diffit import sample_images
from diffit.codec import VAECodec, create_codec
from diffit.data.datasets import fashion_mnist
from diffit.device import to_device
from diffit.diffusion import create_process
from diffit.diffusion.noise import keyed_generator
from diffit.evaluation.downloads import cache_folder
from diffit.evaluation.features import Backend, create_backend
from diffit.evaluation.scores import collect, load_reference
from diffit.evaluation.statistics import Floats, frechet_distance
from diffit.files import sha256, write_atomically
from diffit.sources import CheckpointConfig

HELD_OUT_IMAGES = 2000
_HELD_OUT = 31  # its stream of random numbers


@dataclass(frozen=True)
class Judge:
    """A classifier, and the moments of real images in its features: mean [D] and covariance [D, D].

    knows_classes: whether its classes are those that samples are asked for.
    """

    backend: Backend
    mean: Floats
    covariance: Floats
    knows_classes: bool

    def score(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> dict[str, float]:
        """Scores of uint8 images [N, H, W, C] that were asked to show these classes [N]."""
        found = collect(_batches(images), self.backend)
        distance = frechet_distance(self.mean, self.covariance, found.moments.mean, found.moments.covariance())
        scores = {"samples": len(images), "frechet": float(distance)}
        if self.knows_classes:
            scores["judged_right"] = float((found.probabilities.argmax(1) == labels).mean())
        return scores


def open_judge(device: torch.device, reference: str | None = None) -> Judge:
    """The classifier of Fashion-MNIST with its training set; with a reference .npz, Inception with that.

    Raises:
        ValueError, FileNotFoundError: in one sentence, if data, reference or weights cannot be had.
    """
    if reference is not None:
        inception = create_backend("torch", device=device)
        real = load_reference(reference, inception, manifold=False)
        return Judge(inception, real.mean, real.covariance, False)
    backend = Backend(f"fashion-{sha256(WEIGHTS)[:12]}", device, load_features(None, device))
    kept = cache_folder() / f"{backend.name}.npz"  # 60,000 images take a CPU minutes
    if not kept.is_file():
        images = fashion_mnist().images
        moments = collect(_batches(images), backend, len(images), "features of the training set").moments
        content = io.BytesIO()
        np.savez(content, mean=moments.mean, covariance=moments.covariance())
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, content.getvalue())
    with np.load(kept) as real:
        return Judge(backend, real["mean"], real["covariance"], True)


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
