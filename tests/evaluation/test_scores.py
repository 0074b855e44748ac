"""Scores from features: of two ranks, their standard errors by repeated sampling, and without probabilities."""

import dataclasses
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from diffit.evaluation.features import Backend
from diffit.evaluation.manifold import kernel_distance
from diffit.evaluation.scores import Reference, both_radii, collect, score_images
from diffit.system.distributed import current


def gaussian(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (count, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def reference() -> Reference:
    pool = gaussian(0, 600)
    return Reference(np.zeros(6), np.eye(6), None, pool, both_radii(pool, torch.device("cpu")), ())


# Features stand in the place of images: six to a set of class probabilities, or none.
WITH = Backend("stored", torch.device("cpu"), lambda x: (x, x.softmax(dim=1)))
WITHOUT = Backend("stored", torch.device("cpu"), lambda x: (x,))


def test_standard_errors_are_those_of_repeated_sampling(reference):
    def scores(seed: int, bootstrap: int = 0) -> dict[str, float]:
        samples = gaussian(seed, 400, shift=0.3)
        found = score_images([samples], reference, WITH, labels=samples.argmax(1) // 2, kid=True, bootstrap=bootstrap)
        return found.errors if bootstrap else found.labelled()

    repeated = [scores(seed) for seed in range(1, 41)]
    estimated = [scores(seed, bootstrap=20) for seed in range(1, 6)]
    for name in ("fid", "kid", "inception_score", "accuracy", "precision", "recall"):
        deviation = np.std([each[name] for each in repeated], ddof=1)
        assert np.mean([each[name] for each in estimated]) == pytest.approx(deviation, rel=0.4), name


def test_no_errors_are_estimated_unless_asked_for_nor_from_a_handful(reference):
    assert score_images([gaussian(1, 50)], reference, WITH).errors == {}
    with pytest.raises(ValueError, match="at least 10 samples"):
        score_images([gaussian(1, 9)], reference, WITH, bootstrap=5)


def test_features_without_probabilities_give_all_but_the_inception_score(reference):
    samples = gaussian(1, 50)
    plain, full = score_images([samples], reference, WITHOUT, kid=True), score_images([samples], reference, WITH)
    assert plain.inception_score is None
    assert plain.kid == pytest.approx(kernel_distance(reference.pool, samples))
    assert dataclasses.replace(plain, inception_score=full.inception_score, kid=None) == full


WITH_SPATIAL = Backend("stored", torch.device("cpu"), lambda x: (x, x.softmax(dim=1), x[:, :4].double() / 1000 + 100))


def collect_part(rank: int, folder: Path) -> None:
    """What each of two ranks does, of 100 images the first 30 or the others."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    own = gaussian(1, 100)[[slice(30), slice(30, None)][rank]]
    found = collect(np.array_split(own, 3), WITH_SPATIAL)
    patience = current().patient._get_backend(torch.device("cpu")).options._timeout
    assert patience > timedelta(days=1)  # rank 0 may compare features for hours
    moments = {name: getattr(found, name) for name in ("moments", "spatial")}
    assert [each.count for each in moments.values()] == [100, 100]
    rows = {name: np.vstack([each.mean, each.covariance()]) for name, each in moments.items()}
    np.savez(folder / f"{rank}.npz", pool=found.pool, probabilities=found.probabilities, **rows)
    dist.destroy_process_group()


def test_two_ranks_collect_what_one_does(tmp_path):
    torch.multiprocessing.spawn(collect_part, [tmp_path], nprocs=2)
    features = gaussian(1, 100)
    spatial = WITH_SPATIAL(features).spatial
    for rank in range(2):
        found = np.load(tmp_path / f"{rank}.npz")
        for name, seen in (("moments", features), ("spatial", spatial)):
            seen = seen.astype(np.float64)
            np.testing.assert_allclose(found[name][0], seen.mean(0), rtol=1e-12)
            np.testing.assert_allclose(found[name][1:], np.cov(seen, rowvar=False), rtol=1e-9, atol=1e-14)
        if rank == 0:
            np.testing.assert_array_equal(found["pool"], features)
            np.testing.assert_allclose(found["probabilities"], torch.from_numpy(features).softmax(1), rtol=1e-6)
