"""The sweep: axes, what is measured again, what is called alike; rows have the scores of sample.py's samples."""

import json

import numpy as np
import pytest

from diffit import ImageSampler
from diffit.evaluation.fashion import FEATURES, bundled_reference
from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import score_images

FEW = ("--num_samples", "12", "--batch_size", "6", "--bootstrap", "3", "--device", "cpu", "--num_sampling_steps", "2")


@pytest.fixture(scope="module")
def tool():
    import sweep

    return sweep


def test_rows_have_the_scores_of_the_samples_and_are_not_measured_again(tool, tmp_path, capsys, monkeypatch):
    arguments = ["cfg_scale=1,3", "guidance.interval=,100 900", *FEW, "--out", str(tmp_path)]
    tool.main(arguments)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 4
    printed = capsys.readouterr().out
    assert "best: python sample.py --cfg_scale" in printed
    assert (tmp_path / "sweep.md").read_text().strip() in printed
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")

    pictures = ImageSampler.load("Diffit-Fashion", device="cpu").with_settings(num_sampling_steps=2, cfg_scale=3.0)
    labels = pictures.labels(range(12), 0)
    images = [pictures.draw(part, labels[part.start : part.stop]).numpy() for part in (range(6), range(6, 12))]
    backend = create_backend(features=FEATURES)
    expected = score_images(images, bundled_reference(backend), backend, labels=labels.numpy(), bootstrap=3)
    (row,) = (row for key, row in rows.items() if "--cfg_scale 3" in key and "interval" not in key)
    assert row["scores"] == pytest.approx(expected.labelled())
    assert row["errors"] == pytest.approx(expected.errors)

    monkeypatch.setattr(tool, "score", None)
    tool.main(arguments)  # nothing is left to score
    with pytest.raises(SystemExit, match="2"):
        tool.main([*arguments, "--bootstrap", "4"])
    assert "holds another sweep (bootstrap: 3, now 4): choose another --out" in capsys.readouterr().err


def test_differences_within_the_noise_are_called_so(tool):
    rows = [{"a": str(i), "scores": {"fid": fid}, "errors": {"fid": 0.3}} for i, fid in enumerate((5.0, 5.8, 6.0))]
    verdicts = [line.split("|")[-2].strip() for line in tool.table(rows, ["a"]).splitlines()[2:]]
    assert verdicts == ["", "+0.8, alike", "+1, worse"]
    assert 2 * np.hypot(0.3, 0.3) == pytest.approx(0.849, abs=1e-3)


def test_all_rows_are_checked_before_the_first_is_sampled(tool, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.main(["cfg_scale=1,nan", *FEW, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        tool.main(["cfg_scale", *FEW])
    assert "'cfg_scale' is no axis: write NAME=VALUE,VALUE" in capsys.readouterr().err
