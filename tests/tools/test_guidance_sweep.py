"""The guidance sweep: the best of its results, and what it does with those that are there."""

import json

import pytest

from diffit.checkpoint.resolve import find_checkpoint
from diffit.system.files import as_tree


@pytest.fixture(scope="module")
def tool():
    import guidance_sweep

    return guidance_sweep


def write_results(folder, num_samples=16):
    """A finished sweep of the bundled model over scales 1 and 2."""
    scores = {
        "constant": {"1": {"frechet": 3.0}, "2": {"frechet": 2.5}},
        "power_cosine": {"1": {"frechet": 3.0}, "2": {"frechet": 2.0}},
    }
    config = as_tree(find_checkpoint("Diffit-Fashion")[1])
    settings = {"checkpoint": config, "num_samples": num_samples, "reference": None}
    (folder / "results.json").write_text(json.dumps({"settings": settings, "scores": scores}))


def test_what_is_there_is_not_measured_again(tool, tmp_path, capsys):
    write_results(tmp_path)
    assert tool.main(["--out", str(tmp_path), "--scales", "2", "1", "--num_samples", "16", "--device", "cpu"]) == 0
    assert "best: power_cosine at scale 2, Frechet distance 2 " in capsys.readouterr().out
    assert (tmp_path / "guidance_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_another_sweep_is_refused(tool, tmp_path, capsys):
    write_results(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--out", str(tmp_path), "--scales", "1", "--num_samples", "17", "--device", "cpu"])
    assert "holds another sweep (num_samples: 16, now 17): choose another --out" in capsys.readouterr().err
