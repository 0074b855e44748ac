"""Which images are seen, in which order, and which of them mirrored: functions of (seed, images seen) alone.

Neither the number of ranks, nor that of workers, nor a resumed run changes them.

Letters: N images of the set, B of a batch over all ranks, b of this rank's share of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from diffit.diffusion.noise import RandomStream, keyed_generator

Draw = Callable[[int, int, int], NDArray[np.int64]]


class Key(NamedTuple):
    """What a training set is asked for: the number of an image, mirrored or not, as the `seen`-th image of the run."""

    image: int
    flip: bool
    seen: int


class BatchSampler(Sampler[list[Key]]):
    """The keys of this rank's share of every batch: the batch sampler of a DataLoader.

    Args:
        num_images: N.
        batch_size: B.
        seed: of order and flips.
        flip: mirror every other image, at random.
        steps: the steps to come, counted from 0 of the whole run.
        rank, world_size: this rank takes the rank-th of world_size equal, consecutive parts of every batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        flip: bool,
        steps: range,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_images, self.batch_size, self.seed, self.flip, self.steps = num_images, batch_size, seed, flip, steps
        self.share = batch_size // world_size
        self.offset = rank * self.share

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.keys, self.steps)

    def keys(self, step: int) -> list[Key]:
        """The keys of a step, b of them."""
        first = step * self.batch_size + self.offset
        index = image_order(self.seed, first, self.share, self.num_images)
        flip = image_flips(self.seed, first, self.share, self.num_images) & self.flip
        seen = range(first, first + self.share)
        return [Key(*key) for key in zip(index.tolist(), flip.astype(bool).tolist(), seen, strict=True)]


def image_order(seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    """Which images are seen as number first, first + 1, ...: a fresh permutation of the data set every epoch."""
    return _by_epoch(_permutation, seed, first, count, num_images)


def image_flips(seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    """1 where the image seen as number first, first + 1, ... is mirrored, else 0: a fair coin each."""
    return _by_epoch(_coins, seed, first, count, num_images)


def _by_epoch(draw: Draw, seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    seen = np.arange(first, first + count)
    values = np.empty(count, np.int64)
    for epoch in np.unique(seen // num_images):
        inside = seen // num_images == epoch
        values[inside] = draw(seed, int(epoch), num_images)[seen[inside] % num_images]
    return values


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless the data set is smaller than the batch
def _permutation(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return keyed_generator(seed, epoch, RandomStream.ORDER).permutation(num_images)


@lru_cache(maxsize=2)
def _coins(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return keyed_generator(seed, epoch, RandomStream.FLIP).integers(2, size=num_images)
