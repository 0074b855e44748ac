"""Which images are seen, in which order, and which of them mirrored: functions of (seed, images seen) alone.

Neither the number of ranks, nor that of workers, nor a resumed run changes them.

Letters: N images of the set, B of a batch over all ranks, b of this rank's share of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from diffit.diffusion.noise import RandomStream, keyed_generator


class Key(NamedTuple):
    """The number of an image in its training set, mirrored or not, as the `seen`-th image of the run."""

    image: int
    flip: bool
    seen: int


@dataclass(frozen=True)
class BatchSampler(Sampler[list[Key]]):
    """The keys of this rank's share of every batch: the sampler of a DataLoader whose data set makes whole batches.

    Args:
        num_images: N.
        batch_size: B.
        seed: of order and flips.
        flip: mirror each image with probability 1/2.
        steps: the steps to come, counted from 0 of the whole run.
        rank, world_size: this rank takes the rank-th of world_size equal, consecutive parts of every batch.
    """

    num_images: int
    batch_size: int
    _: KW_ONLY
    seed: int
    flip: bool
    steps: range
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Key]]:
        return map(self.keys, self.steps)

    def keys(self, step: int) -> list[Key]:
        """The keys of a step, b of them."""
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        index = image_order(self.seed, first, share, self.num_images)
        flip = image_flips(self.seed, first, share, self.num_images) & self.flip
        seen = range(first, first + share)
        return [Key(*key) for key in zip(index.tolist(), flip.astype(bool).tolist(), seen, strict=True)]


def image_order(seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    """Which images are seen as number first, first + 1, ...: a fresh permutation of the data set every epoch."""
    return _by_epoch(RandomStream.ORDER, seed, first, count, num_images)


def image_flips(seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    """1 where the image seen as number first, first + 1, ... is mirrored, else 0: a fair coin each."""
    return _by_epoch(RandomStream.FLIP, seed, first, count, num_images)


def _by_epoch(stream: RandomStream, seed: int, first: int, count: int, num_images: int) -> NDArray[np.int64]:
    seen = np.arange(first, first + count)
    values = np.empty(count, np.int64)
    for epoch in np.unique(seen // num_images):
        inside = seen // num_images == epoch
        values[inside] = _epoch(stream, seed, int(epoch), num_images)[seen[inside] % num_images]
    return values


@lru_cache(maxsize=4)  # of both streams: a batch touches two epochs at most, unless it is larger than the data set
def _epoch(stream: RandomStream, seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    draw = keyed_generator(seed, epoch, stream)
    return draw.permutation(num_images) if stream == RandomStream.ORDER else draw.integers(2, size=num_images)
