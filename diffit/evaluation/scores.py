"""All scores together: features of images, gathered over ranks, compared with a reference.

Every rank calls `score_images` with its own share of the images, and every rank gets the scores of all of them.
Letters: N images, B of a batch, D features, K classes, S spatial features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from tqdm import tqdm

from diffit.distributed import World, on_main
from diffit.evaluation.features import INCEPTION, Backend
from diffit.evaluation.manifold import precision_recall
from diffit.evaluation.reader import ImageFile, Images
from diffit.evaluation.statistics import Floats, Moments, frechet_distance, inception_score


@dataclass(frozen=True)
class Scores:
    """The five numbers of ADM; None where a backend has no spatial features, or the manifold was left out."""

    inception_score: float
    fid: float
    sfid: float | None
    precision: float | None
    recall: float | None
    count: int  # N, the samples they are of


@dataclass
class Collected:
    """What is kept of a stream of images: enough for every score, but not the images."""

    pool: NDArray[np.float32]  # [N, D]
    probabilities: NDArray[np.float32]  # [N, K]
    moments: Moments  # of pool
    spatial: Moments  # empty where a backend has none


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; `origin` says in words where each statistic comes from."""

    mean: Floats  # [D]
    covariance: Floats  # [D, D]
    spatial: tuple[Floats, Floats] | None  # mean [S] and covariance [S, S]
    pool: NDArray[np.float32] | None  # [M, D], for precision and recall
    origin: tuple[str, ...]


def _world() -> World:
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


def share(count: int) -> tuple[int, int]:
    """The part start, ..., stop - 1 of `count` images that belongs to this rank; parts are in order of the ranks."""
    world = _world()
    return count * world.rank // world.size, count * (world.rank + 1) // world.size


def collect(
    batches: Iterable[Images], backend: Backend, total: int | None = None, title: str = "features"
) -> Collected:
    """Run the backend over this rank's batches of uint8 images [B, H, W, C]; total: their N, for a progress bar.

    What is returned holds the images of all ranks, in their order, on rank 0; elsewhere those of the rank alone.

    Raises:
        ValueError: if there are no images, or a feature is NaN or infinite.
    """
    pool, probabilities, moments, spatial = [], [], Moments(), Moments()
    with tqdm(total=total, desc=title, unit="img", disable=total is None or not _world().is_main, leave=False) as bar:
        for batch in batches:
            features = backend(batch)
            if not np.isfinite(features.pool).all():
                raise ValueError(f"the features ({backend.name}) of some images are NaN or infinite: check the weights")
            pool.append(features.pool)
            probabilities.append(features.probabilities)
            moments.update(features.pool)
            if features.spatial is not None:
                spatial.update(features.spatial)
            bar.update(len(batch))
    if not pool:
        raise ValueError("there are no images to take features of")
    return _gather(Collected(np.concatenate(pool), np.concatenate(probabilities), moments, spatial))


def _gather(mine: Collected) -> Collected:
    """All ranks' parts as one, on rank 0; elsewhere the rank's own."""
    world = _world()
    if world.size == 1:
        return mine
    parts = [mine] * world.size if world.is_main else None
    dist.gather_object(mine, parts, dst=0)
    if parts is None:
        return mine
    for part in parts[1:]:
        mine.moments.merge(part.moments)
        mine.spatial.merge(part.spatial)
    mine.pool = np.concatenate([part.pool for part in parts])
    mine.probabilities = np.concatenate([part.probabilities for part in parts])
    return mine


def score_images(
    batches: Iterable[Images],
    reference: Reference,
    backend: Backend,
    manifold: bool = True,
    pr_fp16: bool = False,
    total: int | None = None,
) -> Scores:
    """Scores of images against a reference that was loaded with the same backend.

    batches: this rank's share, uint8 [B, H, W, C] in any batch sizes; manifold: also precision and recall, whose
    cost grows with N²; pr_fp16: those in ADM's half precision; total: images of this rank, shows progress bars.

    Raises:
        ValueError: if there are no images, or reference and samples do not fit.
    """
    found = collect(batches, backend, total, "sample features")
    return on_main(_world(), lambda: _scores(found, reference, backend.device, manifold, pr_fp16, total is not None))


def _scores(
    found: Collected, reference: Reference, device: torch.device, manifold: bool, pr_fp16: bool, progress: bool
) -> Scores:
    names = ("reference", "samples")
    fid = frechet_distance(reference.mean, reference.covariance, found.moments.mean, found.moments.covariance(), names)
    sfid = precision = recall = None
    if found.spatial.count and reference.spatial is not None:
        sfid = frechet_distance(*reference.spatial, found.spatial.mean, found.spatial.covariance(), names)
    if manifold:
        if reference.pool is None:
            raise ValueError("the reference was loaded without its images' features: load it with manifold=True")
        reference_pool, pool = (torch.from_numpy(x).to(device) for x in (reference.pool, found.pool))
        precision, recall = precision_recall(reference_pool, pool, fp16=pr_fp16, progress=progress)
    return Scores(inception_score(found.probabilities), fid, sfid, precision, recall, found.moments.count)


def load_reference(
    path: str | Path, backend: Backend, manifold: bool = True, batch_size: int = 64, progress: bool = False
) -> Reference:
    """A reference file's statistics: those stored in it where they are of this backend's features, else of its images.

    manifold: also the features of its images, for precision and recall. Call it once and keep the result.

    Raises:
        FileNotFoundError, ValueError: see `ImageFile`; ValueError also if stored statistics do not fit together.
    """
    file = ImageFile(path)
    stored, spatial_stored = _stored(file, "mu", "sigma", backend), _stored(file, "mu_s", "sigma_s", backend)
    found: Collected | None = None
    if manifold or stored is None or (spatial_stored is None and backend.name == INCEPTION):
        start, stop = share(file.count)
        batches = file.batches(batch_size, start, stop)
        found = collect(batches, backend, stop - start if progress else None, "reference features")
    origin: list[str] = []

    def chosen(score: str, names: str, kept: tuple[Floats, Floats] | None, own: Moments) -> tuple[Floats, Floats]:
        if kept is not None:
            origin.append(f"{score}: statistics stored in {file.path.name} ({names}), of its whole data set")
            return kept
        origin.append(f"{score}: statistics of the {file.count} images of {file.path.name}")
        return own.mean, own.covariance()

    def reference() -> Reference:
        own, own_spatial = (found.moments, found.spatial) if found else (Moments(), Moments())
        moments, spatial = chosen("FID", "mu, sigma", stored, own), None
        if spatial_stored is not None or own_spatial.count:
            spatial = chosen("sFID", "mu_s, sigma_s", spatial_stored, own_spatial)
        if manifold:
            origin.append(f"Precision, Recall: the {file.count} images of {file.path.name}")
        return Reference(*moments, spatial, found.pool if manifold and found else None, tuple(origin))

    return on_main(_world(), reference)


def _stored(file: ImageFile, mean_name: str, covariance_name: str, backend: Backend) -> tuple[Floats, Floats] | None:
    """Moments stored in a file, if they are of this backend's features. ADM's files do not say whose they are."""
    features = file.array("features")
    if (INCEPTION if features is None else str(features)) != backend.name:
        return None
    mean, covariance = file.array(mean_name), file.array(covariance_name)
    if mean is None or covariance is None:
        return None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{file.path}: {mean_name} {list(mean.shape)} and {covariance_name} {list(covariance.shape)} do not fit "
            "together: make the reference again"
        )
    return mean.astype(np.float64), covariance.astype(np.float64)
