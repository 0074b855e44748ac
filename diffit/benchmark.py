"""How fast sampling and training are: python -m diffit.benchmark --cases Diffit-Fashion

Baseline, default and `--fast True` take turns in one run, so that a machine that slows down slows all of them alike;
what is printed are medians, with errors against the baseline. The baseline is float32 (TF32 on a GPU), attention as the
products softmax(Q K^T / sqrt(D) + B) V, both halves of guidance at every step, nothing compiled.

Letters: B images of a batch.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from diffit.checkpoint import load_weights
from diffit.cli.parser import fail
from diffit.codec import create_codec
from diffit.config import Precision
from diffit.device import autocast, resolve_device, set_matmul_precision
from diffit.diffusion import SampleNoise, create_process, create_sampler, guided_model
from diffit.diffusion.config import SKIP_BELOW
from diffit.files import write_atomically
from diffit.models.config import build_model
from diffit.models.fast import compiles, fast_network, fast_precision
from diffit.nn.attention import TMSA, matmul_attention
from diffit.sampling.images import sample_batch
from diffit.sources import BUNDLED, CheckpointConfig, default_config, find_checkpoint
from diffit.training.ema import EMA
from diffit.training.estimate import estimate, measured_peak

# Name -> (model, side of its images or None for its own, images at once on a GPU, on a CPU).
CASES: dict[str, tuple[str, int | None, int, int]] = {
    "Diffit-256": ("Diffit", 256, 16, 1),
    "Diffit-512": ("Diffit", 512, 8, 1),
    "ImageDiffit-CIFAR10": ("ImageDiffit-CIFAR10", None, 128, 8),
    "ImageDiffit-FFHQ64": ("ImageDiffit-FFHQ64", None, 64, 2),
    "Diffit-Fashion": ("Diffit-Fashion", None, 256, 16),
}
PARTS = ("sampling", "training")
_SEED = 0


@dataclass(frozen=True)
class Case:
    """A model with its settings; `trained` says whether its weights are, others are random."""

    name: str
    config: CheckpointConfig
    batch_size: int  # before guidance doubles it
    trained: bool

    @property
    def guided(self) -> bool:
        guidance = self.config.guidance
        return self.config.network.num_classes > 0 and guidance.enabled and guidance.scale != 1


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call and, on CUDA, the most bytes it needs beside what there was."""

    seconds: float
    peak_memory: int | None


@dataclass(frozen=True)
class Row:
    """What was measured of a variant; what was not measured is None.

    Args:
        ms: milliseconds of a guided call (the mean over the sampler's steps), or of an optimizer step.
        speedup: over the baseline.
        peak_share: of the measured peak of matrix products; of training that is the MFU.
        whole_batch_s: seconds from noise to images of a batch.
        whole_batch_speedup: over the baseline's.
        max_error, rms_error: of the prediction, against the baseline's.
        pixels: share of the images' uint8 values that differ from the baseline's.
    """

    variant: str
    precision: Precision
    ms: float
    speedup: float
    images_per_s: float
    peak_share: float
    peak_memory: int | None = None
    whole_batch_s: float | None = None
    whole_batch_speedup: float | None = None
    max_error: float | None = None
    rms_error: float | None = None
    pixels: float | None = None


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[str, Timing]:
    """Time calls in turn; the first calls of each, which compile and record CUDA graphs, are not counted.

    Args:
        rounds: counted calls of each, at most.
        seconds: no further round starts once the counted ones took this long; there is always one.
    """
    memory = {name: _peak_memory(call, device) for name, call in calls.items()}
    for _ in range(2 if device.type == "cuda" else 0):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            _synchronize(device)
            begin = time.perf_counter()
            call()
            _synchronize(device)
            times[name].append(time.perf_counter() - begin)
        if time.perf_counter() - start > seconds:
            break
    return {name: Timing(median(times[name]), memory[name]) for name in calls}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def _peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        call()
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def create_case(name: str, device: torch.device, weights: str | None = None) -> tuple[Case, nn.Module]:
    """A case and its network in eval mode: with the weights of a file or the bundled ones, else with random ones.

    Raises:
        ValueError: if the file holds another network.
    """
    model_name, image_size, *sizes = CASES[name]
    trained = weights is not None or model_name in BUNDLED
    if trained:
        source, config = find_checkpoint(model_name, weights, image_size)
        model = load_weights(source.fetch(), config)
    else:
        config = default_config(model_name, image_size)
        model = build_model(config.network)
        head: Any = getattr(model, "head", None) or model.get_submodule("final_layer.linear")
        nn.init.xavier_uniform_(head.weight.detach().flatten(1))  # it starts at zero, and so would all predictions
    batch_size = sizes[0] if device.type == "cuda" else sizes[1]
    return Case(name, config, batch_size, trained), model.eval().to(device)


