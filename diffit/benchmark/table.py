"""What was measured, as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffit.benchmark.cases import Case
from diffit.benchmark.roofline import Device, Work
from diffit.benchmark.sampling import Row as SamplingRow
from diffit.benchmark.training import Row as TrainingRow

_BYTES = {"bf16": 2, "fp16": 2}


def machine_line(machine: dict[str, Any]) -> str:
    threads = f", {machine['threads']} threads" if machine["kind"] == "cpu" else ""
    return f"{machine['device']}{threads}, PyTorch {machine['torch']}"


def sampling_table(case: Case, num_calls: int, skipped: float, rows: Sequence[SamplingRow]) -> str:
    """Of one case; what was not measured is a dash."""
    guided = f"guided at {case.guidance.scale:g}" if case.guided else "unguided"
    weights = "trained" if case.trained else "random"
    share = f", of which guidance may be skipped in {skipped:.0%}" if skipped else ""
    head = (
        f"Sampling, {guided}, batch {case.batch_size}, {num_calls} calls of the network by {case.sampling.sampler}"
        f"{share}; {weights} weights. Errors are against the plain path.\n"
    )
    columns = (
        "way | precision | ms per call | faster | of peak | images/s | whole batch, s | faster | memory | max error | "
        "RMS error | uint8 values that differ"
    )
    lines = [
        [
            row.way,
            row.precision,
            f"{row.ms_per_call:.4g}",
            f"{row.speedup:.2f}x",
            _percent(row.peak_share),
            _number(row.images_per_s),
            _number(row.end_to_end_s),
            "-" if row.end_to_end_speedup is None else f"{row.end_to_end_speedup:.2f}x",
            _gigabytes(row.peak_memory),
            _number(row.max_error, 2),
            _number(row.rms_error, 2),
            "-" if row.pixels is None else f"{row.pixels:.2%}",
        ]
        for row in rows
    ]
    return head + "\n" + _markdown(columns.split(" | "), lines)


def decoding(seconds: dict[str, float]) -> str:
    """Of a batch, plain and fast."""
    plain, fast = seconds["plain"], seconds["fast"]
    return f"Decoding a batch: {1e3 * fast:.3g} ms, plain {1e3 * plain:.3g} ms ({plain / fast:.2f}x faster)."


def training_table(case: Case, rows: Sequence[TrainingRow]) -> str:
    """Of one case."""
    head = f"\nTraining, batch {case.batch_size}: optimizer steps on cached data, averages included.\n"
    columns = "way | precision | ms per step | faster | images/s | MFU | memory"
    lines = [
        [
            row.way,
            row.precision,
            f"{row.ms_per_step:.4g}",
            f"{row.speedup:.2f}x",
            _number(row.images_per_s),
            _percent(row.mfu),
            _gigabytes(row.peak_memory),
        ]
        for row in rows
    ]
    return head + "\n" + _markdown(columns.split(" | "), lines)


def roofline(work: Work, device: Device, fast: SamplingRow) -> str:
    """Counted work of one call against what the device can do, and the gap."""
    moved = work.values * _BYTES.get(fast.precision, 4)
    bound = max(work.flops / device.flops, moved / device.bandwidth)
    limit = "operations" if work.flops / device.flops >= moved / device.bandwidth else "bytes"
    return (
        f"Roofline of one call: {work.flops / 2e9:,.4g} GMAC and {moved / 1e9:.3g} GB ({fast.precision}), counted "
        f"from shapes; the device reaches {device.flops / 1e12:.3g} TFLOP/s in large products and "
        f"{device.bandwidth / 1e9:.3g} GB/s in large copies, both measured: at least {1e3 * bound:.4g} ms, bound by "
        f"{limit}. --fast True takes {fast.ms_per_call / 1e3 / bound:.2f} times that."
    )


def profile(shares: dict[str, float]) -> str:
    """Of a call of the fast network."""
    parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return f"Where the time of a call of --fast True goes: {parts}."


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _gigabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f} GB"
