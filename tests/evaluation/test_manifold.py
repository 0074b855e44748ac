"""Precision and recall against golden numbers and against all distances at once."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from diffit.evaluation import manifold
from diffit.evaluation.manifold import kernel_distance, manifold_radii, precision_recall
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "evaluator.npz"))


def direct(reference, samples, k=3):
    """Radii and shares from whole float64 distance matrices."""
    radii = [np.sort(cdist(x, x, "sqeuclidean"), axis=1)[:, k] for x in (reference, samples)]
    between = cdist(reference, samples, "sqeuclidean")
    return radii, ((between <= radii[0][:, None]).any(0).mean(), (between <= radii[1]).any(1).mean())


def test_half_precision_gives_golden_numbers_bit_for_bit(golden):
    """The golden numbers were made by ADM's TensorFlow code, in half precision."""
    for name in ("ref", "sample"):
        radii = manifold_radii(golden[f"eval/{name}"], fp16=True)
        np.testing.assert_array_equal(radii, golden[f"eval/radii_{name}"][:, 0])
    found = precision_recall(golden["eval/ref"], golden["eval/sample"], fp16=True)
    assert found == (float(golden["eval/precision"]), float(golden["eval/recall"]))


@pytest.mark.parametrize("block", [4096, 250])
def test_full_precision_is_exact(golden, monkeypatch, block):
    monkeypatch.setattr(manifold, "_BLOCK", block)
    reference, samples = golden["eval/ref"], golden["eval/sample"]
    radii, shares = direct(reference.astype(float), samples.astype(float))
    np.testing.assert_allclose(manifold_radii(reference), radii[0], rtol=1e-5)
    np.testing.assert_allclose(manifold_radii(samples), radii[1], rtol=1e-5)
    assert tuple(precision_recall(reference, samples)) == pytest.approx(shares, abs=1e-12)
    # And half precision stays within what is documented.
    assert tuple(precision_recall(reference, samples)) == pytest.approx(
        (float(golden["eval/precision"]), float(golden["eval/recall"])), abs=2.5e-3
    )


def test_digits_survive_a_large_mean():
    x = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    np.testing.assert_allclose(manifold_radii(x + np.float32(64)), direct(x, x)[0][0], rtol=1e-4)


def test_half_precision_that_overflows_is_computed_in_full():
    x = np.random.default_rng(1).standard_normal((60, 4)).astype(np.float32) * 300
    np.testing.assert_allclose(manifold_radii(x, fp16=True), direct(x, x)[0][0], rtol=1e-4)


def test_points_on_a_line():
    """Radii 1 and 9 (k = 1) are known; a sample on the border counts as inside."""
    reference = torch.tensor([[0.0], [1.0], [4.0]])
    np.testing.assert_allclose(manifold_radii(reference, k=1), [1, 1, 9], rtol=1e-6)
    samples = torch.tensor([[-2.0], [7.0], [8.0], [-1.0]])
    found = precision_recall(reference, samples, k=1)
    assert found.precision == pytest.approx(2 / 4)  # 7 and -1 lie on borders, -2 and 8 outside
    assert found.recall == pytest.approx(1 / 3)  # the samples' radii are 1 each: 0 is reached from -1


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("spread", [2, 4])
def test_duplicates_and_ties_count_as_inside(monkeypatch, fp16, spread):
    """Whole numbers, of which 2^n have an exact mean, have exact distances: radii of 0, and points on borders."""
    monkeypatch.setattr(manifold, "_BLOCK", 10)
    random, decided = np.random.default_rng(spread), []
    for k in (1, 3):
        for _ in range(5):
            reference, samples = (random.integers(0, spread, (count, 2)).astype(float) for count in (32, 16))
            radii, shares = direct(reference, samples, k)
            found = precision_recall(reference, samples, k, fp16=fp16)
            np.testing.assert_array_equal(manifold_radii(reference, k, fp16=fp16), radii[0])
            assert tuple(found) == pytest.approx(shares, abs=1e-12)
            between = cdist(reference, samples, "sqeuclidean")
            strict = (between < radii[0][:, None]).any(0).mean(), (between < radii[1]).any(1).mean()
            decided.append([one != other for one, other in zip(shares, strict, strict=True)])
    assert np.any(decided, axis=0).all()  # borders decide both of them


def test_too_few_points_and_other_features_are_refused():
    with pytest.raises(ValueError, match="more than 3 points"):
        manifold_radii(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="same backend"):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))


def test_kernel_distance_is_the_unbiased_estimate_over_all_pairs(golden, monkeypatch):
    x, y = golden["eval/ref"].astype(float), golden["eval/sample"].astype(float)
    kernel = {name: (a @ b.T / a.shape[1] + 1) ** 3 for name, a, b in (("xx", x, x), ("yy", y, y), ("xy", x, y))}
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel["xx"], kernel["yy"])]
    monkeypatch.setattr(manifold, "_BLOCK", 7)
    assert kernel_distance(x, y) == pytest.approx(sum(off) - 2 * kernel["xy"].mean(), rel=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(x, y[:1])
