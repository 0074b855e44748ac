"""How fast sampling and training are: python -m diffit.benchmark --cases Diffit-Fashion

Baseline, default and `--fast True` take turns in one run, so that a machine that slows down slows all of them alike;
what is printed are medians, with errors against the baseline. The baseline is float32 (TF32 on a GPU), attention as the
products softmax(Q K^T / sqrt(D) + B) V, both halves of guidance at every step, nothing compiled.

Letters: B images of a batch.
"""

from __future__ import annotations

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    import sys

    from diffit.cli.run import start

    sys.exit(start("diffit.benchmark:main"))

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffit.checkpoint.config import CheckpointConfig, default_config
from diffit.checkpoint.resolve import BUNDLED, find_checkpoint
from diffit.checkpoint.weights import load_weights
from diffit.cli.run import one_sentence
from diffit.codec import create_codec
from diffit.config import Precision
from diffit.diffusion import SampleNoise, create_process, create_sampler, guided_model
from diffit.diffusion.config import SKIP_BELOW
from diffit.diffusion.samplers import model_at
from diffit.models.config import build_model
from diffit.models.fast import compiles, cpu_info, fast_network, fast_precision
from diffit.nn.attention import TMSA, matmul_attention
from diffit.sampling.images import ImageSampler
from diffit.system.device import autocast, resolve_device, set_matmul_precision, to_device
from diffit.system.files import write_atomically
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

    Args:
        rounds: counted calls of each, at most.
        seconds: no further round starts once the counted ones took this long; there is always one.
    """
    for _ in range(3 if device.type == "cuda" else 1):
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
    return {name: median(found) for name, found in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _copy_of(model: nn.Module) -> nn.Module:
    """A network of the same weights in the same memory, without gradients; its layers can be replaced."""
    return copy.deepcopy(model, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()})


def with_matmul_attention(model: nn.Module) -> nn.Module:
    """The baseline's network: attention as its products, in place."""
    for module in model.modules():
        if isinstance(module, TMSA):
            module.attention = matmul_attention
    return model


def _is_guided(config: CheckpointConfig) -> bool:
    return config.network.num_classes > 0 and config.guidance.enabled and config.guidance.scale != 1


def _variants(
    config: CheckpointConfig, model: nn.Module, device: torch.device
) -> dict[str, tuple[Any, CheckpointConfig, Precision]]:
    """What takes turns in sampling: each network as it is called, and the settings and precision it is sampled with."""
    exact: Precision = "tf32" if device.type == "cuda" else "fp32"
    low, skipping = fast_precision(device), config
    if config.process_config.num_timesteps is not None:
        skipping = replace(config, guidance=replace(config.guidance, skip_below=SKIP_BELOW))
    variants = {
        "baseline": (with_matmul_attention(_copy_of(model)), config, exact),
        "default": (_copy_of(model), config, exact),
    }
    if low != exact:
        variants[f"{low} autocast"] = (autocast(_copy_of(model), device, low), config, low)
    return variants | {"--fast True": (fast_network(_copy_of(model), low, device), skipping, low)}


