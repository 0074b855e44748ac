"""Time and memory of the statistics against the plain NumPy/SciPy way: python -m evaluations.benchmark

The plain way is what evaluators of ADM's line do: mean and covariance of all features at once, the matrix square root
of the product of covariances, and k-th neighbours by sorting whole rows of distances. Each measurement runs in a fresh
process, so that its peak memory is its own; both ways see the same features.
Letters: N samples, M reference images, D features.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluations.manifold import precision_recall
from evaluations.statistics import Moments, trace_sqrt_product

_BLOCK = 10_000
_REPEATS, _ENOUGH_SECONDS = 3, 30.0


@dataclass(frozen=True)
class Sizes:
    """N, M, D."""

    samples: int
    reference: int
    features: int


def make_features(count: int, features: int, seed: int) -> NDArray[np.float32]:
    """Features as Inception's are: not negative, many near zero, with a spectrum that falls by orders of magnitude."""
    mixing = np.random.default_rng(0).standard_normal((256, features), dtype=np.float32)
    mixing *= np.linspace(1, 0.02, 256, dtype=np.float32)[:, None] / 16
    random = np.random.default_rng(seed)
    out = np.empty((count, features), np.float32)
    for first in range(0, count, 5000):
        part = out[first : first + 5000]
        part[:] = random.standard_normal((len(part), 256), dtype=np.float32) @ mixing
        part += 0.1 * random.standard_normal(part.shape, dtype=np.float32) + 0.05 * seed
        np.maximum(part, 0, out=part)
    return out


def moments_of(features: NDArray[np.float32]) -> Moments:
    moments = Moments()
    for first in range(0, len(features), 64):  # as they come from the network
        moments.update(features[first : first + 64])
    return moments


def our_moments(features: NDArray[np.float32]) -> list[float]:
    moments = moments_of(features)
    return [float(moments.mean.sum()), float(np.trace(moments.covariance()))]


def plain_moments(features: NDArray[np.float32]) -> list[float]:
    mean, covariance = np.mean(features, axis=0), np.cov(features, rowvar=False)
    return [float(mean.sum()), float(np.trace(covariance))]


def plain_trace(sigma1: NDArray, sigma2: NDArray) -> float:
    """Tr sqrt(S1 S2) by Schur decomposition of the product, which is not symmetric."""
    import scipy.linalg

    return float(np.trace(scipy.linalg.sqrtm(sigma1 @ sigma2)).real)


def plain_distances(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.maximum((a**2).sum(1)[:, None] - 2 * (a @ b.T) + (b**2).sum(1)[None], 0)


def plain_radii(features: NDArray[np.float32], k: int = 3) -> NDArray[np.float32]:
    radii = np.empty(len(features), np.float32)
    for first in range(0, len(features), _BLOCK):
        rows = features[first : first + _BLOCK]
        blocks = [plain_distances(rows, features[at : at + _BLOCK]) for at in range(0, len(features), _BLOCK)]
        radii[first : first + _BLOCK] = np.partition(np.concatenate(blocks, axis=1), k, axis=1)[:, k]
    return radii


def plain_precision_recall(reference: NDArray[np.float32], samples: NDArray[np.float32]) -> tuple[float, float]:
    reference_radii, sample_radii = plain_radii(reference), plain_radii(samples)
    inside, covered = np.zeros(len(samples), bool), np.zeros(len(reference), bool)
    for i in range(0, len(reference), _BLOCK):
        for j in range(0, len(samples), _BLOCK):
            distances = plain_distances(reference[i : i + _BLOCK], samples[j : j + _BLOCK])
            inside[j : j + _BLOCK] |= (distances <= reference_radii[i : i + _BLOCK, None]).any(0)
            covered[i : i + _BLOCK] |= (distances <= sample_radii[None, j : j + _BLOCK]).any(1)
    return float(inside.mean()), float(covered.mean())


def covariances(sizes: Sizes) -> list[NDArray]:
    return [moments_of(make_features(4 * sizes.features, sizes.features, seed)).covariance() for seed in (1, 2)]


def sets(sizes: Sizes) -> list[NDArray[np.float32]]:
    return [make_features(count, sizes.features, seed) for seed, count in ((1, sizes.reference), (2, sizes.samples))]


# name -> (what both ways get, our way, the plain way)
TASKS: dict[str, tuple[Callable[[Sizes], list], Callable[..., Any], Callable[..., Any]]] = {
    "moments of N features": (
        lambda sizes: sets(sizes)[1:],
        our_moments,
        plain_moments,
    ),
    "trace of the square root": (covariances, trace_sqrt_product, plain_trace),
    "precision and recall": (sets, lambda a, b: tuple(precision_recall(a, b)), plain_precision_recall),
}


def measure(task: str, plain: bool, sizes: Sizes) -> dict[str, Any]:
    """Seconds (the best of a few runs, if they are short), peak GB, its part above the inputs', the result."""
    make, *ways = TASKS[task]
    inputs = make(sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times: list[float] = []
    while len(times) < _REPEATS and sum(times) < _ENOUGH_SECONDS:
        start = time.perf_counter()
        result = ways[plain](*inputs)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": min(times),
        "peak_gb": peak / 2**20,
        "above_inputs_gb": (peak - before) / 2**20,
        "result": result,
    }


def apart(*arguments: Any) -> dict[str, Any]:
    """`measure` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000, help="N (default: 50000)")
    parser.add_argument("--reference", type=int, default=10_000, help="M (default: 10000)")
    parser.add_argument("--features", type=int, default=2048, help="D (default: 2048)")
    args = parser.parse_args()
    sizes = Sizes(args.samples, args.reference, args.features)
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores; {sizes}", flush=True)
    for task in TASKS:
        ours, plain = apart(task, False, sizes), apart(task, True, sizes)
        print(
            json.dumps({"task": task, "ours": ours, "plain": plain, "faster": plain["seconds"] / ours["seconds"]}),
            flush=True,
        )


if __name__ == "__main__":
    main()
