"""A grid of samples from the averaged weights, always from the same noise and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from diffit.sampling.folder import save_grid
from diffit.training.samples import TrainingSampler

_IMAGES = 16


def save_preview(sampler: TrainingSampler, model: nn.Module, path: Path | None) -> None:
    """Sample from a network in eval mode; the picture goes to `path`, or nowhere (a rank that only takes part)."""
    num_classes, names = sampler.checkpoint.network.num_classes, sampler.checkpoint.class_names
    labels = [number % max(num_classes, 1) for number in range(_IMAGES)]
    images = sampler.draw(model, range(_IMAGES), labels if num_classes else ())
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = [names[label] if names else str(number) for number, label in enumerate(labels)]
    save_grid(path, images.cpu().numpy(), titles)


def read_picture(path: Path) -> np.ndarray:
    """A picture file as uint8 [H, W, C]."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
