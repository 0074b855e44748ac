"""How fast sampling and training are: python -m diffit.benchmark --cases Diffit-Fashion

Variants take turns in one run, so that a machine that slows down slows all of them alike; what is printed are medians,
with errors against the baseline. The baseline does the arithmetic of the released code: float32 (TF32 on a GPU),
attention as the products softmax(Q K^T / sqrt(D) + B) V, both halves of guidance at every step, nothing compiled.

Letters: B images of a batch.
"""

from __future__ import annotations

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("diffit.benchmark:main")())

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffit.checkpoint.config import CheckpointConfig, default_config
from diffit.checkpoint.resolve import BUNDLED
from diffit.checkpoint.weights import load_model
from diffit.cli.run import one_sentence
from diffit.codec import create_codec
from diffit.config import Precision
from diffit.data.loader import Batch
from diffit.diffusion import SampleNoise, create_process, create_sampler, guided_model
from diffit.diffusion.config import SKIP_BELOW
from diffit.diffusion.samplers import model_at
from diffit.models.config import build_model
from diffit.models.fast import compiled, compiles, cpu_info, fast_precision, prepare_for_sampling
from diffit.nn.attention import Attention, WindowAttention, fastest_attention, matmul_attention
from diffit.sampling.images import ImageSampler
from diffit.system.device import autocast, product_dtype, resolve_device, set_matmul_precision
from diffit.system.files import write_atomically
from diffit.system.ranks import World
from diffit.training.config import TrainConfig
from diffit.training.ema import EMA
from diffit.training.estimate import estimate, measured_peak
from diffit.training.step import TrainState, train_step

# Name -> (model, side of its images or None for its own, images at once on a GPU, on a CPU).
CASES: dict[str, tuple[str, int | None, int, int]] = {
    "Diffit-256": ("Diffit", 256, 16, 1),
    "Diffit-512": ("Diffit", 512, 8, 1),
    "ImageDiffit-CIFAR10": ("ImageDiffit-CIFAR10", None, 128, 8),
    "ImageDiffit-FFHQ64": ("ImageDiffit-FFHQ64", None, 64, 2),
    "Diffit-Fashion": ("Diffit-Fashion", None, 256, 16),
}
# Part -> what is measured beside the baseline; autocast is to 16 bits, fast is --fast True, but with both halves of
# guidance at every step, and skip is --fast True as it is.
PARTS: dict[str, tuple[str, ...]] = {
    "sampling": ("default", "compile", "autocast", "fast", "skip"),
    "training": ("default", "autocast", "compile", "compile+autocast"),
}
_SEED = 0

# What is measured of a variant -> head of its column, and how its values are written.
_COLUMNS = {
    "variant": ("variant", "{}"),
    "precision": ("precision", "{}"),
    "ms": ("ms", "{:.4g}"),  # of a guided call (the mean over the sampler's steps), or of an optimizer step
    "speedup": ("speed-up", "{:.2f}x"),
    "images_per_s": ("images/s", "{:.3g}"),
    "peak_share": ("of peak", "{:.0%}"),  # of measured matrix products; of training that is the MFU
    "memory_gib": ("peak memory", "{:.2f} GiB"),  # beside weights and optimizer; on CUDA
    "max_error": ("max error", "{:.2g}"),  # of the prediction, against the baseline's
    "rms_error": ("RMS error", "{:.2g}"),
    "whole_batch_s": ("whole batch", "{:.3g} s"),  # from noise to images
    "whole_batch_speedup": ("its speed-up", "{:.2f}x"),
    "pixels": ("uint8 values that differ", "{:.2%}"),  # from the baseline's images
}
Row = dict[str, Any]  # some of these


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, seconds: float
) -> dict[str, float]:
    """Median seconds of calls that take turns; the first of each, which compile and record CUDA graphs, do not count.

    A turn on a GPU is four calls in a row, which run ahead of the device as a sampler's do.

    Args:
        rounds: counted turns of each, at most.
        seconds: no further round starts once the counted ones took this long; there is always one.
    """
    first, in_a_row = (3, 4) if device.type == "cuda" else (1, 1)
    wait: Callable[[], object] = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    for call in calls.values():
        for _ in range(first):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for _ in range(rounds):
        for name, call in calls.items():
            wait()
            begin = time.perf_counter()
            for _ in range(in_a_row):
                call()
            wait()
            times[name].append((time.perf_counter() - begin) / in_a_row)
        if time.perf_counter() - start > seconds:
            break
    return {name: median(found) for name, found in times.items()}


