"""Scores from features: standard errors against repeated sampling, features without probabilities."""

import dataclasses

import numpy as np
import pytest
import torch

from diffit.evaluation.features import Backend
from diffit.evaluation.manifold import kernel_distance
from diffit.evaluation.scores import Reference, both_radii, score_images


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
