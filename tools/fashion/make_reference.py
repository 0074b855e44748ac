"""Make the bundled reference of Fashion-MNIST, of the real images as the bundled classifier sees them.

    python tools/fashion/make_reference.py

It holds the moments of the 60,000 training images, features of 10,000 of them with their radii (for precision and
recall), features of 2,000 test images, and the scores of all 10,000; features in float16, images drawn with seed 0.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffit.data.datasets import fashion_mnist
from diffit.evaluation.fashion import FEATURES, REFERENCE
from diffit.evaluation.features import Backend, create_backend
from diffit.evaluation.scores import Collected, Reference, Scores, both_radii, collect, compare

_REFERENCE_IMAGES, _TEST_IMAGES = 10_000, 2_000


def _batches(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    yield from np.array_split(images, len(images) // 500)


def write_reference(out: Path, backend: Backend, train: Collected, test: Collected) -> Scores:
    """Write the file; returns the scores of all test images against what it holds."""
    pool = np.random.default_rng(0).permutation(train.pool)[:_REFERENCE_IMAGES].astype(np.float16)
    mean, covariance = train.moments.mean.astype(np.float32), train.moments.covariance().astype(np.float32)
    points = pool.astype(np.float32)
    radii = both_radii(points, backend.device, progress=True)
    reference = Reference(mean.astype(float), covariance.astype(float), None, points, radii, ())
    scores = compare(test, reference, backend.device, progress=True)
    np.savez_compressed(
        out,
        features=np.array(backend.name),
        mu=mean,
        sigma=covariance,
        pool=pool,
        radii=radii,
        test=test.pool[:_TEST_IMAGES].astype(np.float16),
        test_scores=np.array(json.dumps(asdict(scores))),
    )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--out", type=Path, default=REFERENCE, help="the file to write")
    args = parser.parse_args()
    backend = create_backend(features=FEATURES, device=args.device)
    train_images = fashion_mnist(train=True).images
    test_images = np.random.default_rng(0).permutation(fashion_mnist(train=False).images)
    train = collect(_batches(train_images), backend, len(train_images), "training images")
    test = collect(_batches(test_images), backend, len(test_images), "test images")
    scores = write_reference(args.out, backend, train, test)
    print(f"{args.out}: {args.out.stat().st_size} bytes, of {backend.name}; all test images: {scores}")


if __name__ == "__main__":
    main()
