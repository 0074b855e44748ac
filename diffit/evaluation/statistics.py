"""Moments of features, and the scores that are formulas: Fréchet distance, Inception Score, accuracy.

Letters: N samples, D features, K classes. All arithmetic is float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.special
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class SingularCovarianceWarning(UserWarning):
    """A covariance has no full rank: the distance is defined, but says little about D dimensions."""


class Moments:
    """Mean and covariance of a stream of features, batch by batch, or of parts of it in ranks (Chan et al. 1979).

    What is added up are outer products of centred features, so no digits are lost to a large mean.

    Attributes:
        count, mean: N and the mean [D] of what was seen; the mean is empty before.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(0)
        self._scatter: Floats = np.zeros((0, 0))  # [D, D], the upper triangle alone

    def update(self, features: ArrayLike) -> None:
        """Add a batch of features [N, D]."""
        batch = np.asarray(features, dtype=np.float64)
        if not len(batch):
            return
        if not self.count:
            self.mean = np.zeros(batch.shape[1])
            self._scatter = np.zeros((batch.shape[1],) * 2, order="F")
        mean, total = batch.mean(axis=0), self.count + len(batch)
        shift = mean - self.mean
        # The step from the old mean to the batch's counts like one more centred sample.
        rows = np.vstack([batch - mean, shift * np.sqrt(self.count * len(batch) / total)])
        self._scatter = scipy.linalg.blas.dsyrk(1.0, rows.T, beta=1.0, c=self._scatter, overwrite_c=True)
        self.count, self.mean = total, self.mean + shift * (len(batch) / total)

    def merge(self, add_up: Callable[[Floats], object]) -> None:
        """Become the moments of what all ranks have seen.

        add_up: puts the sum over all ranks, each of which calls it, into an array; so none holds the matrix of another.
        """
        sums = np.append(self.mean, 1.0) * self.count
        add_up(sums)
        mean = sums[:-1] / sums[-1]
        step = np.sqrt(self.count) * (self.mean - mean)  # this rank's samples are now centred around the mean of all
        self._scatter = scipy.linalg.blas.dsyr(1.0, step, a=self._scatter, overwrite_a=True)
        add_up(self._scatter)
        self.count, self.mean = round(sums[-1]), mean

    def covariance(self) -> Floats:
        """The unbiased covariance [D, D].

        Raises:
            ValueError: if fewer than two samples were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return (self._scatter + np.triu(self._scatter, 1).T) / (self.count - 1)


def _square_root(sigma: Floats, name: str) -> Floats:
    """A factor L [D, rank] with L Lᵀ = sigma: Cholesky with pivots, which stops at the numerical rank.

    Raises:
        ValueError: if it is no covariance, not even one that was rounded.
    """
    factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    values = scipy.linalg.eigvalsh(sigma) if rank < len(sigma) else np.ones(1)  # in ascending order
    if abs(sigma - sigma.T).max() > 1e-3 * abs(sigma).max() or values[0] < -1e-3 * abs(values[-1]):
        raise ValueError(
            f"the covariance of the {name} is not symmetric and positive: its file is damaged, make it again"
        )
    if values[0] < -1e-6 * values[-1]:
        problem = "has negative eigenvalues, as after rounding to 16 bits: they are taken as 0"
        warnings.warn(f"the covariance of the {name} {problem}", SingularCovarianceWarning, stacklevel=2)
        values, vectors = scipy.linalg.eigh(sigma)
        return vectors * np.sqrt(values.clip(min=0))
    if rank < len(sigma):
        problem = (
            f"has rank {rank} of {len(sigma)}: with fewer samples than features (or with features that never change) "
            "the Fréchet distance is biased upwards and compares only at equal counts"
        )
        warnings.warn(f"the covariance of the {name} {problem}", SingularCovarianceWarning, stacklevel=2)
    root = np.empty((len(sigma), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return root


def frechet_distance(
    mu1: ArrayLike,
    sigma1: ArrayLike,
    mu2: ArrayLike,
    sigma2: ArrayLike,
    names: tuple[str, str] = ("first set", "second set"),
) -> float:
    """|mu1 - mu2|² + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Fréchet distance of two Gaussians (Heusel et al. 2017).

    mu: [D]; sigma: [D, D]; names are for the warning about a singular covariance.

    Raises:
        ValueError: if the shapes do not fit, a number is not finite, or a covariance is none.
    """
    m1, s1, m2, s2 = (np.asarray(x, dtype=np.float64) for x in (mu1, sigma1, mu2, sigma2))
    d = len(m1)
    if m2.shape != (d,) or s1.shape != (d, d) or s2.shape != (d, d):
        raise ValueError(
            f"moments do not fit: means {m1.shape} and {m2.shape}, covariances {s1.shape} and {s2.shape}; "
            "were both made with the same features?"
        )
    if not all(np.isfinite(x).all() for x in (m1, s1, m2, s2)):
        raise ValueError("moments hold NaN or infinite values: the features or the reference file are damaged")
    # With S = L Lᵀ the product S1 S2 shares its non-zero eigenvalues with M Mᵀ, M = L1ᵀ L2. The factors have as many
    # columns as their covariance has rank, and of M Mᵀ and MᵀM the smaller one is taken; so there are no eigenvalues
    # that are zero but for rounding, whose square roots would be far from zero.
    roots = [_square_root(sigma, name) for sigma, name in ((s1, names[0]), (s2, names[1]))]
    product = roots[0].T @ roots[1]
    if product.shape[0] > product.shape[1]:
        product = product.T
    trace_of_root = float(np.sqrt(scipy.linalg.eigvalsh(product @ product.T).clip(min=0)).sum())
    shift = m1 - m2
    traces = np.trace(s1) + np.trace(s2)
    return max(0.0, float(shift @ shift + traces - 2 * trace_of_root))  # below 0 by rounding alone


def inception_score(probabilities: Any, split_size: int = 5000) -> float:
    """exp of the mean KL(p(y|x) || p(y)) of each split of 5000 samples, averaged over splits (Salimans et al. 2016).

    probabilities: [N, K], rows summing to 1, in the order of the samples. As in ADM the last split may be shorter and
    weighs as much as the others. A probability of zero counts nothing.

    Raises:
        ValueError: if there are no samples.
    """
    if len(probabilities) == 0:
        raise ValueError("an Inception Score needs at least one sample")
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = np.asarray(probabilities[start : start + split_size], dtype=np.float64)
        divergence = scipy.special.rel_entr(part, part.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """The share, in [0, 1], whose most probable class is its label. probabilities: [N, K]; labels: [N] in 0..K-1."""
    return float((np.argmax(probabilities, axis=1) == np.asarray(labels)).mean())
