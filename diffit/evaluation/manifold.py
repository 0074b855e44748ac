"""Improved precision and recall (Kynkäänniemi et al. 2019), with distances in blocks so that memory stays small.

Each set of features stands for the union of balls around its points, which reach to the k-th nearest neighbour.
Precision is the share of samples inside the reference's balls, recall the share of the reference inside the samples'.
Letters: N, M points, D features, B points of a block, k neighbours.
"""

from __future__ import annotations

import itertools
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffit.system import console

_BLOCK = 4096
# ADM decides per block of this size whether half precision is enough.
_ADM_BLOCK = 10_000


class PrecisionRecall(NamedTuple):
    """Two shares in [0, 1]."""

    precision: float
    recall: float


def manifold_radii(
    features: Any, k: int = 3, fp16: bool = False, progress: bool = False, title: str = "radii"
) -> NDArray[np.float32]:
    """Squared distance of every point to its k-th nearest neighbour, itself not counted.

    features: array or tensor [N, D], on the device that shall do the work. Returns [N]. fp16: see `precision_recall`;
    title: of the progress bar.

    Raises:
        ValueError: if k is not below N.
    """
    points = torch.as_tensor(features).float()
    if k >= len(points):
        raise ValueError(f"{k} nearest neighbours need more than {k} points, got {len(points)}")
    if not fp16:
        points = points - points.mean(dim=0)
    nearest = points.new_full((len(points), k + 1), float("inf"))  # itself at distance zero, and k others
    blocks = _blocks(len(points), fp16)
    # A block of distances serves its rows and its columns; but in half precision d(a, b) and d(b, a) may round
    # differently, and both are computed.
    pairs = [(i, j) for number, i in enumerate(blocks) for j in (blocks if fp16 else blocks[number:])]
    for i, j in console.progress(pairs, title, show=progress, leave=False):
        distances = _distances(points[i], points[j], fp16)  # [Bi, Bj]
        nearest[i] = _merge(nearest[i], distances)
        if i != j and not fp16:
            nearest[j] = _merge(nearest[j], distances.T)
    return nearest[:, k].cpu().numpy()


def precision_recall(
    reference: Any, samples: Any, k: int = 3, fp16: bool = False, progress: bool = False, reference_radii: Any = None
) -> PrecisionRecall:
    """Precision and recall of samples [N, D] against reference features [M, D] (arrays or tensors on one device).

    A point is inside a ball if its squared distance is at most the radius. fp16 does as ADM's TensorFlow code: a block
    of distances is computed in half precision wherever that stays finite; neighbours that nearly tie then change, by so
    much that both numbers may differ by tenths. reference_radii: those of the reference [M], if they are known already.

    Raises:
        ValueError: if the sets have different D, or k is not below N and M.
    """
    a, b = torch.as_tensor(reference).float(), torch.as_tensor(samples).float()
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"reference has {a.shape[1]} features and samples have {b.shape[1]}: use the same backend")
    if not fp16:  # moving both sets together changes no distance, and keeps the digits of |a|² - 2ab + |b|²
        centre = a.mean(dim=0)
        a, b = a - centre, b - centre
    sample_radii = manifold_radii(b, k, fp16, progress, "sample radii")
    if reference_radii is None:
        reference_radii = manifold_radii(a, k, fp16, progress, "reference radii")
    radii_a, radii_b = (torch.as_tensor(radii).to(a.device) for radii in (reference_radii, sample_radii))
    a_inside = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    b_inside = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    pairs = [(i, j) for i in _blocks(len(a), fp16) for j in _blocks(len(b), fp16)]
    for i, j in console.progress(pairs, "precision/recall", show=progress, leave=False):
        distances = _distances(a[i], b[j], fp16)  # [Bi, Bj]
        a_inside[i] |= (distances <= radii_b[j]).any(dim=1)
        b_inside[j] |= (distances <= radii_a[i, None]).any(dim=0)
    return PrecisionRecall(b_inside.double().mean().item(), a_inside.double().mean().item())


def kernel_distance(reference: Any, samples: Any) -> float:
    """KID (Binkowski et al. 2018): the squared maximum mean discrepancy with the kernel (x·y / D + 1)³.

    The unbiased estimate over all pairs, where other code averages over random subsets of 1000: it has no error of the
    choice, may be slightly negative, and unlike FID does not depend on the number of samples but for its noise.

    reference: [M, D], samples: [N, D], arrays or tensors on one device.

    Raises:
        ValueError: if a set has fewer than 2 points.
    """
    x, y = torch.as_tensor(reference).float(), torch.as_tensor(samples).float()
    if min(len(x), len(y)) < 2:
        raise ValueError("a kernel distance needs at least 2 images on each side")

    def total(a: Tensor, b: Tensor) -> float:
        blocks = itertools.product(_blocks(len(a), False), _blocks(len(b), False))
        return sum((a[i] @ b[j].T / a.shape[1] + 1).pow(3).sum(dtype=torch.float64).item() for i, j in blocks)

    def within(a: Tensor) -> float:
        itself = (a.square().sum(1) / a.shape[1] + 1).pow(3).sum(dtype=torch.float64).item()
        return (total(a, a) - itself) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))


def _blocks(count: int, fp16: bool) -> list[slice]:
    size = _ADM_BLOCK if fp16 else _BLOCK
    return [slice(start, start + size) for start in range(0, count, size)]


def _merge(nearest: Tensor, distances: Tensor) -> Tensor:
    """The smallest of both per row, ascending. nearest: [B, k+1]; distances: [B, M]."""
    found = distances.topk(min(nearest.shape[1], distances.shape[1]), dim=1, largest=False, sorted=False).values
    return torch.cat([nearest, found], dim=1).topk(nearest.shape[1], dim=1, largest=False).values


def _distances(a: Tensor, b: Tensor, fp16: bool) -> Tensor:
    """Squared distances |a|² - 2ab + |b|² of points [N, D] and [M, D], not below zero: float32 [N, M]."""
    x, y = (a.half(), b.half()) if fp16 else (a, b)
    norms_x, norms_y = (_half_norms(points) if fp16 else points.square().sum(dim=1) for points in (x, y))
    found = (x @ y.T).mul_(-2).add_(norms_x[:, None]).add_(norms_y).clamp_(min=0)
    if fp16 and not bool(torch.isfinite(found).all()):
        return _distances(a, b, fp16=False)
    return found.float()


def _half_norms(points: Tensor) -> Tensor:
    """Squared norms [N] of float16 points [N, D], added up in the order of TensorFlow's CPU kernel.

    That order shows in the results: lanes of 8 are summed in float16, by four interleaved accumulators per 1024
    features, and only the 8 lanes at the end in float32.
    """
    squares = points.square()
    count = squares.shape[1]
    if count > 1024:
        middle = -(-count // 16) * 8
        return _half_norms(points[:, :middle]) + _half_norms(points[:, middle:])
    lanes = torch.nn.functional.pad(squares, (0, -count % 8)).view(len(points), -1, 8)
    whole = lanes.shape[1] // 4 * 4
    accumulators = [reduce(torch.add, lanes[:, i:whole:4].unbind(1)) for i in range(min(4, whole))]
    return reduce(torch.add, [*accumulators, *lanes[:, whole:].unbind(1)]).float().sum(dim=1).half()
