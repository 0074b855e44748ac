"""The benchmark as a user starts it, and a guard against the fast path becoming slow."""

import json
import subprocess
import sys

import pytest
import torch

from diffit import load_model
from diffit.benchmark.cases import Case
from diffit.benchmark.plain import twin, with_plain_attention
from diffit.benchmark.roofline import Device, count_work
from diffit.benchmark.sampling import SamplingBenchmark
from diffit.benchmark.timing import interleaved
from diffit.checkpoint import CheckpointConfig
from diffit.cli.benchmark import CASES, parse_benchmark
from diffit.codec import PixelCodec
from diffit.diffusion.config import GuidanceConfig, SamplingConfig
from diffit.fast import fast_network, fast_precision
from tests.small_models import NETWORK, random_network

CPU = torch.device("cpu")


def test_ways_take_turns():
    calls = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = interleaved(ways, CPU, rounds=3, seconds=10)
    assert "".join(calls) == "ab" + "ababab"
    assert times["a"].peak_memory is None
    calls.clear()
    interleaved(ways, CPU, rounds=100, seconds=0)
    assert "".join(calls) == "ab" + "ab"  # one counted round at least


@torch.no_grad()
def test_fast_is_not_slower_than_plain():
    """A ratio of one run, in turns, with a generous bound: about 2 where the processor multiplies bf16."""
    model, _ = load_model("Diffit-Fashion")
    model.requires_grad_(False)
    precision = fast_precision(CPU)
    plain, fast = with_plain_attention(twin(model)), fast_network(twin(model), [500], precision, CPU)
    x, t, y = torch.randn(32, 4, 8, 8), torch.full((32,), 500), torch.arange(32) % 11
    times = interleaved({"plain": lambda: plain(x, t, y), "fast": lambda: fast(x, t, y)}, CPU, 9, 60)
    assert times["plain"].seconds / times["fast"].seconds > (1.15 if precision == "bf16" else 0.85)


def test_one_case(tmp_path):
    """Tables, roofline and JSON of the bundled model, with few rounds."""
    command = [sys.executable, "-m", "diffit.benchmark", "--cases", "Diffit-Fashion", "--batch_size", "2"]
    command += ["--rounds", "1", "--seconds", "300", "--device", "cpu", "--json", "out.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    shown = ("PyTorch", "## Diffit-Fashion", "| plain |", "| --fast True |", "Roofline", "goes: ", "MFU", "| all |")
    assert [words for words in shown if words not in result.stdout] == []
    case = json.loads((tmp_path / "out.json").read_text())["cases"]["Diffit-Fashion"]
    sampling = {row["way"]: row for row in case["sampling"]}
    assert sampling["plain"]["max_error"] == sampling["plain"]["pixels"] == 0
    assert sampling["default (fused attention)"]["max_error"] < 1e-4
    assert 0 < sampling["--fast True"]["rms_error"] < 0.02
    assert 0 < sampling["--fast True"]["pixels"] < 0.5
    assert sum(case["profile"].values()) == pytest.approx(1)
    assert any(0.1 < case["profile"].get(name, 0) < 0.9 for name in ("addmm", "mkldnn::_linear_pointwise"))
    assert all(row["images_per_s"] > 0 for row in case["training"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--cases Diffit-Fashoin", "--cases Diffit-Fashoin is unknown"),
        ("--parts sleeping", "choose of sampling, training"),
        ("--model_path x.safetensors", "belongs to one case"),
        ("--rounds 0", "must be at least 1"),
    ],
)
def test_refusals(line, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_benchmark(line.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_the_known_cases_are_those_that_can_be_made():
    from diffit.benchmark.cases import CASES as MADE

    assert tuple(MADE) == CASES


def test_skipped_guidance_is_measured_where_it_is_skipped():
    """Of a small random network at the published guidance: fewer halves, and an error below the bound's."""
    checkpoint = CheckpointConfig(
        "Diffit-S", NETWORK, sampling=SamplingConfig(num_sampling_steps=50), guidance=GuidanceConfig(4.4)
    )
    case = Case("small", checkpoint, 2, trained=False)
    pixels = PixelCodec()
    peak, work = Device(1e12, 1e10), count_work(NETWORK, 1)
    benchmark = SamplingBenchmark(case, random_network(), (pixels, pixels), CPU, lambda _: peak, work, compiled=False)
    rows = {row.way: row for row in benchmark.run(rounds=1, seconds=0)}
    assert 0.3 < benchmark.skipped_share() < 0.34
    plain, skipped = rows["default (fused attention)"], rows["+ guidance skipped"]
    assert plain.max_error < skipped.max_error < 0.05
    work_of = {way: row.peak_share * row.ms_per_call for way, row in rows.items() if row.peak_share}
    assert work_of["+ guidance skipped"] / work_of["plain"] == pytest.approx(1 - benchmark.skipped_share() / 2)
