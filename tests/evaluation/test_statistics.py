"""Scores of features against golden numbers, closed forms and direct formulas."""

import threading
import warnings

import numpy as np
import pytest
import scipy.linalg

from diffit.evaluation.statistics import Moments, SingularCovarianceWarning, accuracy, frechet_distance, inception_score
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "evaluator.npz"))


def moments_of(features, parts=1):
    moments = Moments()
    for part in np.array_split(features, parts):
        moments.update(part)
    return moments


def distance(a, b):
    return frechet_distance(a.mean, a.covariance(), b.mean, b.covariance())


def test_golden_distance(golden):
    reference, samples = moments_of(golden["eval/ref"], 7), moments_of(golden["eval/sample"], 3)
    assert distance(reference, samples) == pytest.approx(float(golden["eval/fid"]), rel=1e-8)


def test_golden_inception_score(golden):
    assert inception_score(golden["eval/probs"]) == pytest.approx(float(golden["eval/inception_score"]), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 4, 500])
def test_stream_equals_direct_formulas(parts):
    features = np.random.default_rng(0).standard_normal((1000, 6)) * [1, 2, 3, 4, 5, 1e-3] + 1e4
    moments = moments_of(features, parts)
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance(), np.cov(features, rowvar=False), rtol=1e-9, atol=1e-12)


def test_merged_parts_are_one_stream():
    """Ranks are threads here, of which each takes its part; far means lose no digits."""
    features = np.random.default_rng(1).standard_normal((300, 5)) * [1, 2, 3, 4, 1e-3] + 1e4
    parts = [moments_of(part) for part in (features[:1], features[1:11], features[11:])]
    shared, there = [[], []], threading.Barrier(3)

    def merge(part):
        calls = iter(shared)

        def add_up(array):
            own = next(calls)
            own.append(array.copy())
            there.wait()
            array[:] = sum(own)

        part.merge(add_up)
        part.update(features[:7])

    threads = [threading.Thread(target=merge, args=[part]) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = np.concatenate([features, features[:7]])
    for part in parts:
        assert part.count == 307
        np.testing.assert_allclose(part.mean, whole.mean(0), rtol=1e-14)
        np.testing.assert_allclose(part.covariance(), np.cov(whole, rowvar=False), rtol=1e-9, atol=1e-12)


def test_distance_of_commuting_gaussians():
    """For diagonal covariances the distance is a sum over axes: (m1 - m2)² + (s1 - s2)²."""
    s1, s2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    m1, m2 = np.zeros(3), np.array([1.0, -2.0, 0.0])
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(m1, np.diag(s1**2), m2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)


def test_distance_agrees_with_the_matrix_square_root():
    random = np.random.default_rng(2)
    s1, s2 = (np.cov(random.standard_normal((80, 12)) @ random.standard_normal((12, 12)), rowvar=False) for _ in "ab")
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.trace(s1 + s2 - 2 * root)
    assert frechet_distance(np.zeros(12), s1, np.zeros(12), s2) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("counts", [(20, 30), (20, 400), (99, 101)])
def test_singular_covariances_warn_and_stay_exact(counts):
    """Of centred data X, Y the trace of the root is the nuclear norm of X Yᵀ: no covariance, no square root."""
    random = np.random.default_rng(3)
    mixing = random.standard_normal((100, 100)) * np.exp(-np.arange(100) / 15)
    x, y = (random.standard_normal((count, 100)) @ mixing for count in counts)
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.sqrt((counts[0] - 1) * (counts[1] - 1))
    expected = (x**2).sum() / (counts[0] - 1) + (y**2).sum() / (counts[1] - 1)
    expected -= 2 * scipy.linalg.svdvals(x @ y.T).sum() / scale
    with pytest.warns(SingularCovarianceWarning, match="fewer samples than features"):
        assert distance(moments_of(x), moments_of(y)) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero():
    moments = moments_of(np.random.default_rng(4).standard_normal((50, 80)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularCovarianceWarning)
        assert abs(distance(moments, moments)) < 1e-10


def test_regular_covariances_do_not_warn(golden):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance(moments_of(golden["eval/ref"]), moments_of(golden["eval/sample"]))


def test_unfit_moments_are_refused():
    with pytest.raises(ValueError, match="same features"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.array([np.nan]), np.eye(1), np.zeros(1), np.eye(1))
    with pytest.raises(ValueError, match="at least 2"):
        moments_of(np.ones((1, 2))).covariance()


def test_inception_score_of_certain_and_uniform_predictions():
    assert inception_score(np.eye(10)[np.arange(100) % 10]) == pytest.approx(10)
    assert inception_score(np.full((100, 10), 0.1)) == pytest.approx(1)
    # Splits of their own: 5 classes in the first, 2 in the (shorter) second.
    split = np.eye(10)[np.r_[np.arange(10) % 5, np.arange(4) % 2]]
    assert inception_score(split, split_size=10) == pytest.approx((5 + 2) / 2)
    with pytest.raises(ValueError, match="at least one"):
        inception_score(np.zeros((0, 10)))


def test_accuracy_of_known_predictions():
    assert accuracy([[0.1, 0.9], [0.6, 0.4], [0.5, 0.5], [0.2, 0.8]], [1, 1, 0, 1]) == 0.75


@pytest.mark.filterwarnings("ignore::diffit.evaluation.statistics.SingularCovarianceWarning")
def test_a_distance_is_never_negative():
    random = np.random.default_rng(0)
    for rank in (3, 20, 200):
        features = random.standard_normal((rank, 64)) * 10 ** random.uniform(-2, 2, 64)
        mean, covariance = features.mean(0), np.cov(features, rowvar=False)
        distance = frechet_distance(mean, covariance, mean, covariance)
        assert 0 <= distance < 1e-9 * np.trace(covariance)


def test_a_covariance_that_was_rounded_is_repaired_and_another_refused():
    features = np.random.default_rng(0).standard_normal((300, 64)) * np.logspace(0, -4, 64)
    mixing = np.linalg.qr(np.random.default_rng(1).standard_normal((64, 64)))[0]
    features = features @ mixing
    mean, covariance = features.mean(0), np.cov(features, rowvar=False)
    rounded = covariance.astype(np.float16).astype(float)
    assert np.linalg.eigvalsh(rounded)[0] < 0
    with pytest.warns(SingularCovarianceWarning, match="negative eigenvalues, as after rounding"):
        distance = frechet_distance(mean, rounded, mean, covariance)
    assert 0 <= distance < 1e-3 * np.trace(covariance)
    skewed = covariance.copy()
    skewed[0, 1] += 0.1
    for wrong in (covariance - 0.1 * np.eye(64), -covariance, skewed):
        with pytest.raises(ValueError, match="covariance of the second set is not symmetric and positive"):
            frechet_distance(mean, covariance, mean, wrong)
