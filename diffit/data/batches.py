"""Training batches as a function of (seed, step) alone.

Everything random in a step is drawn for the whole batch, of which every process takes its part: the number of processes
does not change what is learnt from, and a resumed run needs no random state.

Letters: N images of the set, B of a batch over all processes, b of this process's part, c latent channels, h = w side.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffit.codec import VAECodec
from diffit.diffusion.noise import keyed_generator

_ORDER, _DRAWS = 16, 17  # streams beside those of sampling


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


@dataclass(frozen=True)
class Batch:
    """What one process sees in a step: clean latents and noise [b, c, h, w]; timesteps, labels, labels to drop [b]."""

    x_start: Tensor
    noise: Tensor
    t: Tensor
    y: Tensor
    drop_label: Tensor


@dataclass(frozen=True)
class LatentBatches:
    """Batches by step number, from moments that are held in memory on the device.

    Args:
        moments, labels: of the whole data set, [N, 2c, h, w] and int64 [N].
        codec: turns moments into latents.
        seed: of order and draws.
        batch_size: B.
        num_timesteps: T; timesteps are uniform in 0..T-1.
        label_dropout: probability that a label becomes null.
        part: which images of a batch are this process's.
    """

    moments: Tensor
    labels: Tensor
    codec: VAECodec
    seed: int
    batch_size: int
    num_timesteps: int
    label_dropout: float
    part: slice

    def __getitem__(self, step: int) -> Batch:
        size = self.batch_size
        order = image_order(self.seed, step * size, size, len(self.labels))
        generator = keyed_generator(self.seed, step, _DRAWS)
        t = generator.integers(self.num_timesteps, size=size)
        drop = generator.random(size) < self.label_dropout
        latent = (self.codec.latent_channels, *self.moments.shape[2:])
        normals = generator.standard_normal((2, size, *latent), np.float32)
        index, posterior_noise, noise = (self._mine(values) for values in (order, *normals))
        x_start = self.codec.latents(self.moments[index], posterior_noise)
        return Batch(x_start, noise, self._mine(t), self.labels[index], self._mine(drop))

    def _mine(self, values: NDArray[Any]) -> Tensor:
        """This process's part, on the device."""
        part = torch.from_numpy(values[self.part])
        if self.moments.is_cuda:  # pinned, so that the copy does not wait for the device
            return part.pin_memory().to(self.moments.device, non_blocking=True)
        return part.to(self.moments.device)