@torch.no_grad()
def measure_sampling(
    config: CheckpointConfig,
    model: nn.Module,
    batch: int,
    device: torch.device,
    rounds: int,
    seconds: float,
    whole_batches: bool = False,
) -> list[Row]:
    """Guided calls of the network for `batch` images and, if wanted and affordable, whole batches."""
    variants, network = _variants(config, model, device), config.network
    noise = SampleNoise(_SEED, range(batch), (network.in_channels, network.input_size, network.input_size), device)
    labels, x = noise.labels(max(network.num_classes, 1)), noise.start()
    sampler = create_sampler(config.process_config, config.sampling)
    times = _visited_times(sampler, config, device)

    def denoiser(name: str, t: float) -> tuple[Any, bool]:
        """The guided network at t, and whether its null half is skipped there."""
        call, config, _ = variants[name]
        guided: Any = guided_model(
            call, labels, network.num_classes, config.guidance, config.process_config, network.input_size
        )
        at_t = model_at(guided, t)
        return at_t, at_t is not guided

    def predict(name: str, t: float) -> Tensor:
        set_matmul_precision(variants[name][2])
        return denoiser(name, t)[0](x, torch.full((batch,), t, device=device)).float()

    # A call that skips costs half: both kinds are timed, and weighted by the sampler's steps.
    share = sum(denoiser("--fast True", t)[1] for t in times) / len(times)
    calls = {name: partial(predict, name, min(times)) for name in variants}
    if share:
        calls["skipped"] = partial(predict, "--fast True", max(times))
    found = interleaved(calls, device, rounds, seconds)
    found["--fast True"] += share * (found.get("skipped", 0) - found["--fast True"])
    rows = []
    for name, (_, _, precision) in variants.items():
        passes = 1.0 + _is_guided(config) - (share if name == "--fast True" else 0)
        flops = passes * estimate(network).flops / 3  # of a forward pass alone
        row = _row(name, precision, found, batch, flops, device, calls[name])
        probes = sorted(times)[:: max(1, len(times) // 3)]
        error = torch.stack([predict(name, t) - predict("baseline", t) for t in probes])
        row |= {"images_per_s": row["images_per_s"] / len(times)}
        rows.append(row | {"max_error": error.abs().max().item(), "rms_error": error.square().mean().sqrt().item()})
    if not whole_batches or len(times) * sum(found[name] for name in variants) > seconds:
        return rows
    codec, images = create_codec(config.codec, device), dict[str, Tensor]()

    def sample(name: str) -> None:
        network, config, precision = variants[name]
        set_matmul_precision(precision)
        images[name] = ImageSampler(network, config, sampler, codec).draw(range(batch), labels, _SEED)

    whole = interleaved({name: partial(sample, name) for name in variants}, device, max(1, rounds // 2), seconds)
    for name, row in zip(variants, rows, strict=True):
        row |= {"whole_batch_s": whole[name], "whole_batch_speedup": whole["baseline"] / whole[name]}
        row |= {"pixels": (images[name] != images["baseline"]).float().mean().item()}
    return rows


def _row(
    name: str,
    precision: Precision,
    seconds: dict[str, float],
    batch: int,
    flops: float,
    device: torch.device,
    call: Callable[[], object],
) -> Row:
    """Of a call that takes seconds[name] for `batch` images, each of so many operations."""
    images_per_s = batch / seconds[name]
    row: Row = {"variant": name, "precision": precision, "ms": 1e3 * seconds[name]}
    row |= {"speedup": seconds["baseline"] / seconds[name], "images_per_s": images_per_s}
    row["peak_share"] = flops * images_per_s / _peak(device, precision)
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
    config: CheckpointConfig, model: nn.Module, batch: int, device: torch.device, rounds: int, seconds: float
) -> list[Row]:
    """Whole optimizer steps: forward, loss, backward, AdamW, EMA."""
    process, network = create_process(config.process_config), config.network
    generator = torch.Generator().manual_seed(_SEED)
    shape = (batch, network.in_channels, network.input_size, network.input_size)
    x_start, noise = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    t = to_device(process.draw_t(np.random.default_rng(_SEED), batch), device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)
    exact: Precision = "tf32" if device.type == "cuda" else "fp32"
    low, ema = fast_precision(device), EMA(model)

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
    flops = estimate(network).flops
    return [
        _row(name, precision, found, batch, flops, device, calls[name]) for name, (_, precision) in variants.items()
    ]


@cache
def _peak(device: torch.device, precision: Precision) -> float:
    """Operations a second that the device reaches in large matrix products at this precision."""
    set_matmul_precision(precision)
    return measured_peak(device, precision)


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
        raise ValueError(f"{error}; {parser.prog} --help lists all settings") from error
    for name, known in (("cases", tuple(CASES)), ("parts", PARTS)):
        for value in getattr(args, name):
            if value not in known:
                raise ValueError(f"--{name} {value} is unknown: choose of {', '.join(known)}")
    if args.model_path and len(args.cases) != 1:
        raise ValueError("--model_path belongs to one case: name it with --cases")
    if args.rounds < 1 or (args.batch_size is not None and args.batch_size < 1):
        raise ValueError("--rounds and --batch_size must be at least 1")
    return args


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
        torch.manual_seed(_SEED)
        model_name, side, *batches = CASES[name]
        trained = args.model_path is not None or model_name in BUNDLED
        if trained:
            source, config = find_checkpoint(model_name, args.model_path, side)
            model = load_weights(source.fetch(), config)
        else:
            config = default_config(model_name, side)
            model = build_model(config.network)
            head: Any = getattr(model, "head", None) or model.get_submodule("final_layer.linear")
            nn.init.xavier_uniform_(head.weight.detach().flatten(1))  # it starts at zero, and so would all predictions
        model.eval().to(device)
        batch = args.batch_size or batches[device.type != "cuda"]
        guided = f"guided at {config.guidance.scale:g}" if _is_guided(config) else "unguided"
        macs = estimate(config.network).flops / 6e9
        weights = "trained" if trained else "random"
        print(f"\n## {name}\n\nBatch {batch}, {macs:.4g} GMAC an image, {guided}, {weights} weights.")
        measured: dict[str, Any] = {"batch_size": batch, "gmac_per_image": macs}
        parts: dict[str, Callable[..., list[Row]]]
        parts = {"sampling": partial(measure_sampling, whole_batches=trained), "training": measure_training}
        for part in [part for part in parts if part in args.parts]:
            rows = parts[part](config, model, batch, device, args.rounds, args.seconds)
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
