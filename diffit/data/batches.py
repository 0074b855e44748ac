"""Training batches as a function of (seed, step) alone.

Everything random in a step is drawn for the whole batch, of which every process takes its part: the number of processes
does not change what is learnt from, and a resumed run needs no random state.

Letters: N images of the set, B of a batch over all processes, b of this process's part, c channels and h = w side of
what the network sees, H x W x C of an image.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffit.codec import PixelCodec, VAECodec
from diffit.data.augment import augment, draw_augmentation
from diffit.data.order import Plan
from diffit.data.streams import Stream
from diffit.device import to_device
from diffit.diffusion import Process
from diffit.diffusion.noise import keyed_generator

# Streams beside those of sampling and order; each process has its own for dropout, from that number on.
_DRAWS, _DROPOUT = 17, 18


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
    """A data set as the network would see it without noise."""

    shape: tuple[int, ...]  # (c, h, w)

    def draw(self, step: int, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """This process's images of a step, [b, c, h, w], and what the network is told of them.

        Random numbers are drawn for the whole batch.
        """
        ...


class Latents:
    """Draws from the posteriors of a data set. moments: [b, 2c, h, w] by step; shape: (2c, h, w)."""

    def __init__(self, moments: Stream, shape: tuple[int, int, int], codec: VAECodec, plan: Plan) -> None:
        self.moments, self.codec, self.plan = moments, codec, plan
        self.shape: tuple[int, ...] = (codec.latent_channels, *shape[1:])

    def draw(self, step: int, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        moments = self.moments[step].float()
        noise = generator.standard_normal((self.plan.batch_size, *self.shape), np.float32)[self.plan.part]
        return self.codec.latents(moments, to_device(noise, moments.device)), {}


class Pixels:
    """Images, augmented with a probability. images: uint8 [b, H, W, C] by step; shape: (H, W, C)."""

    def __init__(
        self, images: Stream, shape: tuple[int, int, int], codec: PixelCodec, plan: Plan, augment_probability: float
    ) -> None:
        self.images, self.codec, self.plan, self.probability = images, codec, plan, augment_probability
        height, width, channels = shape
        self.shape: tuple[int, ...] = (channels, height, width)

    def draw(self, step: int, generator: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = self.codec.encode(self.images[step])  # [b, c, h, w]
        if not self.probability:
            return pixels, {}
        augmentation = draw_augmentation(generator, self.plan.batch_size, self.probability)[self.plan.part]
        return augment(pixels, augmentation), {"augment_labels": to_device(augmentation.labels(), pixels.device)}


@dataclass(frozen=True)
class Batches:
    """Batches by step number.

    Args:
        clean: the data set.
        labels: int64 [N], on the device.
        plan: which images a step sees.
        process: the denoising process.
        label_dropout: probability that a label becomes null.
    """

    clean: Clean
    labels: Tensor
    plan: Plan
    process: Process
    label_dropout: float

    def __getitem__(self, step: int) -> Batch:
        size = self.plan.batch_size
        generator = keyed_generator(self.plan.seed, step, _DRAWS)
        t = self._mine(self.process.draw_t(generator, size))
        drop = self._mine(generator.random(size) < self.label_dropout)
        x_start, told = self.clean.draw(step, generator)
        noise = self._mine(generator.standard_normal((size, *self.clean.shape), np.float32))
        y = self.labels[to_device(self.plan.picks(step).index, self.labels.device)]
        return Batch(x_start, noise, t, {"y": y, "drop_label": drop} | told)

    def _mine(self, values: NDArray[Any]) -> Tensor:
        """This process's part, on the device."""
        return to_device(values[self.plan.part], self.labels.device)