def _copy_of(model: nn.Module) -> nn.Module:
    """A network of the same weights in the same memory; to replace a layer of one does not touch the other."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def with_matmul_attention(model: nn.Module) -> nn.Module:
    """The baseline's network: attention as its products, in place."""
    for module in model.modules():
        if isinstance(module, TMSA):
            module.attention = matmul_attention
    return model


@torch.no_grad()
def measure_sampling(case: Case, model: nn.Module, device: torch.device, rounds: int, seconds: float) -> list[Row]:
    """Guided calls of the network and, where they are affordable, whole batches."""
    model.requires_grad_(False)
    exact: Precision = "tf32" if device.type == "cuda" else "fp32"
    low = fast_precision(device)
    skipping = case.config
    if case.config.process_config.num_timesteps is not None:
        skipping = replace(case.config, guidance=replace(case.config.guidance, skip_below=SKIP_BELOW))
    variants: dict[str, tuple[Any, CheckpointConfig, Precision]] = {
        "baseline": (with_matmul_attention(_copy_of(model)), case.config, exact),
        "default": (_copy_of(model), case.config, exact),
        f"{low} autocast": (autocast(_copy_of(model), device, low), case.config, low),
        "--fast True": (fast_network(_copy_of(model), low, device), skipping, low),
    }
    if low == exact:
        del variants[f"{low} autocast"]
    network, batch = case.config.network, case.batch_size
    noise = SampleNoise(_SEED, range(batch), (network.in_channels, network.input_size, network.input_size), device)
    labels, x = noise.labels(max(network.num_classes, 1)), noise.start()
    sampler = create_sampler(case.config.process_config, case.config.sampling)
    times = _visited_times(sampler, case, device)

    def denoiser(name: str) -> Any:
        call, config, _ = variants[name]
        return guided_model(
            call, labels, network.num_classes, config.guidance, config.process_config, network.input_size
        )

    def call(name: str, t: float) -> Tensor:
        set_matmul_precision(variants[name][2])
        guided = denoiser(name)
        guided = guided.at(t) if hasattr(guided, "at") else guided
        return guided(x, torch.full((batch,), t, device=device)).float()

    # Guidance that may be skipped costs half: both kinds of call are timed, and weighted by the sampler's steps.
    guided_fast = denoiser("--fast True")
    skipped = [t for t in times if case.guided and guided_fast.at(t) is not guided_fast]
    late, share = min(times), len(skipped) / len(times)
    calls = {name: partial(call, name, late) for name in variants}
    if skipped:
        calls["skipped"] = partial(call, "--fast True", max(times))
    found = interleaved(calls, device, rounds, seconds)
    probes = sorted(times)[:: max(1, len(times) // 3)]
    rows = []
    for name, (_, _, precision) in variants.items():
        second, halves = found[name].seconds, 2.0 if case.guided else 1.0
        if skipped and name == "--fast True":
            second = (1 - share) * second + share * found["skipped"].seconds
            halves -= share
        error = torch.stack([call(name, t) - call("baseline", t) for t in probes])
        flops = halves * batch * estimate(network).flops / 3  # of a forward pass alone
        rows.append(
            Row(
                name,
                precision,
                1e3 * second,
                found["baseline"].seconds / second,
                batch / (len(times) * second),
                flops / second / _peak(device, precision),
                found[name].peak_memory,
                max_error=error.abs().max().item(),
                rms_error=error.square().mean().sqrt().item(),
            )
        )
    if case.trained and sum(len(times) * row.ms / 1e3 for row in rows) < seconds:
        rows = _with_whole_batches(case, variants, sampler, labels, rows, device, rounds, seconds)
    return rows


def _visited_times(sampler: Any, case: Case, device: torch.device) -> list[float]:
    """The times at which the sampler asks its model, once a call, from a dry walk over one zero image."""
    times: list[float] = []
    channels = case.config.network.in_channels * (2 if getattr(case.config.network, "learn_sigma", False) else 1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        times.append(t[0].item())
        return x.new_zeros(len(x), channels, *x.shape[2:])

    z = torch.zeros(1, case.config.network.in_channels, 2, 2, device=device)
    for _ in sampler(model, z, z.clone):
        pass
    return times


def _with_whole_batches(
    case: Case,
    variants: dict[str, tuple[Any, CheckpointConfig, Precision]],
    sampler: Any,
    labels: Tensor,
    rows: list[Row],
    device: torch.device,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """The rows with whole batches measured too, and their images compared with the baseline's."""
    codec = create_codec(case.config.codec, device)

    images: dict[str, Tensor] = {}

    def sample(name: str) -> None:
        network, config, precision = variants[name]
        set_matmul_precision(precision)
        images[name] = sample_batch(network, config, sampler, codec, range(case.batch_size), labels, seed=_SEED)

    found = interleaved({name: partial(sample, name) for name in variants}, device, max(1, rounds // 2), seconds)
    return [
        replace(
            row,
            whole_batch_s=found[row.variant].seconds,
            whole_batch_speedup=found["baseline"].seconds / found[row.variant].seconds,
            pixels=(images[row.variant] != images["baseline"]).float().mean().item(),
        )
        for row in rows
    ]


def measure_training(case: Case, model: nn.Module, device: torch.device, rounds: int, seconds: float) -> list[Row]:
    """Whole optimizer steps: forward, loss, backward, AdamW, EMA."""
    model.requires_grad_(True)
    if hasattr(model, "pos_embed"):
        model.pos_embed.requires_grad_(False)
    process = create_process(case.config.process_config)
    network, batch = case.config.network, case.batch_size
    generator = torch.Generator().manual_seed(_SEED)
    shape = (batch, network.in_channels, network.input_size, network.input_size)
    x_start, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    t = torch.full((batch,), 0.5 if case.config.process != "gaussian" else 500, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    exact: Precision = "tf32" if device.type == "cuda" else "fp32"
    low = fast_precision(device)
    ema = EMA(model)

    def step(call: Any, optimizer: torch.optim.Optimizer, precision: Precision) -> None:
        set_matmul_precision(precision)
        process.training_losses(lambda x, t: call(x, t, y), x_start, t, noise).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(model, 0.999)

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, fused=device.type != "mps")
    variants: dict[str, tuple[Any, Precision]] = {"baseline": (model, exact)}
    if low != exact:
        variants[f"{low} autocast"] = (autocast(model, device, low), low)
    if compiles(device):
        compiled: Any = torch.compile(model)
        variants["compiled"] = (compiled, exact)
        variants[f"compiled, {low} autocast"] = (autocast(compiled, device, low), low)
    calls = {name: partial(step, call, optimizer, precision) for name, (call, precision) in variants.items()}
    found = interleaved(calls, device, rounds, seconds)
    rows = []
    for name, (_, precision) in variants.items():
        second = found[name].seconds
        share = estimate(network).flops * batch / second / _peak(device, precision)
        speedup = found["baseline"].seconds / second
        rows.append(Row(name, precision, 1e3 * second, speedup, batch / second, share, found[name].peak_memory))
    return rows


@cache
def _peak(device: torch.device, precision: Precision) -> float:
    """Operations a second that the device reaches in large matrix products at this precision."""
    set_matmul_precision(precision)
    return measured_peak(device, precision)


def table(rows: Sequence[Row], training: bool) -> str:
    """Rows as a Markdown table; what was not measured is a dash."""
    columns = {
        "variant": lambda row: row.variant,
        "precision": lambda row: row.precision,
        "ms per step" if training else "ms per call": lambda row: f"{row.ms:.4g}",
        "speed-up": lambda row: f"{row.speedup:.2f}x",
        "images/s": lambda row: f"{row.images_per_s:.3g}",
        "MFU" if training else "of peak": lambda row: f"{row.peak_share:.0%}",
        "memory": lambda row: _or_dash(row.peak_memory and row.peak_memory / 1e9, "{:.2f} GB"),
    }
    if not training:
        columns |= {
            "whole batch": lambda row: _or_dash(row.whole_batch_s, "{:.3g} s"),
            "its speed-up": lambda row: _or_dash(row.whole_batch_speedup, "{:.2f}x"),
            "max error": lambda row: _or_dash(row.max_error, "{:.2g}"),
            "RMS error": lambda row: _or_dash(row.rms_error, "{:.2g}"),
            "uint8 values that differ": lambda row: _or_dash(row.pixels, "{:.2%}"),
        }
    lines = [list(columns), ["---"] * len(columns), *([column(row) for column in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def machine(device: torch.device) -> dict[str, Any]:
    """What is measured on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor or platform.machine()
    return {"device": name, "kind": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Resolve the command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m diffit.benchmark", description=__doc__, exit_on_error=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cases", nargs="+", default=list(CASES), help=f"the models, of {', '.join(CASES)}")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help="sampling, training or, by default, both")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--batch_size", type=int, help="images at once; by default what suits case and device")
    parser.add_argument("--model_path", help="weights of the one case that is named; by default random or bundled ones")
    parser.add_argument("--rounds", type=int, default=9, help="counted turns of every variant, at most (default: 9)")
    parser.add_argument("--seconds", type=float, default=120, help="no new round starts after these (default: 120)")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    try:
        args = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        fail(f"{error}; {parser.prog} --help lists all settings")
    for name, known in (("cases", tuple(CASES)), ("parts", PARTS)):
        for value in getattr(args, name):
            if value not in known:
                fail(f"--{name} {value} is unknown: choose of {', '.join(known)}")
    if args.model_path and len(args.cases) != 1:
        fail("--model_path belongs to one case: name it with --cases")
    if args.rounds < 1 or (args.batch_size is not None and args.batch_size < 1):
        fail("--rounds and --batch_size must be at least 1")
    return args


def run(args: argparse.Namespace) -> None:
    """Measure, print tables, and write the JSON after every case.

    Raises:
        ValueError: in one sentence, for everything that a user can mend.
    """
    device = resolve_device(args.device)
    found: dict[str, Any] = {"machine": machine(device), "cases": {}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    for name in args.cases:
        torch.manual_seed(_SEED)
        case, model = create_case(name, device, args.model_path)
        if args.batch_size is not None:
            case = replace(case, batch_size=args.batch_size)
        guided = f"guided at {case.config.guidance.scale:g}" if case.guided else "unguided"
        macs = estimate(case.config.network).flops / 6e9
        weights = "trained" if case.trained else "random"
        print(f"\n## {name}\n\nBatch {case.batch_size}, {macs:.4g} GMAC an image, {guided}, {weights} weights.")
        measured: dict[str, Any] = {"batch_size": case.batch_size, "gmac_per_image": macs}
        for part, measure in (("sampling", measure_sampling), ("training", measure_training)):
            if part in args.parts:
                rows = measure(case, model, device, args.rounds, args.seconds)
                print(f"\n{part.capitalize()}:\n\n{table(rows, part == 'training')}", flush=True)
                measured[part] = [asdict(row) for row in rows]
                torch.compiler.reset()
        found["cases"][name] = measured
        if args.json:
            write_atomically(args.json, json.dumps(found, indent=2).encode())


def main() -> int:
    """Parse, measure, print; 2 if the user can mend it, 130 if interrupted."""
    args = parse()
    try:
        run(args)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