def copy_of(model: nn.Module, attention: Attention = fastest_attention) -> nn.Module:
    """A network of the same weights in the same memory, without gradients; its layers can be replaced."""
    own = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    copied = copy.deepcopy(model, own)
    for module in copied.modules():
        if isinstance(module, WindowAttention):
            module.attention = attention
    return copied


def _is_guided(config: CheckpointConfig) -> bool:
    return config.network.num_classes > 0 and config.guidance.enabled and config.guidance.scale != 1


def _precisions(device: torch.device) -> tuple[Precision, Precision]:
    """That of the baseline, and the 16 bits of `--fast True`, or fp32."""
    return "tf32" if device.type == "cuda" else "fp32", fast_precision(device)


Sampled = tuple[Any, CheckpointConfig, Precision]  # a network as it is called; what it is sampled with


def _sampled(
    config: CheckpointConfig, model: nn.Module, device: torch.device, variants: Collection[str]
) -> dict[str, Sampled]:
    """What takes turns in sampling."""
    exact, low = _precisions(device)
    found: dict[str, Sampled] = {"baseline": (copy_of(model, matmul_attention), config, exact)}
    if "default" in variants:
        found["default"] = (copy_of(model), config, exact)
    if "compile" in variants and compiles(device):
        found["--compile True"] = (compiled(copy_of(model)), config, exact)
    if "autocast" in variants and low != exact:
        found[f"{low} autocast"] = (autocast(copy_of(model), device, low), config, low)
    if {"fast", "skip"} & set(variants):
        network = prepare_for_sampling(copy_of(model), product_dtype(low))
        network = compiled(network) if compiles(device) else network
        found["--fast True, both halves"] = (network, config, low)
        if "skip" in variants and config.process_config.num_timesteps is not None and _is_guided(config):
            guidance = replace(config.guidance, skip_below=SKIP_BELOW)
            found["--fast True"] = (network, replace(config, guidance=guidance), low)
    return found


