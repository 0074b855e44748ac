"""All scores together: features of images, gathered over ranks, compared with a reference.

Every rank calls `score_images` with its own share of the images, and every rank gets the scores of all of them.
Letters: N images, B of a batch, D features, K classes, S spatial features.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray

from diffit.evaluation.features import INCEPTION, Backend
from diffit.evaluation.manifold import kernel_distance, manifold_radii, precision_recall
from diffit.evaluation.reader import Images, ImageSource, open_images
from diffit.evaluation.statistics import (
    Floats,
    Moments,
    SingularCovarianceWarning,
    accuracy,
    frechet_distance,
    inception_score,
)
from diffit.system.console import progress
from diffit.system.distributed import current, on_all, on_main

Gaussian = tuple[Floats, Floats]  # mean [D] and covariance [D, D]
_STORED = {"FID": ("mu", "sigma"), "sFID": ("mu_s", "sigma_s")}  # score -> its moments in a reference file


def _metric(label: str, needs: str = "", digits: int = 4) -> Any:
    """A score: its label, what it needs where it is expected and not there, and its decimals in a table."""
    return field(default=None, metadata={"label": label, "needs": needs, "digits": digits})


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The accuracy and the five numbers of ADM, in its order; None where one is not defined or was left out."""

    accuracy: float | None = _metric("Classified as asked")  # by the classifier, where the labels are its classes
    inception_score: float | None = _metric("Inception Score", "class probabilities", digits=2)
    fid: float = _metric("FID", digits=2)
    kid: float | None = _metric("KID")
    sfid: float | None = _metric("sFID", "Inception's spatial features", digits=2)
    precision: float | None = _metric("Precision", "more than 3 samples")  # in half precision, as published numbers are
    recall: float | None = _metric("Recall", "more than 3 samples")
    precision_exact: float | None = None  # with distances in float32
    recall_exact: float | None = None
    count: int  # N, the samples they are of
    errors: dict[str, float] = field(default_factory=dict)  # standard errors over samples, by field, if asked for

    def labelled(self) -> dict[str, float]:
        """The scores that have a label and are defined, by field."""
        values = {name: getattr(self, name) for name in LABELS}
        return {name: value for name, value in values.items() if value is not None}


LABELS: dict[str, str] = {each.name: each.metadata["label"] for each in fields(Scores) if each.metadata}
NEEDS: dict[str, str] = {each.name: each.metadata["needs"] for each in fields(Scores) if each.metadata}
DIGITS: dict[str, int] = {each.name: each.metadata["digits"] for each in fields(Scores) if each.metadata}


@dataclass
class Collected:
    """What is kept of a stream of images: enough for every score, but not the images."""

    pool: NDArray[np.float32]  # [N, D]
    probabilities: NDArray[np.float32]  # [N, K]; K is 0 where the features come without
    moments: Moments  # of pool
    spatial: Moments  # empty where a backend has none


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; `origin` says in words where each statistic comes from."""

    mean: Floats  # [D]
    covariance: Floats  # [D, D]
    spatial: Gaussian | None  # mean [S] and covariance [S, S]
    pool: NDArray[np.float32] | None  # [M, D], for precision and recall
    radii: NDArray[np.float32] | None  # [2, M] of pool, as `manifold_radii` has them: in ADM's arithmetic, and exact
    origin: tuple[str, ...]


def share(count: int) -> tuple[int, int]:
    """The part start, ..., stop - 1 of `count` images that belongs to this rank; parts are in order of the ranks."""
    world = current()
    return count * world.rank // world.size, count * (world.rank + 1) // world.size


def collect(
    batches: Iterable[Images], backend: Backend, total: int | None = None, title: str = "features"
) -> Collected:
    """Run the backend over this rank's batches of uint8 images [B, H, W, C]; total: their N, for a progress bar.

    Moments are those of the images of all ranks; the rest is so on rank 0, in their order, and elsewhere of its own.

    Raises:
        ValueError: if there are no images, or a feature is NaN or infinite.
    """
    world = current()

    def collect_own() -> Collected:
        pool, probabilities, moments, spatial = [], [], Moments(), Moments()
        show = total is not None and world.is_main
        with progress(title=title, show=show, total=total, unit="img", leave=False) as bar:
            for batch in batches:
                features = backend(batch)
                if not np.isfinite(features.pool).all():
                    raise ValueError(f"features ({backend.name}) of some images are NaN or infinite: check the weights")
                pool.append(features.pool)
                none = np.empty((len(batch), 0), np.float32)
                probabilities.append(none if features.probabilities is None else features.probabilities)
                moments.update(features.pool)
                if features.spatial is not None:
                    spatial.update(features.spatial)
                bar.update(len(batch))
        if not pool:
            raise ValueError("there are no images to take features of")
        return Collected(np.concatenate(pool), np.concatenate(probabilities), moments, spatial)

    mine = on_all(world, collect_own)
    if world.size > 1:
        for moments in (mine.moments, mine.spatial) if mine.spatial.count else (mine.moments,):
            moments.merge(lambda array: dist.all_reduce(torch.from_numpy(array.ravel("K"))))  # in place
        parts: Any = [None] * world.size if world.is_main else None
        dist.gather_object((mine.pool, mine.probabilities), parts, dst=0)
        if parts:
            mine.pool, mine.probabilities = map(np.concatenate, zip(*parts, strict=True))
    return mine


def score_images(
    batches: Iterable[Images],
    reference: Reference,
    backend: Backend,
    manifold: bool = True,
    total: int | None = None,
    labels: ArrayLike | None = None,
    kid: bool = False,
    bootstrap: int = 0,
) -> Scores:
    """Scores of images against a reference that was loaded with the same backend.

    batches: this rank's share, uint8 [B, H, W, C] in any batch sizes; manifold: also precision and recall, whose
    cost grows with N²; total: images of this rank, shows progress bars; labels: [N] of the images of all ranks, in
    classes of the backend, for the accuracy; kid: also the kernel distance, whose cost grows with N² too; bootstrap:
    from how many random halves of the samples standard errors are estimated, 0 for none.

    Raises:
        ValueError: if there are no images, or reference and samples do not fit.
    """
    found = collect(batches, backend, total, "sample features")
    names, show = ("reference", "samples"), total is not None
    targets = None if labels is None else np.asarray(labels)
    if (manifold or kid) and reference.pool is None:
        raise ValueError("the reference was loaded without its images' features: load it with manifold=True")

    def scores_of(chosen: NDArray[np.int64], covariance: Floats, mean: Floats, show: bool) -> dict[str, float]:
        """What features alone give, of some of the samples."""
        probabilities = found.probabilities[chosen]
        scores = {"fid": frechet_distance(reference.mean, reference.covariance, mean, covariance, names)}
        if probabilities.shape[1]:
            scores["inception_score"] = inception_score(probabilities)
        if targets is not None:
            scores["accuracy"] = accuracy(probabilities, targets[chosen])
        if manifold or kid:
            real, pool = (torch.from_numpy(part).to(backend.device) for part in (reference.pool, found.pool[chosen]))
        if kid:
            scores["kid"] = kernel_distance(real, pool)
        radii: Any = reference.radii if manifold and reference.radii is not None else []
        for kind, fp16, own in zip(("", "_exact"), (True, False), radii, strict=False):
            shares = precision_recall(real, pool, fp16=fp16, progress=show, reference_radii=own)
            scores |= {f"precision{kind}": shares.precision, f"recall{kind}": shares.recall}
        return scores

    def compare() -> Scores:
        """What rank 0 makes of all ranks' features."""
        count, sfid = found.moments.count, None
        if found.spatial.count and reference.spatial is not None:
            sfid = frechet_distance(*reference.spatial, found.spatial.mean, found.spatial.covariance(), names)
        whole = scores_of(np.arange(count), found.moments.covariance(), found.moments.mean, show)
        if bootstrap and count < 10:
            raise ValueError(f"standard errors need at least 10 samples, not {count}")
        # Over random halves of one set a score varies as much as that of whole sets does from set to set: the jackknife
        # that deletes half (Shao & Wu 1989). Drawing with replacement would give precision and recall their duplicates.
        draw, halves = np.random.default_rng(0), []
        for _ in progress(range(bootstrap), "standard errors", show=show, leave=False):
            half, moments = draw.permutation(count)[: count // 2], Moments()
            moments.update(found.pool[half])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SingularCovarianceWarning)  # of all samples it was said
                halves.append(scores_of(half, moments.covariance(), moments.mean, False))
        errors = {name: float(np.std([half[name] for half in halves], ddof=1)) for name in whole if halves}
        return Scores(count=count, sfid=sfid, errors=errors, **whole)

    return on_main(current(), compare)


