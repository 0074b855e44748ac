"""One case after the other: measured, printed, kept."""

from __future__ import annotations

import functools
import gc
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from diffit.benchmark import table
from diffit.benchmark.cases import Case, case_codecs, create_case
from diffit.benchmark.roofline import Device, Work, count_work, measure_device
from diffit.benchmark.sampling import SamplingBenchmark
from diffit.benchmark.training import TrainingBenchmark
from diffit.cli.benchmark import BenchmarkConfig
from diffit.device import Precision, product_dtype, resolve_device, set_matmul_precision
from diffit.fast import compiles
from diffit.files import write_atomically

Peak = Callable[[Precision], Device]


def run(config: BenchmarkConfig) -> None:
    """Measure what a config asks for, print tables, and write the JSON after every case.

    Raises:
        ValueError: in one sentence, for everything that a user can mend.
    """
    device = resolve_device(config.device)
    torch._dynamo.config.cache_size_limit = 64  # many networks of one class are compiled here, each in its own way
    found: dict[str, Any] = {"machine": machine(device), "cases": {}}
    print(table.machine_line(found["machine"]))

    @functools.cache
    def peak(precision: Precision) -> Device:
        set_matmul_precision(precision)
        return measure_device(device, product_dtype(precision))

    for name in config.cases:
        found["cases"][name] = _run_case(name, config, device, peak)
        if config.json:
            write_atomically(Path(config.json), json.dumps(found, indent=2).encode())


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    return {"device": name, "kind": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _run_case(name: str, config: BenchmarkConfig, device: torch.device, peak: Peak) -> dict[str, Any]:
    torch.manual_seed(0)
    case, model = create_case(name, device, config.model_path)
    if config.batch_size is not None:
        case = replace(case, batch_size=config.batch_size)
    work = count_work(case.checkpoint.network, 1)
    print(f"\n## {name}\n")
    found: dict[str, Any] = {"batch_size": case.batch_size, "gmac_per_image": work.flops / 2e9}
    with tempfile.TemporaryDirectory() as folder:
        if "sampling" in config.parts:
            found |= _sampling(case, model, Path(folder) / "vae", config, device, peak, work)
        _forget()
        if "training" in config.parts:
            found |= _training(case, model, Path(folder), config, device, peak, work)
    del model
    _forget()
    return found


def _sampling(
    case: Case, model: Any, folder: Path, config: BenchmarkConfig, device: torch.device, peak: Peak, work: Work
) -> dict[str, Any]:
    model.requires_grad_(False)
    codecs = case_codecs(case, folder, device, config.compile or compiles(device))
    benchmark = SamplingBenchmark(case, model, codecs, device, peak, work, config.compile)
    rows = benchmark.run(config.rounds, config.seconds)
    fast = next(row for row in rows if row.way == "--fast True")
    work = count_work(case.checkpoint.network, (2 if case.guided else 1) * case.batch_size)
    line = table.roofline(work, peak(fast.precision), fast)
    print(table.sampling_table(case, benchmark.num_calls(), benchmark.skipped_share(), rows))
    shares = benchmark.profile()
    decoding = [] if case.is_image else [table.decoding(benchmark.decoding)]
    print("", *decoding, line, table.profile(shares), sep="\n", flush=True)
    measured = {"sampling": [asdict(row) for row in rows], "decoding": benchmark.decoding}
    return measured | {"roofline": line, "profile": shares}


def _training(
    case: Case, model: Any, folder: Path, config: BenchmarkConfig, device: torch.device, peak: Peak, work: Work
) -> dict[str, Any]:
    if device.type == "cuda" and config.batch_size is None:
        case = replace(case, batch_size=2 * case.batch_size)  # as many at once as guided sampling has
    benchmark = TrainingBenchmark(case, model, device, peak, work, config.compile, folder)
    rows = benchmark.run(config.rounds, config.seconds)
    print(table.training_table(case, rows), flush=True)
    return {"training": [asdict(row) for row in rows]}


def _forget() -> None:
    """Give back what no way holds any more."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
