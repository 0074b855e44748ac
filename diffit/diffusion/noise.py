"""Randomness that belongs to a sample: label, start and the noise of every step depend on (seed, i) alone.

Batch size, number of ranks, device and interruptions therefore do not change a sample. Training draws in the same way,
by the number of images seen.
"""

import operator
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from diffit.system.device import to_device


class RandomStream(IntEnum):
    """What random numbers are for: those of one purpose do not depend on those of another."""

    # of a sample
    LABEL = 0
    START = 1
    STEP = 2
    # of an epoch of training
    FLIP = 15
    ORDER = 16
    # of an image that training sees
    CORRUPTION = 17
    POSTERIOR = 18
    # of a held-out image
    VALIDATION = 19
    # of a step of training; rank r takes DROPOUT + r, so nothing may stand behind it
    DROPOUT = 64


def keyed_generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The generator of one purpose (stream, below 2^64) of sample or step `index`.

    Philox is keyed by 128 bits, here the seed and the index: no two samples can share a stream, as they would with
    torch's CPU generator, which keeps only 32 bits of its seed (50,000 samples collide with probability 1/4).
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=[0, 0, 0, stream]))


class SampleNoise:
    """All random numbers of a batch of samples, drawn on the CPU in float32.

    Args:
        seed: of the whole set, 0 <= seed < 2^64.
        indices: numbers i of the samples of this batch.
        shape: (c, h, w) of one sample.
        device: where the noise goes.

    Calling it gives the noise of the next step, [B, c, h, w].

    Raises:
        ValueError: if the seed is out of range.
    """

    def __init__(
        self, seed: int, indices: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> None:
        try:
            seed = operator.index(seed)  # NumPy's and PyTorch's integers too
        except TypeError as error:
            raise ValueError(f"the seed must be a whole number, not {seed!r}") from error
        if not 0 <= seed < 2**64:
            raise ValueError(f"the seed must be between 0 and 2^64 - 1, not {seed}")
        self.seed, self.indices, self.shape, self.device = seed, indices, shape, torch.device(device)
        self._steps = [keyed_generator(seed, i, RandomStream.STEP) for i in indices]

    def labels(self, num_classes: int) -> Tensor:
        """One uniformly drawn label per sample, int64 [B]."""
        drawn = [int(keyed_generator(self.seed, i, RandomStream.LABEL).integers(num_classes)) for i in self.indices]
        return to_device(torch.tensor(drawn), self.device)

    def start(self) -> Tensor:
        """The state at t = T, [B, c, h, w]."""
        return self._normal([keyed_generator(self.seed, i, RandomStream.START) for i in self.indices])

    def __call__(self) -> Tensor:
        return self._normal(self._steps)

    def _normal(self, generators: list[np.random.Generator]) -> Tensor:
        noise = np.empty((len(generators), *self.shape), np.float32)
        for generator, out in zip(generators, noise, strict=True):
            generator.standard_normal(out=out, dtype=np.float32)
        return to_device(noise, self.device)
