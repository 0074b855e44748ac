"""The commands as users run them: scores, files, errors, processes."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from diffit.cli.evaluate import main as evaluator_main
from diffit.evaluation import downloads
from diffit.evaluation.features import create_backend
from diffit.evaluation.manifold import precision_recall
from diffit.evaluation.scores import load_reference, score_images
from diffit.evaluation.statistics import frechet_distance, inception_score
from evaluations.make_reference import main as make_reference
from tests.conftest import ROOT
from tests.evaluation.conftest import CLASSIFIER, WEIGHTS

FEATURES = ["--features", CLASSIFIER, "--device", "cpu"]


def run(*command, cwd=ROOT, **environment):
    """Run a command; Python's own files first."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def evaluator(*arguments, **environment):
    return run(sys.executable, ROOT / "evaluations/evaluator.py", *arguments, **environment)


@pytest.fixture(scope="module")
def expected(pictures):
    """Scores of the fixture's files, from the classifier's features by direct formulas."""
    backend = create_backend(features=f"{ROOT / 'diffit/evaluation/fashion.py'}:{ROOT / WEIGHTS}")
    features = backend(pictures)
    reference, samples = features.pool[:100].astype(float), features.pool[100:].astype(float)
    moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in (reference, samples)]
    return {
        "fid": frechet_distance(*moments[0], *moments[1]),
        "inception_score": inception_score(features.probabilities[100:]),
    }


@pytest.mark.filterwarnings("ignore::diffit.evaluation.statistics.SingularCovarianceWarning")
def test_the_command(files, tmp_path, expected):
    done = evaluator(*files, *FEATURES, "--json", tmp_path / "scores.json")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()[-5:]] == [
        "Inception Score",
        "FID",
        "sFID",
        "Precision",
        "Recall",
    ]
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-6)
    assert found["inception_score"] == pytest.approx(expected["inception_score"], rel=1e-6)
    assert found["sfid"] is None
    assert "FID: statistics of the 100 images of reference.npz" in done.stdout
    for warning in ("140 samples instead of 50000", "fewer samples than features"):
        assert f"{warning}" in done.stderr


_CROWDED = """
def load_features(path, device):
    def extract(images):
        pixels = images.float().flatten(1)[:, :64]
        return pixels / 255 + 20, pixels[:, :10].softmax(1)
    return extract
"""


def test_precision_and_recall_are_adms_unless_asked_otherwise(files, tmp_path, pictures, capsys):
    """Around 20 half precision rounds distances to 16: both arithmetics differ visibly. The file holds both."""
    (tmp_path / "crowded.py").write_text(_CROWDED)
    (tmp_path / "weights").touch()
    features = pictures.reshape(240, -1)[:, :64].astype(np.float32) / np.float32(255) + 20
    adm, exact = (tuple(precision_recall(features[:100], features[100:], fp16=fp16)) for fp16 in (True, False))
    assert adm != exact
    command = [*map(str, files), "--features", f"{tmp_path / 'crowded.py'}:{tmp_path / 'weights'}", "--device", "cpu"]
    for flags, printed in (([], adm), (["--pr_fp16", "True"], adm), (["--pr_fp16", "False"], exact)):
        assert evaluator_main([*command, *flags, "--json", str(tmp_path / "scores.json")]) == 0
        assert [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[-2:]] == list(printed)
        found = json.loads((tmp_path / "scores.json").read_text())
        assert (found["precision"], found["recall"]) == printed
        assert (found["precision_fp16"], found["recall_fp16"]) == adm
        assert (found["precision_exact"], found["recall_exact"]) == exact


