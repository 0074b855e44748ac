"""All scores together: features of images, gathered over processes, compared with a reference.

From training, with the reference made ready once and a batch of generated images at a time:

    backend = create_backend("torch", device=device)
    reference = load_reference("VIRTUAL_imagenet256_labeled.npz", backend)
    scores = score_images(batches, reference, backend, manifold=False)   # batches: iterable of uint8 [B, H, W, C]
    scores.fid

Every process calls `score_images` with its own share of the images, and every process gets the scores of all of them.
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

from diffit.evaluation.backends import INCEPTION, Backend
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
    spatial: Moments | None


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; `origin` says in words where each statistic comes from."""

    mean: Floats  # [D]
    covariance: Floats  # [D, D]
    spatial_mean: Floats | None  # [S]
    spatial_covariance: Floats | None  # [S, S]
    pool: NDArray[np.float32] | None  # [M, D], for precision and recall
    origin: tuple[str, ...]


def share(count: int) -> tuple[int, int]:
    """The part start, ..., stop - 1 of `count` images that belongs to this process; parts are in order of the ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return count * rank // size, count * (rank + 1) // size


def collect(
    batches: Iterable[Images], backend: Backend, total: int | None = None, title: str = "features"
) -> Collected:
    """Run the backend over batches of uint8 images [B, H, W, C]; total: N of this process, for a progress bar.

    Raises:
        ValueError: if there are no images, or a feature is NaN or infinite.
    """
    pool, probabilities, moments, spatial = [], [], Moments(), Moments()
    hidden = total is None or (dist.is_initialized() and dist.get_rank() > 0)
    with tqdm(total=total, desc=title, unit="img", disable=hidden, leave=False) as bar:
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
    return Collected(np.concatenate(pool), np.concatenate(probabilities), moments, spatial if spatial.count else None)


def _gather(mine: Collected) -> Collected | None:
    """All processes' parts as one, in the order of the ranks, on rank 0; None elsewhere."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    parts: list[Collected] | None = [mine] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts, dst=0)
    if parts is None:
        return None
    for part in parts[1:]:
        mine.moments.merge(part.moments)
        if mine.spatial is not None and part.spatial is not None:
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

    batches: this process's share, uint8 [B, H, W, C] in any batch sizes; manifold: also precision and recall, whose
    cost grows with N²; pr_fp16: those in ADM's half precision; total: images of this process, shows progress bars.

    Raises:
        ValueError: if there are no images, or reference and samples do not fit.
    """
    found = _gather(collect(batches, backend, total, "sample features"))
    scores = None if found is None else _scores(found, reference, backend.device, manifold, pr_fp16, total is not None)
    if dist.is_initialized() and dist.get_world_size() > 1:
        shared = [scores]
        dist.broadcast_object_list(shared, src=0)
        scores = shared[0]
    assert scores is not None
    return scores


def _scores(
    found: Collected, reference: Reference, device: torch.device, manifold: bool, pr_fp16: bool, progress: bool
) -> Scores:
    names = ("reference", "samples")
    fid = frechet_distance(reference.mean, reference.covariance, found.moments.mean, found.moments.covariance(), names)
    sfid = None
    if found.spatial is not None and reference.spatial_mean is not None and reference.spatial_covariance is not None:
        mean, covariance = found.spatial.mean, found.spatial.covariance()
        sfid = frechet_distance(reference.spatial_mean, reference.spatial_covariance, mean, covariance, names)
    precision = recall = None
    if manifold:
        if reference.pool is None:
            raise ValueError("the reference was loaded without its images' features: load it with manifold=True")
        reference_pool, pool = (torch.from_numpy(x).to(device) for x in (reference.pool, found.pool))
        precision, recall = precision_recall(reference_pool, pool, fp16=pr_fp16, progress=progress)
    score = inception_score(found.probabilities)
    return Scores(score, fid, sfid, precision, recall, found.moments.count)


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
    found = None
    if manifold or stored is None or (spatial_stored is None and backend.name == INCEPTION):
        start, stop = share(file.count)
        batches = file.batches(batch_size, start, stop)
        found = _everywhere(
            _gather(collect(batches, backend, stop - start if progress else None, "reference features"))
        )
    if stored is None:
        assert found is not None
        stored = found.moments.mean, found.moments.covariance()
        origin = [f"FID: statistics of the {file.count} images of {file.path.name}"]
    else:
        origin = [f"FID: statistics stored in {file.path.name} (mu, sigma), of its whole data set"]
    if spatial_stored is not None:
        origin.append(f"sFID: statistics stored in {file.path.name} (mu_s, sigma_s), of its whole data set")
    elif found is not None and found.spatial is not None:
        spatial_stored = found.spatial.mean, found.spatial.covariance()
        origin.append(f"sFID: statistics of the {file.count} images of {file.path.name}")
    if manifold:
        origin.append(f"Precision, Recall: the {file.count} images of {file.path.name}")
    spatial_mean, spatial_covariance = spatial_stored or (None, None)
    pool = found.pool if manifold and found is not None else None
    return Reference(*stored, spatial_mean, spatial_covariance, pool, tuple(origin))


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


def _everywhere(found: Collected | None) -> Collected | None:
    """What rank 0 has, on every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        shared = [found]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
    return found