@torch.no_grad()
def measure_sampling(
    config: CheckpointConfig,
    model: nn.Module,
    batch: int,
    device: torch.device,
    rounds: int,
    seconds: float,
    variants: Collection[str] = PARTS["sampling"],
    whole_batches: bool = False,
) -> list[Row]:
    """Guided calls of the network for `batch` images and, if wanted and affordable, whole batches."""
    network = config.network
    noise = SampleNoise(_SEED, range(batch), (network.in_channels, network.input_size, network.input_size), device)
    labels, x = noise.labels(max(network.num_classes, 1)), noise.start()
    sampler = create_sampler(config.process_config, config.sampling)
    times = _visited_times(sampler, config, device)
    sampled = _sampled(config, model, device, variants)

    def denoiser(name: str, t: float) -> tuple[Any, bool]:
        """The guided network at t, and whether its null half is skipped there."""
        call, config, _ = sampled[name]
        guided: Any = guided_model(
            call, labels, network.num_classes, config.guidance, config.process_config, network.input_size
        )
        at_t = model_at(guided, t)
        return at_t, at_t is not guided

    def predict(name: str, t: float) -> Tensor:
        set_matmul_precision(sampled[name][2])
        return denoiser(name, t)[0](x, torch.full((batch,), t, device=device)).float()

    # A call that skips costs half: both kinds are timed, and weighted by the sampler's steps.
    calls = {name: partial(predict, name, min(times)) for name in sampled}
    shares = {name: sum(denoiser(name, t)[1] for t in times) / len(times) for name in sampled}
    for name, share in shares.items():
        if share:
            calls[f"skipped {name}"] = partial(predict, name, max(times))
    found = interleaved(calls, device, rounds, seconds)
    rows = []
    for name, (_, _, precision) in sampled.items():
        found[name] += shares[name] * (found.get(f"skipped {name}", 0) - found[name])
        flops = (1.0 + _is_guided(config) - shares[name]) * batch * estimate(network).flops / 3  # forward alone
        row = _row(name, precision, found, flops, device, calls[name])
        probes = sorted(times)[:: max(1, len(times) // 3)]
        error = torch.stack([predict(name, t) - predict("baseline", t) for t in probes])
        row |= {"images_per_s": batch / found[name] / len(times)}
        rows.append(row | {"max_error": error.abs().max().item(), "rms_error": error.square().mean().sqrt().item()})
    if not whole_batches or len(times) * sum(found[name] for name in sampled) > seconds:
        return rows
    codec, images = create_codec(config.codec, device), dict[str, Tensor]()

    def sample(name: str) -> None:
        network, config, precision = sampled[name]
        set_matmul_precision(precision)
        images[name] = ImageSampler(network, config, sampler, codec, precision).draw(range(batch), labels, _SEED)

    whole = interleaved({name: partial(sample, name) for name in sampled}, device, max(1, rounds // 2), seconds)
    for name, row in zip(sampled, rows, strict=True):
        row |= {"whole_batch_s": whole[name], "whole_batch_speedup": whole["baseline"] / whole[name]}
        row |= {"pixels": (images[name] != images["baseline"]).float().mean().item()}
    return rows


def _row(
    name: str, precision: Precision, times: dict[str, float], flops: float, device: torch.device, call: Any
) -> Row:
    """Of a call of so many operations that takes times[name] seconds."""
    row: Row = {"variant": name, "precision": precision, "ms": 1e3 * times[name]}
    row |= {"speedup": next(iter(times.values())) / times[name]}
    row |= {"peak_share": flops / times[name] / measured_peak(device, precision)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        row["memory_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30  # beside what there was
    return row


def _visited_times(sampler: Any, config: CheckpointConfig, device: torch.device) -> list[float]:
    """The times at which the sampler asks its model, once a call, from a dry walk over one zero image."""
    times: list[float] = []
    channels = config.network.in_channels * (2 if getattr(config.network, "learn_sigma", False) else 1)

    def model(x: Tensor, t: Tensor) -> Tensor:
        times.append(t[0].item())
        return x.new_zeros(len(x), channels, *x.shape[2:])

    z = torch.zeros(1, config.network.in_channels, 2, 2, device=device)
    for _ in sampler(model, z, z.clone):
        pass
    return times


def measure_training(
    config: CheckpointConfig,
    model: nn.Module,
    batch: int,
    device: torch.device,
    rounds: int,
    seconds: float,
    variants: Collection[str] = PARTS["training"],
) -> list[Row]:
    """Whole optimizer steps of train.py, without its data."""
    network, (exact, low) = config.network, _precisions(device)
    generator = torch.Generator().manual_seed(_SEED)
    shape = (batch, network.in_channels, network.input_size, network.input_size)
    x_start, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    conditions = {"y": torch.zeros(batch, dtype=torch.int64), "drop_label": torch.zeros(batch, dtype=torch.bool)}
    process = create_process(config.process_config)
    t = torch.from_numpy(process.draw_t(np.random.default_rng(_SEED), batch))
    data = Batch(x_start, noise, t, conditions).to(device)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=low == "fp16")
    sums = torch.zeros(4, device=device)
    state = TrainState(model, model, {"ema": EMA(model)}, process, optimizer, scaler, sums)

    def step(forward: Any, precision: Precision) -> None:
        set_matmul_precision(precision)
        settings = TrainConfig(batch_size=batch, precision=precision)
        train_step(replace(state, forward=forward), data, settings, World())

    able = {"autocast": low != exact, "compile": compiles(device)}
    variants = [variant for variant in variants if all(able.get(word, True) for word in variant.split("+"))]
    precisions = {variant: low if "autocast" in variant else exact for variant in variants}
    forwards = {variant: torch.compile(model) if "compile" in variant else model for variant in variants}
    calls = {variant: partial(step, forwards[variant], precisions[variant]) for variant in variants}
    found, flops = interleaved(calls, device, rounds, seconds), batch * estimate(network).flops
    rows = [_row(name, precisions[name], found, flops, device, call) for name, call in calls.items()]
    return [row | {"images_per_s": batch / found[row["variant"]]} for row in rows]


def table(rows: Sequence[Row], training: bool) -> str:
    """Rows as a Markdown table, without the columns that were not measured."""
    columns = _COLUMNS | ({"peak_share": ("MFU", "{:.0%}")} if training else {})
    columns = {name: column for name, column in columns.items() if name in rows[0]}
    lines = [[head for head, _ in columns.values()], ["---"] * len(columns)]
    lines += [[form.format(row[name]) for name, (_, form) in columns.items()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@one_sentence()
def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Resolve the command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    parser = argparse.ArgumentParser(prog="python -m diffit.benchmark", description=__doc__, exit_on_error=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = dict.fromkeys(name for part in PARTS.values() for name in part)
    for name, values in (("cases", CASES), ("parts", PARTS), ("variants", names)):
        parser.add_argument(f"--{name}", nargs="+", default=list(values), choices=list(values), help="default: all")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--batch_size", type=int, help="images at once; by default what suits case and device")
    parser.add_argument("--depth", type=int, help="blocks of a latent network with random weights, for a quick look")
    parser.add_argument("--model_path", help="weights of the one case that is named; by default random or bundled ones")
    parser.add_argument("--rounds", type=int, default=9, help="counted turns of every variant, at most (default: 9)")
    parser.add_argument("--seconds", type=float, default=120, help="no new round starts after these (default: 120)")
    parser.add_argument("--json", type=Path, help="write all that was measured to this file")
    try:
        args = parser.parse_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}; {parser.prog} --help lists all settings") from error
    if args.model_path and len(args.cases) != 1:
        raise ValueError("--model_path belongs to one case: name it with --cases")
    if min(args.rounds, args.batch_size or 1, args.depth or 1) < 1:
        raise ValueError("--rounds, --batch_size and --depth must be at least 1")
    return args


def _load(name: str, args: argparse.Namespace, device: torch.device) -> tuple[CheckpointConfig, nn.Module, bool]:
    """A case's config, its network in eval mode, and whether that is trained."""
    model_name, side, *_ = CASES[name]
    torch.manual_seed(_SEED)
    if args.model_path is not None or model_name in BUNDLED:
        model, config = load_model(args.model_path or model_name, side, model_name)
        return config, model.to(device), True
    config = default_config(model_name, side, **({"depth": args.depth} if args.depth else {}))
    with device:
        model = build_model(config.network).eval()
    head: Any = getattr(model, "head", None) or model.get_submodule("final_layer.linear")
    nn.init.xavier_uniform_(head.weight.detach().flatten(1))  # it starts at zero, and so would all predictions
    return config, model, False


def run(args: argparse.Namespace) -> None:
    """Measure, print tables, and write the JSON after every case.

    Raises:
        ValueError: in one sentence, for everything that a user can mend.
    """
    device = resolve_device(args.device)
    processor = torch.cuda.get_device_name() if device.type == "cuda" else cpu_info("model name") or platform.machine()
    machine = {"device": processor, "kind": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    found: dict[str, Any] = {"machine": machine, "cases": {}}
    for name in args.cases:
        config, model, trained = _load(name, args, device)
        batch = args.batch_size or CASES[name][2 if device.type == "cuda" else 3]
        guided = f"guided at {config.guidance.scale:g}" if _is_guided(config) else "unguided"
        macs, weights = estimate(config.network).flops / 6e9, "trained" if trained else "random"
        print(f"\n## {name}\n\nBatch {batch}, {macs:.4g} GMAC an image, {guided}, {weights} weights.")
        measured: dict[str, Any] = {"batch_size": batch, "gmac_per_image": macs}
        measure: dict[str, Any] = {"sampling": partial(measure_sampling, whole_batches=trained)}
        measure["training"] = measure_training
        for part in [part for part in PARTS if part in args.parts]:
            chosen = [variant for variant in PARTS[part] if variant in args.variants]
            rows = measure[part](config, model, batch, device, args.rounds, args.seconds, chosen)
            if rows:  # none where no variant can be had here
                print(f"\n{part.capitalize()}:\n\n{table(rows, training=part == 'training')}", flush=True)
            measured[part] = rows
            torch.compiler.reset()
        found["cases"][name] = measured
        if args.json:
            write_atomically(args.json, json.dumps(found, indent=2).encode())


@one_sentence()
def main() -> None:
    """Parse, measure, print."""
    run(parse())
