"""Training batches as a function of (seed, step) alone.

Everything random in a step is drawn for the whole batch, of which every process takes its part: the number of processes
does not change what is learnt from, and a resumed run needs no random state.

Letters: N images of the set, B of a batch over all processes, b of this process's part, c channels and h = w side of
what the network sees, H x W x C of an image.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffit.codec import PixelCodec, VAECodec
from diffit.data.augment import augment, draw_augmentation
from diffit.device import to_device
from diffit.diffusion.noise import keyed_generator
from diffit.diffusion.settings import EDMConfig, ProcessConfig

# Streams beside those of sampling; each process has its own for dropout, from that number on.
_ORDER, _DRAWS, _DROPOUT = 16, 17, 18


def image_order(seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    """Which images are seen as number first, first + 1, ...: a fresh permutation of the data set every epoch."""
    seen = np.arange(first, first + count)
    order = np.empty(count, np.int64)
    for epoch in np.unique(seen // num_images):
        inside = seen // num_images == epoch
        order[inside] = _permutation(seed, int(epoch), num_images)[seen[inside] % num_images]
    return order


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return keyed_generator(seed, epoch, _ORDER).permutation(num_images)


def draw_times(process: ProcessConfig, generator: np.random.Generator, count: int) -> NDArray[Any]:
    """What chooses the noise level of every image, as training_losses takes it: timesteps, or EDM's normals; [B]."""
    if isinstance(process, EDMConfig):
        return generator.standard_normal(count, np.float32)
    return generator.integers(process.diffusion_steps, size=count)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of PyTorch's own generators, which dropout draws from, in a step of a process."""
    return int(keyed_generator(seed, step, _DROPOUT + rank).integers(2**63))


@dataclass(frozen=True)
class Batch:
    """What one process sees in a step.

    x_start and noise [b, c, h, w]; t [b], see `draw_times`; conditions: what the network is told by keyword, each [b]
    or [b, features]: y, drop_label (bool) and, of images, augment_labels.
    """

    x_start: Tensor
    noise: Tensor
    t: Tensor
    conditions: dict[str, Tensor]


class Clean(Protocol):
    """A data set on the device, as the network would see it without noise."""

    shape: tuple[int, ...]  # (c, h, w)

    def draw(
        self, index: Tensor, part: slice, generator: np.random.Generator, count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images `index` [b], part of a batch of `count`, [b, c, h, w], and what the network is told of them.

        Random numbers are drawn for the whole batch.
        """
        ...


class Latents:
    """Draws from the posteriors of a data set. moments: [N, 2c, h, w], on the device."""

    def __init__(self, moments: Tensor, codec: VAECodec) -> None:
        self.moments, self.codec = moments, codec
        self.shape: tuple[int, ...] = (codec.latent_channels, *moments.shape[2:])

    def draw(
        self, index: Tensor, part: slice, generator: np.random.Generator, count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        noise = generator.standard_normal((count, *self.shape), np.float32)[part]
        return self.codec.latents(self.moments[index], to_device(noise, index.device)), {}


class Pixels:
    """Images, augmented with a probability. images: uint8 [N, H, W, C], on the device."""

    def __init__(self, images: Tensor, codec: PixelCodec, augment_probability: float) -> None:
        self.images, self.codec, self.probability = images, codec, augment_probability
        height, width, channels = images.shape[1:]
        self.shape: tuple[int, ...] = (channels, height, width)

    def draw(
        self, index: Tensor, part: slice, generator: np.random.Generator, count: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = self.codec.encode(self.images[index])  # [b, c, h, w]
        if not self.probability:
            return pixels, {}
        augmentation = draw_augmentation(generator, count, self.probability)[part]
        return augment(pixels, augmentation), {"augment_labels": to_device(augmentation.labels(), index.device)}


@dataclass(frozen=True)
class Batches:
    """Batches by step number, from a data set that is held in memory on the device.

    Args:
        clean: the data set.
        labels: int64 [N], on the device.
        process: the denoising process.
        seed: of order and draws.
        batch_size: B.
        label_dropout: probability that a label becomes null.
        part: which images of a batch are this process's.
    """

    clean: Clean
    labels: Tensor
    process: ProcessConfig
    seed: int
    batch_size: int
    label_dropout: float
    part: slice

    def __getitem__(self, step: int) -> Batch:
        size = self.batch_size
        order = image_order(self.seed, step * size, size, len(self.labels))
        generator = keyed_generator(self.seed, step, _DRAWS)
        t = self._mine(draw_times(self.process, generator, size))
        drop = self._mine(generator.random(size) < self.label_dropout)
        index = self._mine(order)
        x_start, told = self.clean.draw(index, self.part, generator, size)
        noise = self._mine(generator.standard_normal((size, *self.clean.shape), np.float32))
        return Batch(x_start, noise, t, {"y": self.labels[index], "drop_label": drop} | told)

    def _mine(self, values: NDArray[Any]) -> Tensor:
        return to_device(values[self.part], self.labels.device)