def test_two_processes_give_the_scores_of_one(files, tmp_path):
    alone = evaluator(*files, *FEATURES, "--json", tmp_path / "1.json", "--batch_size", "64")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = ROOT / "evaluations/evaluator.py"
    both = run(*launcher, script, *files, *FEATURES, "--json", tmp_path / "2.json", "--batch_size", "33")
    assert alone.returncode == both.returncode == 0, both.stderr
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    for name in ("inception_score", "fid", "precision", "recall", "count", "precision_exact", "recall_exact"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name
    assert both.stdout.count("\nFID:") == 2  # its origin and its value, from one process


def error_of(capsys, *arguments):
    """The one line that the command prints when it gives up."""
    with pytest.raises(SystemExit, match="2"):
        evaluator_main([str(argument) for argument in arguments])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_errors_are_one_sentence(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    reference, samples = files
    truncated, full = tmp_path / "truncated.npz", tmp_path / "full.npz"
    truncated.write_bytes(samples.read_bytes()[:-100])
    np.savez(full, arr_0=np.load(reference)["arr_0"], mu=np.zeros(3), sigma=np.eye(3))
    json_file = ("--json", tmp_path / "no" / "scores.json")
    assert "not a whole .npz" in error_of(capsys, reference, truncated, *FEATURES)
    assert "swapped" in error_of(capsys, samples, full, *FEATURES)
    assert "absent.npz does not exist" in error_of(capsys, reference, tmp_path / "absent.npz", *FEATURES)
    assert "make it first" in error_of(capsys, reference, samples, *FEATURES, *json_file)
    assert "no function load_features" in error_of(capsys, reference, samples, "--features", f"json:{samples}")
    assert "write MODULE:CHECKPOINT" in error_of(capsys, reference, samples, "--features", "classifier.py")
    assert "weights x.pb do not exist" in error_of(capsys, reference, samples, "--weights", "x.pb", "--device", "cpu")


@pytest.mark.filterwarnings("ignore::diffit.evaluation.statistics.SingularCovarianceWarning")
def test_a_reference_of_moments_alone_gives_fid(files, tmp_path, expected, pictures, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    backend = create_backend(features=CLASSIFIER)
    pool = backend(pictures[:100]).pool.astype(float)
    moments = {"mu": pool.mean(0), "sigma": np.cov(pool, rowvar=False), "features": np.array(backend.name)}
    path, report = tmp_path / "stats.npz", tmp_path / "scores.json"
    np.savez(path, **moments)
    assert evaluator_main([str(path), str(files[1]), *FEATURES, "--json", str(report)]) == 0
    out = capsys.readouterr().out
    for score in ("sFID", "Precision", "Recall"):
        assert f"{score}: not defined, it needs a reference that holds images" in out
    found = json.loads(report.read_text())
    assert found["fid"] == pytest.approx(expected["fid"], rel=1e-6)
    assert (found["precision"], found["recall_exact"], found["sfid"]) == (None, None, None)
    for wrong, message in (
        ({"features": np.array("others")}, "statistics of other features and no images"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "moments of 5 features, "),
        ({"mu": np.full(128, np.nan)}, "mu and sigma are damaged or do not fit"),
        ({"mu": np.zeros(7)}, "mu and sigma are damaged or do not fit"),
    ):
        np.savez(path, **moments | wrong)
        assert message in error_of(capsys, path, files[1], *FEATURES)
    assert "holds 0 images" in error_of(capsys, path, path, *FEATURES)
    with pytest.raises(SystemExit, match="2"):
        make_reference([str(path), str(tmp_path / "out.npz"), *FEATURES])
    assert "holds statistics and no images" in capsys.readouterr().err


def test_a_folder_and_a_zip_score_as_the_npz(files, tmp_path, pictures, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(ROOT)
    (tmp_path / "png").mkdir()
    for number, image in enumerate(pictures[100:]):
        Image.fromarray(image[..., 0]).save(tmp_path / "png" / f"{number:03d}.png")
    with zipfile.ZipFile(tmp_path / "png.zip", "w") as archive:
        for path in (tmp_path / "png").iterdir():
            archive.write(path, path.name)
    scores = []
    for samples in (files[1], tmp_path / "png", tmp_path / "png.zip"):
        report = tmp_path / "scores.json"
        assert evaluator_main([str(files[0]), str(samples), *FEATURES, "--json", str(report)]) == 0
        found = json.loads(report.read_text())
        scores.append({name: found[name] for name in ("fid", "inception_score", "precision", "recall", "count")})
    assert scores[0] == scores[1] == scores[2]


def sample_folder(path, images, **settings):
    """What sample.py leaves: images and, beside them, how they were made."""
    path.mkdir(parents=True)
    np.savez(path / f"samples_{len(images)}x32x32x1.npz", arr_0=images)
    (path / "manifest.json").write_text(json.dumps({"settings": settings, "complete": True}))
    return path


@pytest.mark.filterwarnings("ignore::diffit.evaluation.statistics.SingularCovarianceWarning")
def test_several_samples_in_one_table(files, tmp_path, pictures, monkeypatch, capsys):
    """The scores are those of each alone; only settings that differ are shown, '-' where none are known."""
    monkeypatch.chdir(ROOT)
    common = {"seed": 0, "sampling": {"sampler": "ddim", "eta": 0.5}}
    noisy = pictures[:90] // 2 + np.random.default_rng(0).integers(0, 99, (90, 32, 32, 1), dtype=np.uint8)
    given = [
        sample_folder(tmp_path / "noisy", noisy, **common, num_samples=90, weights_sha256="0123456789abcdef"),
        sample_folder(tmp_path / "runs/like", pictures[:90], **common, num_samples=90, weights_sha256="f" * 64),
        files[1],
        sample_folder(tmp_path / "other", 255 - pictures[:90], **common | {"seed": 1}, weights_sha256="f" * 64),
    ]
    report, alone = tmp_path / "scores.json", {}
    for path in given:
        assert evaluator_main([str(files[0]), str(path), *FEATURES, "--json", str(report)]) == 0
        alone[str(path)] = json.loads(report.read_text())
    capsys.readouterr()
    command = [str(files[0]), "--compare", *map(str, given), *FEATURES, "--json", str(report)]
    assert evaluator_main(command) == 0
    printed, found = capsys.readouterr(), json.loads(report.read_text())
    lines = [line.split() for line in printed.out.rpartition("\n\n")[2].splitlines()]
    assert " ".join(lines[0]) == "FID Inception Score Precision Recall count seed weights_sha256 samples"
    ranked = sorted(given, key=lambda path: alone[str(path)]["fid"])
    assert ranked[0] == given[1]
    settings = {given[0]: ["0", "0123456789ab"], given[1]: ["0", "f" * 12], given[3]: ["1", "f" * 12]}
    for path, line, row in zip(ranked, lines[1:], found["compared"], strict=True):
        one = alone[str(path)]
        scores = [
            f"{one['fid']:.2f}",
            f"{one['inception_score']:.2f}",
            *(f"{one[k]:.4f}" for k in ("precision", "recall")),
        ]
        assert line == [*scores, str(one["count"]), *settings.get(path, ["-", "-"]), one["samples"]]
        assert {name: one[name] for name in row if name != "settings"} == {
            k: v for k, v in row.items() if k != "settings"
        }
        assert row["settings"]["weights_sha256"] in (None, "0123456789abcdef", "f" * 64)
    assert "the samples differ in number" in printed.err


def test_what_cannot_be_compared_is_one_sentence(files, tmp_path, pictures, capsys):
    (tmp_path / "unfinished/png").mkdir(parents=True)
    (tmp_path / "unfinished/manifest.json").write_text('{"settings": {}, "complete": false}')
    broken = sample_folder(tmp_path / "broken", pictures)
    (broken / "manifest.json").write_text("{")
    for paths, words in (
        ([tmp_path / "unfinished"], "unfinished holds unfinished samples: run its sample.py command again"),
        ([broken], "manifest.json is damaged"),
        ([tmp_path / "absent"], "absent does not exist"),
        ([files[1], "--log_dir", tmp_path], "leave SAMPLES, --log_dir and --self_test out"),
    ):
        assert words in error_of(capsys, files[0], "--compare", *paths, *FEATURES)
    assert "leave SAMPLES, " in error_of(capsys, *files, "--compare", files[1], *FEATURES)


@pytest.mark.parametrize("value", ["0", "-3", "x", "1.5"])
def test_a_batch_size_that_cannot_be(files, value, capsys):
    with pytest.raises(SystemExit):
        evaluator_main([*map(str, files), "--batch_size", value])
    assert "at least 1" in capsys.readouterr().err


def test_json_that_cannot_be_written_is_said_first_or_costs_no_scores(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert "a folder stands there" in error_of(capsys, *files, *FEATURES, "--json", tmp_path)

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffit.cli.evaluate.write_atomically", full)
    with pytest.raises(SystemExit, match="2"):
        evaluator_main([*map(str, files), *FEATURES, "--json", str(tmp_path / "a.json")])
    printed = capsys.readouterr()
    assert "\nFID: " in printed.out
    assert "a.json (the disk is full): free some space" in printed.err


def test_found_without_arguments(tmp_path, pictures, monkeypatch, capsys):
    """The newest samples; there is no public reference for 32 pixels, and none is reachable for 256."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(downloads.URLS, downloads.REFERENCES[256], "http://127.0.0.1:9/reference.npz")
    (tmp_path / "logs" / "run").mkdir(parents=True)
    assert "there is no samples_*.npz under" in error_of(capsys)
    np.savez(tmp_path / "logs" / "samples_4x32x32x1.npz", arr_0=pictures[:4])
    assert "no public reference for 32x32" in error_of(capsys)
    newest = tmp_path / "logs" / "run" / "samples_4x256x256x3.npz"
    np.savez(newest, arr_0=np.zeros((4, 256, 256, 3), np.uint8))
    os.utime(newest, (2**32, 2**32))
    assert f"put it at {tmp_path / 'cache' / downloads.REFERENCES[256]}" in error_of(capsys)


def test_shell_script_works_from_any_folder(tmp_path):
    done = run("bash", ROOT / "eval_run.sh", "reference.npz", "samples.npz", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: samples.npz does not exist" in done.stderr


@pytest.mark.parametrize("script", ["evaluator", "make_reference"])
def test_help_from_a_foreign_folder(script, tmp_path):
    done = run(sys.executable, ROOT / "evaluations" / f"{script}.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--features" in done.stdout


def test_reference_from_folder_and_zip(tmp_path, pictures, expected, monkeypatch, capsys):
    """Made of a folder or a .zip, a reference gives the scores of the images themselves."""
    from PIL import Image

    monkeypatch.chdir(ROOT)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for number, image in enumerate(pictures[:100]):
        Image.fromarray(image[..., 0]).save(tmp_path / "images" / "sub" / f"{number:03d}.png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((tmp_path / "images").rglob("*.png")):
            archive.write(path, path.name)
    np.savez(tmp_path / "samples.npz", arr_0=pictures[100:])
    for source in ("images", "images.zip"):
        out = tmp_path / "out.npz"
        assert make_reference([str(tmp_path / source), str(out), "--num_images", "60", *FEATURES]) == 0
        with np.load(out) as made:
            assert made["arr_0"].shape == (60, 32, 32, 1)
            assert (made["arr_0"][:, None] == pictures[None, :100]).all((2, 3, 4)).any(1).all()
        arguments = [out, tmp_path / "samples.npz", *FEATURES, "--json", tmp_path / "scores.json"]
        assert evaluator_main([str(argument) for argument in arguments]) == 0
        assert "statistics stored in out.npz" in capsys.readouterr().out
        found = json.loads((tmp_path / "scores.json").read_text())
        assert found["fid"] == pytest.approx(expected["fid"], rel=1e-6)


@pytest.mark.filterwarnings("ignore::diffit.evaluation.statistics.SingularCovarianceWarning")
def test_from_training(files, expected, pictures, monkeypatch):
    """The callable: any batch sizes, a reference that is loaded once."""
    monkeypatch.chdir(ROOT)
    backend = create_backend(features=CLASSIFIER)
    reference = load_reference(files[0], backend, manifold=False)
    for cuts in ([50], [1, 2, 139]):
        scores = score_images(np.split(pictures[100:], cuts), reference, backend, manifold=False)
        assert scores.fid == pytest.approx(expected["fid"], rel=1e-6)
        assert (scores.count, scores.precision, scores.sfid) == (140, None, None)
    with pytest.raises(ValueError, match="no images"):
        score_images([], reference, backend)
    with pytest.raises(ValueError, match="manifold=True"):
        score_images([pictures[100:]], reference, backend)
    with pytest.raises(ValueError, match="32x32 images, got 16x32"):
        backend(pictures[:4, :16])


def test_stored_statistics_of_other_features_are_not_used(files, pictures, monkeypatch):
    monkeypatch.chdir(ROOT)
    np.savez(files[0], arr_0=pictures[:100], mu=np.zeros(2048), sigma=np.eye(2048))  # Inception's, as ADM's files
    reference = load_reference(files[0], create_backend(features=CLASSIFIER), manifold=False)
    assert reference.mean.shape == (128,)
    assert reference.origin == ("FID: statistics of the 100 images of reference.npz",)


def test_without_inception_it_is_said_what_works_offline(files, tmp_path, monkeypatch, capsys):
    """And what is said first does work."""
    monkeypatch.setenv("DIFFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setitem(downloads.URLS, downloads.INCEPTION_GRAPH, "http://127.0.0.1:9/graph.pb")
    out = str(tmp_path / "out.npz")
    with pytest.raises(SystemExit, match="2"):
        make_reference([str(files[1]), out, "--device", "cpu"])
    error = capsys.readouterr().err
    for words in ("--features fashion", "--features dinov2:FILE", "--features MODULE[:FILE]"):
        assert words in error
    assert make_reference([str(files[1]), out, "--device", "cpu", "--features", "fashion"]) == 0
    with np.load(out) as made:
        assert str(made["features"]) == create_backend(features=CLASSIFIER).name


def test_wrong_sources_are_refused(tmp_path, monkeypatch, capsys):
    """What is no data set, and images of several sizes, end in one sentence; --image_size mends the latter."""
    from PIL import Image

    monkeypatch.chdir(ROOT)
    (tmp_path / "images").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"PK")
    out = str(tmp_path / "out.npz")
    for source, message in (
        (tmp_path / "images", "holds no images"),
        (tmp_path / "broken.zip", "neither a folder nor a readable ZIP"),
        (tmp_path / "absent.zip", "there are no images at"),
        ("torchvision:Nothing", "no data set 'Nothing'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            make_reference([str(source), out, *FEATURES])
        assert message in capsys.readouterr().err
    for number, size in enumerate([(40, 64), (32, 32), (90, 70), (33, 47)]):
        Image.effect_noise(size, 80).save(tmp_path / "images" / f"{number}.png")
    with pytest.raises(SystemExit, match="2"):
        make_reference([str(tmp_path / "images"), out, *FEATURES])
    assert "--image_size to bring all to one size" in capsys.readouterr().err
    assert make_reference([str(tmp_path / "images"), out, "--image_size", "32", *FEATURES]) == 0
    assert np.load(out)["arr_0"].shape == (4, 32, 32, 1)
