"""Fixtures for evaluations: small files of images, and a classifier that gives features of them."""

from pathlib import Path

import numpy as np
import pytest

WEIGHTS = "diffit/bundled/fashion_classifier.safetensors"
CLASSIFIER = f"diffit.evaluation.fashion:{WEIGHTS}"


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    """240 grey pictures [240, 32, 32, 1] of bright rectangles of all sizes: no two alike."""
    random = np.random.default_rng(0)
    images = random.integers(0, 60, (240, 32, 32, 1), dtype=np.uint8)
    for image in images:
        top, left = random.integers(2, 14, 2)
        bottom, right = random.integers(18, 31, 2)
        image[top:bottom, left:right] += random.integers(60, 190, dtype=np.uint8)
    return images


@pytest.fixture
def files(tmp_path: Path, pictures: np.ndarray) -> tuple[Path, Path]:
    """A reference of 100 and samples of 140 pictures."""
    reference, samples = tmp_path / "reference.npz", tmp_path / "samples_140x32x32x1.npz"
    np.savez(reference, arr_0=pictures[:100])
    np.savez(samples, arr_0=pictures[100:], arr_1=np.arange(140) % 10)
    return reference, samples
