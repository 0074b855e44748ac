"""The ablations' recipes, their statistics and their report."""

import json

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from diffit.cli.train import parse_train
from diffit.models.config import build_model, model_config
from tests.conftest import ROOT

BASES = sorted((ROOT / "configs" / "ablations" / "bases").glob("*.yaml"))


@pytest.fixture(scope="module")
def tool():
    import ablations

    return ablations


@pytest.fixture(scope="module")
def report():
    import ablations_report

    return ablations_report


@pytest.mark.parametrize("base", BASES, ids=[base.stem for base in BASES])
def test_every_variant_fits_every_base(tool, base):
    """train.py takes the settings, no two variants are the same network, and only the first is the base's."""
    tree = yaml.safe_load(base.read_text())
    settings = tree.get("network", {})
    variants = tool.variants_of(tool.load_studies(), base.stem.split("_")[0])
    networks = []
    for variant in variants:
        fields = variant.settings(tree["model"], settings)
        config = parse_train(["--config", str(base), "--network", json.dumps(fields)]).config
        networks.append(model_config(config.model, **config.network))
        with torch.device("meta"):
            build_model(networks[-1])
        assert config.steps % config.keep_every == 0  # the end of the run is on the curve
    assert len(set(networks)) == len(variants) == (6 if base.stem.startswith("latent") else 12)
    assert variants[0].name == "tmsa"
    assert networks[0] == model_config(tree["model"], **settings)
    assert [variant.name for variant in variants if variant.curve] == ["tmsa", "adaln"]


def test_widths_are_multiples_of_the_base(tool):
    variants = {variant.name: variant for variant in tool.variants_of(tool.load_studies(), "image")}
    narrow = variants["narrow_time"].settings("ImageDiffit-CIFAR10", {"window_size": 8})
    assert narrow == {"window_size": 8, "cond_dim": 256}
    assert variants["wide_features"].settings("ImageDiffit-CIFAR10", {}) == {"channels": [256, 512, 512]}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_what_exceeds_the_noise_is_what_a_t_test_finds(report, count):
    found = set()
    for seed in range(40):
        differences = np.random.default_rng(seed).normal(0.7, 1, count).tolist()
        mean, error = report.mean_and_error(differences)
        assert mean == pytest.approx(np.mean(differences))
        assert error == pytest.approx(stats.sem(differences))
        significant = stats.ttest_1samp(differences, 0).pvalue < 0.05
        expected = ("worse" if mean > 0 else "better") if significant else "within the noise"
        assert report.verdict(differences) == expected
        found.add(expected)
    assert "within the noise" in found
    assert count == 2 or "worse" in found
    assert report.verdict([1.0]) == "one seed says nothing"


def test_report(tool, report, tmp_path):
    """From files as `run` leaves them: numbers, verdicts of either direction, plots, and what was not run."""
    config = {"model": "ImageDiffit-Tiny", "steps": 40, "batch_size": 8, "evaluation": {"samples": 64}}
    config |= {"sampling": {"sampler": "heun", "num_sampling_steps": 3}}
    frechet = {
        "tmsa": [2.0, 2.1, 2.2],
        "adaln": [3.0, 3.11, 3.21],
        "bias": [1.0, 3.0, 2.0],
        "window_2": [2.5, 2.5, 2.8],
    }
    for name, values in frechet.items():
        for seed, value in enumerate(values):
            folder = tmp_path / "image" / name / str(seed)
            folder.mkdir(parents=True)
            network = {"window_size": 2 if name == "window_2" else 4}
            (folder / "config.yaml").write_text(yaml.safe_dump(config | {"network": network}))
            score = {"samples": 64, "frechet": value, "accuracy": 0.5, "held_out_loss": 1.0}
            steps = {"00000040": score} | ({"00000020": score} if name in ("tmsa", "adaln") else {})
            (folder / "scores.json").write_text(json.dumps(steps))
    doc = tmp_path / "docs" / "ablations.md"
    doc.parent.mkdir()
    report.write_report(doc, [tmp_path / "image"], tool.load_studies())
    text = doc.read_text()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if " | " in line}
    assert "| 2.100 ± 0.058 |" in text
    assert "| +1.007 ± 0.003 (worse) |" in rows["DiT's modulation (adaLN)"]
    assert "(within the noise)" in rows["only in the relative position bias"]
    assert "| 3.81 | - | not run |" in rows["only in the MLP"]
    for plot in ("steps", "window_size"):
        assert f"assets/ablations_image_{plot}.png" in text
        assert (doc.parent / "assets" / f"ablations_image_{plot}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="holds no scores"):
        report.write_report(doc, [tmp_path / "docs"], tool.load_studies())
