"""Randomness that belongs to a sample."""

import numpy as np
import torch

from diffit.diffusion import SampleNoise
from diffit.diffusion.noise import RandomStream


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


def test_what_every_sample_and_training_is_made_of():
    """Another purpose's number, or another key, would change them all."""
    numbers = {"LABEL": 0, "START": 1, "STEP": 2, "FLIP": 15, "ORDER": 16, "CORRUPTION": 17, "POSTERIOR": 18}
    numbers |= {"VALIDATION": 19, "DROPOUT": 64}
    assert {stream.name: stream.value for stream in RandomStream} == numbers
    draws = {}
    for name in ("LABEL", "START", "STEP"):  # Philox's key and counter as whole numbers: the first word is the lowest
        draws[name] = np.random.Generator(np.random.Philox(key=7 + (3 << 64), counter=numbers[name] << 192))
    noise = SampleNoise(7, [3], (4, 2, 2))
    np.testing.assert_array_equal(noise.start()[0], draws["START"].standard_normal((4, 2, 2), np.float32))
    for _ in range(2):
        np.testing.assert_array_equal(noise()[0], draws["STEP"].standard_normal((4, 2, 2), np.float32))
    assert noise.labels(1000).tolist() == [draws["LABEL"].integers(1000)]


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
