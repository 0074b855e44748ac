"""Samples of the EMA while training: a grid to look at, and FID against a reference that is loaded once.

Letters: B images, H x W x C of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import load_reference, score_images, share
from diffit.sampling.folder import save_grid
from diffit.sampling.images import ImageSampler
from diffit.training.config import TrainConfig

_IMAGES, _SEED = 16, 0


def save_preview(pictures: ImageSampler, path: Path | None) -> None:
    """A grid of samples, always from the same noise and labels, to `path`; None on a rank that only takes part."""
    num_classes, names = pictures.config.network.num_classes, pictures.config.class_names
    classes = [number % num_classes for number in range(_IMAGES)] if num_classes else []
    images = pictures.draw(range(_IMAGES), pictures.labels(range(_IMAGES), _SEED, classes), _SEED)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = [names[label] if label < len(names) else str(label) for label in classes or range(_IMAGES)]
    save_grid(path, list(images.cpu().numpy()), titles)


def create_scorer(pictures: ImageSampler, config: TrainConfig, device: torch.device) -> Callable[[], dict[str, float]]:
    """A function that gives the scores of samples, all but precision and recall; every rank calls it and gets them.

    The samples are those that sample.py would draw with seed 0 and the settings that the checkpoint recommends.

    Raises:
        ValueError, FileNotFoundError: in one sentence, if reference or features cannot be had.
    """
    settings = config.evaluation
    backend = create_backend("torch", features=settings.features, device=device)
    reference = load_reference(settings.reference or "", backend, manifold=False)
    own = range(*share(settings.samples))
    batches = [own[first : first + settings.batch_size] for first in range(0, len(own), settings.batch_size)]

    def score() -> dict[str, float]:
        labels = ((indices, pictures.labels(indices, _SEED)) for indices in batches)
        images = (pictures.draw(indices, y, _SEED).cpu().numpy() for indices, y in labels)
        return score_images(images, reference, backend, manifold=False).labelled()

    return score
