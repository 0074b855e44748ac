"""Samples of the EMA while training: a grid to look at, and FID against a reference that is loaded once.

Letters: B images, H x W x C of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffit.checkpoint import CheckpointConfig
from diffit.codec import create_codec
from diffit.device import Precision, autocast
from diffit.diffusion import SampleNoise, create_sampler, guided_model
from diffit.evaluation.backends import create_backend
from diffit.evaluation.scores import load_reference, score_images, share
from diffit.sampling.folder import save_grid
from diffit.training.config import TrainConfig

_IMAGES, _SEED = 16, 0
_codec = lru_cache(maxsize=1)(create_codec)  # a VAE is loaded once, not for every batch


@torch.inference_mode()
def draw_samples(
    model: nn.Module,
    config: CheckpointConfig,
    indices: Sequence[int],
    labels: Tensor | None,
    device: torch.device,
    precision: Precision,
) -> Tensor:
    """The samples that sample.py would draw with seed 0 and the settings that a checkpoint recommends.

    model: in eval mode; indices: their numbers; labels: int64 [B], drawn at random if None.
    Returns uint8 [B, H, W, C], on the device.
    """
    network, process = config.network, config.edm if config.process == "edm" else config.diffusion
    shape = (network.in_channels, network.input_size, network.input_size)
    noise = SampleNoise(_SEED, indices, shape, device)
    if labels is None:
        labels = noise.labels(max(network.num_classes, 1))
    call = autocast(model, device, precision)
    denoiser = guided_model(call, labels, network.num_classes, config.guidance, process, shape[-1])
    for state in create_sampler(process, config.sampling)(denoiser, noise.start(), noise):
        x = state.x  # [B, c, h, w]
    return _codec(config.codec, device).decode(x.float())


def save_preview(
    model: nn.Module, config: CheckpointConfig, path: Path | None, device: torch.device, precision: Precision
) -> None:
    """A grid of samples, always from the same noise and labels, to `path`; None on a rank that only takes part."""
    num_classes, names = config.network.num_classes, config.class_names
    labels = torch.arange(_IMAGES, device=device) % max(num_classes, 1)  # [B]
    images = draw_samples(model, config, range(_IMAGES), labels, device, precision)
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    titles = [names[label] if names else str(number) for number, label in enumerate(labels.tolist())]
    save_grid(path, images.cpu().numpy(), titles)


def read_picture(path: Path) -> np.ndarray:
    """A picture file as uint8 [H, W, C]."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def create_scorer(
    config: TrainConfig, checkpoint: CheckpointConfig, device: torch.device
) -> Callable[[nn.Module], dict[str, float]]:
    """A function that gives FID and Inception Score of a network; all ranks call it, and get the scores of all.

    Raises:
        ValueError, FileNotFoundError: in one sentence, if reference or features cannot be had.
    """
    settings = config.evaluation
    backend = create_backend("torch", features=settings.features, device=device)
    reference = load_reference(settings.reference or "", backend, manifold=False)

    def batches(model: nn.Module) -> Iterator[NDArray[np.uint8]]:
        """This rank's samples, uint8 [B, H, W, C]."""
        start, stop = share(settings.samples)
        for first in range(start, stop, settings.batch_size):
            indices = range(first, min(first + settings.batch_size, stop))
            yield draw_samples(model, checkpoint, indices, None, device, config.precision).cpu().numpy()

    def score(model: nn.Module) -> dict[str, float]:
        scores = score_images(batches(model), reference, backend, manifold=False)
        return {"fid": scores.fid, "inception_score": scores.inception_score}

    return score