def load_reference(
    source: str | Path | ImageSource,
    backend: Backend,
    manifold: bool = True,
    batch_size: int = 64,
    progress: bool = False,
) -> Reference:
    """A reference's statistics: those stored in it where they are of this backend's features, else of its images.

    manifold: also the features of its images, for precision and recall. Call it once and keep the result.

    Raises:
        FileNotFoundError, ValueError: see `open_images`.
    """
    file = open_images(source) if isinstance(source, str | Path) else source
    features, stored = file.array("features"), dict[str, Gaussian]()
    if (INCEPTION if features is None else str(features)) == backend.name:  # ADM's files do not say whose they are
        for score, names in _STORED.items():
            mean, covariance = (file.array(name) for name in names)
            if mean is not None and covariance is not None:
                if covariance.shape != mean.shape * 2 or not np.isfinite(mean.sum() + covariance.sum()):
                    raise ValueError(f"{file.path}: {names[0]} and {names[1]} are damaged or do not fit: make it again")
                stored[score] = mean.astype(np.float64), covariance.astype(np.float64)
    found: Collected | None = None
    if not file.count:
        if "FID" not in stored:
            raise ValueError(f"{file.path} holds statistics of other features and no images: make a reference anew")
    elif manifold or "FID" not in stored or ("sFID" not in stored and backend.name == INCEPTION):
        start, stop = share(file.count)
        batches = file.batches(batch_size, start, stop)
        found = collect(batches, backend, stop - start if progress else None, "reference features")

    def reference() -> Reference:
        images, origin, moments = f"the {file.count} images of {file.path.name}", [], dict(stored)
        computed = {"FID": found.moments, "sFID": found.spatial} if found else {}
        for score, names in _STORED.items():
            if score in stored:
                kept = f"stored in {file.path.name} ({', '.join(names)}), of its whole data set"
                origin.append(f"{score}: statistics {kept}")
            elif score in computed and computed[score].count:
                moments[score] = computed[score].mean, computed[score].covariance()
                origin.append(f"{score}: statistics of {images}")
        pool = radii = None
        if manifold and found:
            pool, radii = found.pool, both_radii(found.pool, backend.device, progress)
            origin.append(f"Precision, Recall: {images}")
        return Reference(*moments["FID"], moments.get("sFID"), pool, radii, tuple(origin))

    return on_main(current(), reference)


def both_radii(pool: NDArray[np.float32], device: torch.device, progress: bool = False) -> NDArray[np.float32]:
    """Radii [2, M] of features [M, D]: in ADM's half precision, and exact."""
    points = torch.from_numpy(pool).to(device)
    return np.stack([manifold_radii(points, fp16=fp16, progress=progress) for fp16 in (True, False)])
