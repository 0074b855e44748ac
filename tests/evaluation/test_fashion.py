"""The quick start's second command: samples of the bundled model against the bundled reference, offline."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from diffit.cli.evaluate import main as evaluator_main
from diffit.data.datasets import DEBIAN_FASHION, fashion_mnist
from diffit.evaluation import fashion
from diffit.evaluation.features import create_backend
from diffit.evaluation.manifold import precision_recall
from diffit.evaluation.scores import score_images
from diffit.evaluation.statistics import frechet_distance
from tests.conftest import ROOT

LABELS = ["Inception Score", "FID", "sFID", "Precision", "Recall"]
needs_data = pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")


@pytest.fixture(scope="module")
def backend():
    return create_backend(features=fashion.FEATURES)


@pytest.fixture(scope="module")
def reference(backend):
    return fashion.bundled_reference(backend)


def save_samples(folder, images, manifest=None):
    folder.mkdir(parents=True)
    path = folder / f"samples_{len(images)}x32x32x1.npz"
    np.savez(path, arr_0=images, arr_1=np.arange(len(images)) % 10)
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_sample_then_evaluate(tmp_path):
    """As a reader of the README does it, with fewer samples and steps, in a folder of one's own."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    env["DIFFIT_CACHE"] = str(tmp_path / "empty")

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    run(sys.executable, ROOT / "sample.py", "--num_samples", "6", "--num_sampling_steps", "2", "--device", "cpu")
    done = run("bash", ROOT / "eval_run.sh", "--device", "cpu", "--json", "scores.json")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[-5:]] == LABELS
    assert all("(6 real test images: " in line for line in lines[-5:] if not line.startswith("sFID"))
    assert "sFID: not defined" in done.stdout
    for part in ("protocol: Fashion-MNIST", "fashion_reference.npz", "features: fashion-"):
        assert part in done.stdout
    assert len([line for line in done.stderr.splitlines() if line.startswith("warning: 6 samples: FID is biased")]) == 1
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["count"] == found["real_test_images"]["count"] == 6
    assert found["fid"] > found["real_test_images"]["fid"] > 0
    assert lines[-6].startswith(f"Classified as asked: {found['accuracy']:.4f}  (6 real test images: ")


def test_a_few_samples_are_scored_as_far_as_they_go(tmp_path, pictures, capsys):
    save_samples(tmp_path / "run", pictures[:3], {"settings": {"model": "Diffit-Fashion"}})
    assert evaluator_main(["--log_dir", str(tmp_path), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split(":")[0] for line in lines] == LABELS
    assert all(line.endswith("not defined, it needs more than 3 samples") for line in lines[3:])


@pytest.mark.parametrize(
    "manifest",
    [
        None,
        {"settings": {"model": "Diffit"}},
        {"settings": {"model": "Diffit-Fashion"}, "checkpoint": {"class_names": ["cat", "dog"]}},
        ["not a manifest"],
    ],
)
def test_other_samples_stay_with_adms_protocol(tmp_path, pictures, manifest, capsys):
    save_samples(tmp_path / "run", pictures[:4], manifest)
    with pytest.raises(SystemExit, match="2"):
        evaluator_main(["--log_dir", str(tmp_path), "--device", "cpu"])
    assert "no public reference for 32x32" in capsys.readouterr().err


def test_features_that_the_user_names_need_a_reference_of_their_own(tmp_path, pictures, capsys):
    save_samples(tmp_path / "run", pictures[:4], {"settings": {"model": "Diffit-Fashion"}})
    with pytest.raises(SystemExit, match="2"):
        evaluator_main(["--log_dir", str(tmp_path), "--device", "cpu", "--features", fashion.FEATURES])
    assert "no public reference for 32x32" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::diffit.evaluation.statistics.SingularCovarianceWarning")
def test_real_images_score_far_better_than_noise(backend, reference):
    """And the scores of real images improve with their number, as those of samples do."""
    few, many = (fashion.score_test_images(count, reference, backend) for count in (16, 2000))
    whole = fashion.score_test_images(2001, reference, backend)
    assert (few.count, many.count, whole.count) == (16, 2000, 10_000)
    assert whole.accuracy == pytest.approx(0.9405)  # the classifier's, as it was trained
    assert 0.92 < many.accuracy < 0.96
    assert few.fid > 10 * many.fid > 10 * whole.fid > 0
    noise = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 1), dtype=np.uint8)
    scores = score_images([noise], reference, backend)
    assert scores.fid > 100 * many.fid
    assert scores.precision < 0.1 < 0.8 < many.precision


def test_the_file_fits_the_classifier_and_is_small(backend, reference):
    assert reference.pool.shape == (10_000, 128)
    assert fashion.CLASSIFIER.stat().st_size + fashion.REFERENCE.stat().st_size < 4e6
    assert sum(path.stat().st_size for path in fashion.CLASSIFIER.parent.rglob("*") if path.is_file()) < 16e6


def test_a_reference_of_another_classifier_is_refused(backend):
    with pytest.raises(ValueError, match=r"not of other: .*tools/fashion\.py reference"):
        fashion.bundled_reference(type(backend)("other", backend.device, backend.extract))


def test_accuracy_is_the_share_of_samples_seen_as_their_labels(tmp_path, backend, pictures, capsys):
    """It needs one class number per image, and the features of the bundled classifier."""
    manifest = {"settings": {"model": "Diffit-Fashion"}}
    path = save_samples(tmp_path / "run", pictures[:40], manifest)
    probabilities = backend(pictures[:40]).probabilities
    seen = np.sort(probabilities, axis=1)[:, -1:] == probabilities  # [N, K], one True a row
    command = ["--log_dir", str(tmp_path), "--device", "cpu", "--json", str(tmp_path / "scores.json")]
    for labels, expected in ((np.arange(40) % 10, seen[np.arange(40), np.arange(40) % 10].mean()), (None, None)):
        np.savez(path, **{"arr_0": pictures[:40]} | ({} if labels is None else {"arr_1": labels}))
        assert evaluator_main(command) == 0
        assert ("Classified as asked: " in capsys.readouterr().out) == (labels is not None)
        assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == expected


@needs_data
def test_the_bundled_numbers_are_those_of_the_real_data(backend, reference):
    """1,000 training images are near the moments, and stored test features are of test images, to half precision."""
    train, test = (fashion_mnist(train=part).images for part in (True, False))
    pool = np.concatenate([backend(part).pool for part in np.split(np.concatenate([train[:500], train[-500:]]), 4)])
    distance = frechet_distance(pool.mean(0), np.cov(pool, rowvar=False), reference.mean, reference.covariance)
    assert distance < 0.1
    with np.load(fashion.REFERENCE) as file:
        stored = file["test"].astype(np.float32)
    fresh = backend(test[:64]).pool
    nearest = np.abs(fresh[:, None] - stored[None]).max(2).min(1)
    assert np.median(nearest) > 0
    assert (nearest < 2e-3).sum() >= 4  # a fifth of the test images is stored
    found = precision_recall(reference.pool, stored[:500])
    assert found.precision > 0.8
