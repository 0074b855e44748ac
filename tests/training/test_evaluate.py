"""FID while training, against the evaluator's own way: sample.py's samples of the checkpoint, then its scores."""

import numpy as np
import pytest

from diffit.cli.sample import parse_sample
from diffit.cli.train import parse_train
from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import load_reference, score_images
from diffit.sampling.generate import generate
from tests.conftest import ROOT
from tests.training.runs import log_of, run

CLASSIFIER = f"diffit.evaluation.fashion:{ROOT / 'diffit/bundled/fashion_classifier.safetensors'}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 1), dtype=np.uint8)
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, arr_0=images)
    return path


def test_scores_are_those_of_the_checkpoints_samples(flags, reference, tmp_path):
    wanted = ["--evaluation.every", "2", "--evaluation.samples", "24", "--evaluation.reference", str(reference)]
    steps = ["--steps", "4", "--save_every", "2", "--keep", "9"]
    run(flags, tmp_path / "run", *steps, *wanted, "--evaluation.features", CLASSIFIER, "--evaluation.batch_size", "24")
    run(flags, tmp_path / "plain", *steps)
    scored = {line["step"]: line for line in log_of(tmp_path / "run") if "fid" in line}
    assert sorted(scored) == [2, 4]
    last = "checkpoints/00000004/ema.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "plain" / last).read_bytes()  # it disturbs nothing
    checkpoint, out = tmp_path / "run" / last, tmp_path / "out"
    flags = f"--model_path {checkpoint} --num_samples 24 --batch_size 24 --device cpu --log_dir {out}"
    with np.load(generate(parse_sample(flags.split()))) as samples:
        images = samples["arr_0"]
    backend = create_backend("torch", features=CLASSIFIER)
    expected = score_images([images], load_reference(reference, backend, manifold=False), backend, manifold=False)
    assert scored[4]["fid"] == pytest.approx(expected.fid, rel=1e-5)
    assert scored[4]["inception_score"] == pytest.approx(expected.inception_score, rel=1e-5)
    assert scored[2]["fid"] != scored[4]["fid"]


def test_what_is_missing_is_said_before_the_first_step(flags, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_train([*flags, "--run_dir", str(tmp_path), "--evaluation.every", "2"])
    assert "--evaluation.reference" in capsys.readouterr().err
    wanted = ["--evaluation.every", "2", "--evaluation.reference", "nowhere.npz", "--evaluation.features", CLASSIFIER]
    with pytest.raises((ValueError, FileNotFoundError), match="nowhere"):
        run(flags, tmp_path / "run", *wanted)
