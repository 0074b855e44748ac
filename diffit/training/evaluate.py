"""Samples of the EMA while training: a grid to look at, and FID against a reference that is loaded once.

Letters: B images, H x W x C of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffit.checkpoint.config import CheckpointConfig
from diffit.codec import create_codec
from diffit.config import Precision
from diffit.diffusion import create_sampler
from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import load_reference, score_images, share
from diffit.sampling.folder import save_grid
from diffit.sampling.images import batch_labels, sample_batch
from diffit.system.device import autocast
from diffit.training.config import TrainConfig

_IMAGES, _SEED = 16, 0

Draw = Callable[[nn.Module, Sequence[int], Sequence[int]], Tensor]


def create_draw(config: CheckpointConfig, device: torch.device, precision: Precision) -> Draw:
    """A function (model, numbers, classes) -> the samples that sample.py would draw with seed 0: uint8 [B, H, W, C].

    It uses the settings that the checkpoint recommends. Classes are repeated in turn; without any they are drawn.

    Raises:
        ValueError: if the VAE or the sampler's settings do not fit.
    """
    sampler, codec = create_sampler(config.process_config, config.sampling), create_codec(config.codec, device)

    def draw(model: nn.Module, indices: Sequence[int], classes: Sequence[int] = ()) -> Tensor:
        labels = batch_labels(config, indices, _SEED, classes, device)
        return sample_batch(autocast(model, device, precision), config, sampler, codec, indices, labels, seed=_SEED)

    return draw


def save_preview(draw: Draw, model: nn.Module, config: CheckpointConfig, path: Path | None) -> None:
    """A grid of samples, always from the same noise and labels, to `path`; None on a rank that only takes part."""
    num_classes, names = config.network.num_classes, config.class_names
    labels = [number % num_classes for number in range(_IMAGES)] if num_classes else []
    images = draw(model, range(_IMAGES), labels)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = [names[label] if label < len(names) else str(label) for label in labels or range(_IMAGES)]
    save_grid(path, list(images.cpu().numpy()), titles)


def create_scorer(draw: Draw, config: TrainConfig, device: torch.device) -> Callable[[nn.Module], dict[str, float]]:
    """A function that gives the scores of a network, all but precision and recall; every rank calls it and gets them.

    Raises:
        ValueError, FileNotFoundError: in one sentence, if reference or features cannot be had.
    """
    settings = config.evaluation
    backend = create_backend("torch", features=settings.features, device=device)
    reference = load_reference(settings.reference or "", backend, manifold=False)
    own = range(*share(settings.samples))
    batches = [own[first : first + settings.batch_size] for first in range(0, len(own), settings.batch_size)]

    def score(model: nn.Module) -> dict[str, float]:
        images = (draw(model, indices, ()).cpu().numpy() for indices in batches)
        return score_images(images, reference, backend, manifold=False).labelled()

    return score
