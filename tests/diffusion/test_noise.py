"""Randomness that belongs to a sample."""

import numpy as np
import torch

from diffit.diffusion import SampleNoise


def test_a_sample_does_not_depend_on_its_batch():
    together = SampleNoise(7, range(10), (2, 3, 3))
    alone = SampleNoise(7, [6], (2, 3, 3))
    assert torch.equal(together.start()[6], alone.start()[0])
    for _ in range(3):
        assert torch.equal(together()[6], alone()[0])
    assert together.labels(1000)[6] == alone.labels(1000)[0]


def test_streams_differ():
    """Start, steps, samples and seeds share no numbers."""
    noise = SampleNoise(0, range(50), (4, 8, 8))
    draws = [noise.start(), noise(), noise(), SampleNoise(1, range(50), (4, 8, 8)).start()]
    rows = torch.cat([draw.flatten(1) for draw in draws]).double()
    correlation = np.corrcoef(rows)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.35  # 256 values: five deviations of chance


def test_distribution():
    noise = SampleNoise(3, range(200), (4, 8, 8))
    x = torch.cat([noise.start(), noise()]).double()
    count = x.numel()
    assert abs(x.mean()) < 5 / count**0.5
    assert abs(x.var() - 1) < 5 * (2 / count) ** 0.5
    labels = SampleNoise(3, range(10_000), ()).labels(10)
    counts = torch.bincount(labels, minlength=10)
    assert (counts - 1000).abs().max() < 5 * 30


def test_seeds_beyond_32_bits_are_told_apart():
    assert not torch.equal(SampleNoise(1, [0], (8,)).start(), SampleNoise(1 + 2**32, [0], (8,)).start())
    assert not torch.equal(SampleNoise(1, [0], (8,)).start(), SampleNoise(1, [2**32], (8,)).start())
