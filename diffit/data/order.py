"""Which images are seen, in which order, and which of them mirrored: functions of (seed, images seen) alone.

Neither the number of processes, nor that of workers, nor a resumed run changes them.

Letters: N images of the set, B of a batch over all processes, b of this process's part.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from diffit.diffusion.noise import keyed_generator

_FLIP, _ORDER = 15, 16  # streams beside those of sampling and of a step's draws


def image_order(seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    """Which images are seen as number first, first + 1, ...: a fresh permutation of the data set every epoch."""
    return _by_epoch(_permutation, seed, first, count, num_images)


def image_flips(seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    """1 where the image seen as number first, first + 1, ... is mirrored, else 0: a fair coin each."""
    return _by_epoch(_coins, seed, first, count, num_images)


def _by_epoch(draw, seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:  # type: ignore[no-untyped-def]
    seen = np.arange(first, first + count)
    values = np.empty(count, np.int64)
    for epoch in np.unique(seen // num_images):
        inside = seen // num_images == epoch
        values[inside] = draw(seed, int(epoch), num_images)[seen[inside] % num_images]
    return values


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return keyed_generator(seed, epoch, _ORDER).permutation(num_images)


@lru_cache(maxsize=2)
def _coins(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return keyed_generator(seed, epoch, _FLIP).integers(2, size=num_images)


@dataclass(frozen=True)
class Picks:
    """The images of one process in one step: numbers and flips (0 or 1), int64 [b] each."""

    index: NDArray[np.int64]
    flip: NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """What one process sees of a data set.

    Args:
        seed: of order and flips.
        num_images: N.
        batch_size: B.
        part: which images of a batch are this process's.
        flip: mirror every other image, at random.
    """

    seed: int
    num_images: int
    batch_size: int
    part: slice
    flip: bool

    def picks(self, step: int) -> Picks:
        """What this process sees in step `step`, counted from 0."""
        seen = self.seed, step * self.batch_size, self.batch_size, self.num_images
        flip = image_flips(*seen) if self.flip else np.zeros(self.batch_size, np.int64)
        return Picks(image_order(*seen)[self.part], flip[self.part])
