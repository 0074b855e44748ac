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
def studies():
    import studies

    return studies


@pytest.fixture(scope="module")
def report():
    import ablations_report

    return ablations_report


@pytest.mark.parametrize("base", BASES, ids=[base.stem for base in BASES])
def test_every_variant_fits_every_base(studies, base):
    """train.py takes the settings, no two variants are the same network, and only the first is the base's."""
    tree = yaml.safe_load(base.read_text())
    settings = tree.get("network", {})
    variants = list(studies.variants_for(tree["model"], studies.load_studies()).values())
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


def test_widths_are_multiples_of_the_base(studies):
    variants = studies.variants_for("ImageDiffit-CIFAR10", studies.load_studies())
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


@pytest.mark.slow
def test_report(studies, report, tmp_path):
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
    page = (ROOT / "docs" / "ablations.md").read_text()
    doc.write_text(page)
    report.write_report(doc, [tmp_path / "image"], studies.load_studies())
    text = doc.read_text()
    report.write_report(doc, [tmp_path / "image"], studies.load_studies())
    assert doc.read_text() == text
    begin, end = "<!-- costs", "<!-- end of results -->"  # the prose around what is written stays
    assert text.split(begin)[0] == page.split(begin)[0]
    assert text.split(end)[1] == page.split(end)[1]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if " | " in line}
    assert "| 2.100 ± 0.058 |" in text
    assert "| +1.007 ± 0.003 (worse) |" in rows["DiT's modulation (adaLN)"]
    assert "(within the noise)" in rows["only in the relative position bias"]
    assert "| 3.81 | - | not run |" in rows["only in the MLP"]
    for plot in ("steps", "window_size"):
        assert f"assets/ablations_image_{plot}.png" in text
        assert (doc.parent / "assets" / f"ablations_image_{plot}.png").read_bytes().startswith(b"\x89PNG")
    own = tmp_path / "image" / "ablations.md"  # where no page is named
    report.write_report(own, [tmp_path / "image"], studies.load_studies())
    assert own.read_text().split(begin)[1].split(end)[0] == text.split(begin)[1].split(end)[0].replace(
        text.split("<!-- end of costs -->")[1].split("<!-- results")[0], "\n\n"
    )
    with pytest.raises(ValueError, match="holds no scores"):
        report.write_report(doc, [tmp_path / "docs"], studies.load_studies())
    with pytest.raises(ValueError, match="has no place for costs: it needs the lines <!-- costs"):
        report.write_report(folder / "config.yaml", [], studies.load_studies())
    (folder / "scores.json").write_text(json.dumps({"00000040": score | {"samples": 65}}))
    with pytest.raises(ValueError, match=r"holds scores of \[64, 65\] samples"):
        report.write_report(doc, [tmp_path / "image"], studies.load_studies())


BASE = """
model: ImageDiffit-Tiny
network: {num_classes: 10, in_channels: 1}
steps: 2
batch_size: 4
precision: fp32
save_every: 1
keep_every: 1
tracker: none
evaluation: {samples: 8, batch_size: 8}
validation: {images: 20}
data: {name: fashion_mnist, flip: false}
codec: {vae: pixels, factor: 1}
sampling: {sampler: heun, num_sampling_steps: 2}
"""


@pytest.mark.slow
def test_run_goes_on_and_refuses_to_mix(tool, tmp_path, capsys):
    """Two variants are trained and scored; the same command does nothing, another budget or network is refused."""
    base, out = tmp_path / "base.yaml", tmp_path / "out"
    base.write_text(BASE)
    command = ["run", str(base), "--out", str(out), "--seeds", "5", "--device", "cpu", "--variants"]
    assert tool.main([*command, "tmsa", "bias"]) == 0
    paths = {name: out / name / "5" / "scores.json" for name in ("tmsa", "bias")}
    scores = {name: json.loads(path.read_text()) for name, path in paths.items()}
    assert {name: list(found) for name, found in scores.items()} == {
        "tmsa": ["00000001", "00000002"],
        "bias": ["00000002"],
    }
    last = scores["bias"]["00000002"]
    assert last["samples"] == 8
    assert 0 <= last["accuracy"] <= 1
    assert last["frechet"] > 0
    assert last["held_out_loss"] > 0
    written = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    assert tool.main([*command, "tmsa", "bias"]) == 0
    assert {name: path.stat().st_mtime_ns for name, path in paths.items()} == written
    for flags, words in (
        (["tmsa", "--steps", "3"], "bias/5 was trained with other settings (steps: 2, now 3): choose another --out"),
        (
            ["bias", "--network.num_classes", "3"],
            "bias/5 was trained with other settings (network.num_classes: 10, now 3)",
        ),
        (["tmsa", "--run_dir", "there"], "--run_dir follows from --out: leave it out"),
        (["tmsa", "--network.num_classes", "0"], "a network without classes cannot be scored by them"),
        (["sigmoid"], "ImageDiffit-Tiny has no variant 'sigmoid': choose of tmsa, "),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            tool.main([*command, *flags])
        assert words in capsys.readouterr().err
