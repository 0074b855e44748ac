"""Samples of the EMA while training: a grid to look at, and FID against a reference that is loaded once.

Letters: B images, H x W x C of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffit.diffusion.config import SAMPLERS, SamplingConfig
from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import load_reference, score_images, share
from diffit.sampling.folder import draw_grid, first_of_grid, save_png
from diffit.sampling.images import ImageSampler, fitting_sampler
from diffit.system.files import write_atomically
from diffit.training.config import TrainConfig

_IMAGES, _SEED, _STEPS = 16, 0, 10


class Previews:
    """Pictures of samples of the EMA, in a folder: always of the same noise and classes, by few sampling steps.

    NNNNNNNN.png is a grid of the samples at that step, latest.png the newest, and strip.png the first
    sample of up to 12 of them.

    Args:
        pictures: of the EMA, with the settings that the checkpoint recommends.
        folder: made if need be.
    """

    def __init__(self, pictures: ImageSampler, folder: Path) -> None:
        config, fewest = pictures.config, replace(pictures.config.sampling, num_sampling_steps=_STEPS)
        if "dpm++" in SAMPLERS[config.process]:  # of the Gaussian samplers one that needs few
            fewest = SamplingConfig(sampler="dpm++", num_sampling_steps=_STEPS)
        steps = config.sampling.num_sampling_steps
        if not isinstance(steps, int) or steps > _STEPS:
            config = replace(config, sampling=fewest)
        self.pictures, self.folder = replace(pictures, config=config, sampler=fitting_sampler(config)), folder

    def draw(self) -> list[NDArray[np.uint8]]:
        """The samples [H, W, C]."""
        labels = self.pictures.labels(range(_IMAGES), _SEED, self._classes())
        return list(self.pictures.draw(range(_IMAGES), labels, _SEED).cpu().numpy())

    def show(self, images: list[NDArray[np.uint8]], step: int) -> Path:
        """Write the grid of samples of a step, and renew latest.png and strip.png."""
        names, classes = self.pictures.config.class_names, self._classes()
        titles = [names[label] if label < len(names) else str(label) for label in classes or range(_IMAGES)]
        path = self.folder / f"{step:08d}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        save_png(path, draw_grid(images, titles))
        write_atomically(self.folder / "latest.png", path.read_bytes())
        self._save_strip()
        return path

    def _save_strip(self) -> None:
        paths = sorted(path for path in self.folder.glob("[0-9]*.png") if path.stem.isdigit())
        chosen = [paths[round(i)] for i in np.linspace(0, len(paths) - 1, min(len(paths), 12))]
        tiles = [first_of_grid(path, self.pictures.config.image_size) for path in chosen]
        strip = draw_grid(tiles, [f"step {int(path.stem)}" for path in chosen], columns=len(tiles))
        save_png(self.folder / "strip.png", strip)

    def _classes(self) -> list[int]:
        count = self.pictures.config.network.num_classes
        return [number % count for number in range(_IMAGES)] if count else []


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
