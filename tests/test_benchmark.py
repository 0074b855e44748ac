"""The benchmark as a user starts it, and a guard against the fast path becoming slow."""

import json
import os
import subprocess
import sys

import pytest
import torch

from diffit import load_model
from diffit.benchmark import copy_of, interleaved, measure_sampling, parse
from diffit.checkpoint.weights import CheckpointConfig
from diffit.diffusion.config import GuidanceConfig, SamplingConfig
from diffit.models.fast import fast_precision, prepare_for_sampling
from diffit.nn.attention import matmul_attention
from diffit.system.device import product_dtype
from diffit.training.estimate import measured_peak
from tests.conftest import ROOT
from tests.small_models import NETWORK, random_network

CPU = torch.device("cpu")


def test_variants_take_turns():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(variants, CPU, rounds=3, seconds=10)
    assert "".join(calls) == "ab" + "ababab"
    assert set(times) == {"a", "b"}
    calls.clear()
    interleaved(variants, CPU, rounds=100, seconds=0)
    assert "".join(calls) == "ab" + "ab"  # one counted round at least


@torch.no_grad()
def test_fast_is_not_slower_than_the_baseline():
    """A ratio of one run, in turns, with a generous bound: about 2 where the processor multiplies bf16."""
    model, _ = load_model("Diffit-Fashion")
    model.requires_grad_(False)
    precision = fast_precision(CPU)
    baseline, fast = copy_of(model, matmul_attention), prepare_for_sampling(copy_of(model), product_dtype(precision))
    x, t, y = torch.randn(32, 4, 8, 8), torch.full((32,), 500), torch.arange(32) % 11
    times = interleaved({"baseline": lambda: baseline(x, t, y), "fast": lambda: fast(x, t, y)}, CPU, 9, 60)
    assert times["baseline"] / times["fast"] > (1.15 if precision == "bf16" else 0.85)


def test_one_case(tmp_path):
    """Tables and JSON of the bundled model, with few rounds."""
    command = [sys.executable, "-m", "diffit.benchmark", "--cases", "Diffit-Fashion", "--batch_size", "2"]
    command += ["--rounds", "1", "--seconds", "300", "--device", "cpu", "--json", "out.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    shown = ("torch ", "## Diffit-Fashion", "| baseline |", "| --fast True |", "MFU", "of peak")
    assert [words for words in shown if words not in result.stdout] == []
    case = json.loads((tmp_path / "out.json").read_text())["cases"]["Diffit-Fashion"]
    sampling = {row["variant"]: row for row in case["sampling"]}
    assert sampling["baseline"]["max_error"] == sampling["baseline"]["pixels"] == 0
    assert sampling["default"]["max_error"] < 1e-4
    assert 0 < sampling["--fast True"]["rms_error"] < 0.02
    if sampling["--fast True"]["precision"] != "fp32":  # which only differs by rounding, in hardly a value
        assert 0 < sampling["--fast True"]["pixels"] < 0.5
    assert all(row["images_per_s"] > 0 for row in case["training"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--cases Diffit-Fashoin", "argument --cases: invalid choice: 'Diffit-Fashoin'"),
        ("--parts sleeping", "argument --parts: invalid choice: 'sleeping'"),
        ("--model_path x.safetensors", "belongs to one case"),
        ("--rounds 0", "must be at least 1"),
        ("--variants slow", "argument --variants: invalid choice: 'slow'"),
        ("--rounds many", "argument --rounds: invalid int value"),
    ],
)
def test_refusals(line, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(line.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_skipped_guidance_is_measured_where_it_is_skipped():
    """Of a small random network at the published guidance: fewer halves, and an error that stays small."""
    config = CheckpointConfig(
        "Diffit-S", NETWORK, sampling=SamplingConfig(num_sampling_steps=50), guidance=GuidanceConfig(4.4)
    )
    rows = measure_sampling(config, random_network(), 2, CPU, rounds=1, seconds=0)
    found = {row["variant"]: row for row in rows}
    assert found["default"]["max_error"] < 1e-4
    assert 0 < found["--fast True"]["max_error"] < 0.05
    flops = {name: row["peak_share"] * row["ms"] for name, row in found.items() if row["precision"] == "fp32"}
    assert flops["default"] == pytest.approx(flops["baseline"])
    if found["--fast True"]["precision"] == "fp32":  # 32% of the steps cost half
        assert flops["--fast True"] / flops["baseline"] == pytest.approx(0.84, abs=0.01)


def test_a_device_is_measured():
    assert measured_peak(CPU, "fp32") > 1e9
