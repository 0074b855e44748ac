"""Training, the plain way and the faster ones: whole optimizer steps, averages included.

Letters: B images of a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from diffit.benchmark.cases import Case, save_small_vae
from diffit.benchmark.plain import twin, with_plain_attention
from diffit.benchmark.roofline import Device, Work
from diffit.benchmark.timing import interleaved
from diffit.codec import CodecConfig, PixelCodec, VAECodec
from diffit.data.batches import Batch, Batches, Latents, Pixels
from diffit.data.datasets import ImageArrays, Images
from diffit.data.encoding import encode_images
from diffit.data.order import Plan
from diffit.data.streams import WorkerStream, image_stream
from diffit.device import Precision, set_matmul_precision
from diffit.distributed import World
from diffit.fast import compiles, fast_precision
from diffit.training.config import TrainConfig
from diffit.training.ema import EMA
from diffit.training.parallel import parallelize
from diffit.training.step import TrainState, create_process, train_step

BATCHES = "its batches alone (from a cache)"
_PASSES = 3  # a backward pass has two products for each one of the forward pass


@dataclass(frozen=True)
class Way:
    """One way to train."""

    plain_attention: bool = True
    precision: Precision = "fp32"
    fused_optimizer: bool = False
    foreach_average: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """What was measured of a way; mfu: model FLOPs utilisation, of the measured peak of matrix products."""

    way: str
    precision: str
    ms_per_step: float
    speedup: float
    images_per_s: float
    mfu: float | None = None
    peak_memory: int | None = None


class PlainEMA(EMA):
    """The average, one parameter after the other."""

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)


def ways_to_train(device: torch.device, compiled: bool) -> dict[str, Way]:
    """The plain path, each switch alone on top of it, and all together."""
    exact: Precision = "tf32" if device.type == "cuda" else "fp32"
    low = fast_precision(device)
    compiled = compiled or compiles(device)
    ways = {
        "plain": Way(precision=exact),
        "+ fused attention": Way(plain_attention=False, precision=exact),
        f"+ {low} autocast": Way(precision=low),
        "+ fused AdamW": Way(precision=exact, fused_optimizer=True),
        "+ foreach EMA": Way(precision=exact, foreach_average=True),
    }
    if compiled:
        ways["+ compiled"] = Way(precision=exact, compiled=True)
    return ways | {"all": Way(False, low, True, True, compiled)}


def build_state(
    way: Way, case: Case, model: nn.Module, average: EMA, device: torch.device
) -> tuple[TrainState, TrainConfig]:
    """What a step in this way changes, and its config. Average and weights' memory are shared with other ways."""
    network = twin(model).train()
    if way.plain_attention:
        network = with_plain_attention(network)
    ema = copy.copy(average)
    if not way.foreach_average:
        ema.__class__ = PlainEMA
    config = TrainConfig(
        model=case.checkpoint.model,
        process=case.checkpoint.process,
        precision=way.precision,
        compile=way.compiled,
        batch_size=case.batch_size,
    )
    settings = config.optimizer
    trained = [p for p in network.parameters() if p.requires_grad]
    plain = {} if way.fused_optimizer else {"foreach": False}
    state = TrainState(
        model=network,
        forward=parallelize(network, config, device, World()),
        emas={"ema": ema},
        process=create_process(config.process_config),
        optimizer=torch.optim.AdamW(
            trained, settings.lr, settings.betas, weight_decay=0.0, fused=way.fused_optimizer, **plain
        ),
        scaler=torch.amp.GradScaler(device.type, enabled=way.precision == "fp16"),
    )
    return state, config


def share_moments(optimizers: list[torch.optim.Optimizer]) -> None:
    """One set of moments for all of them, so that a large network fits."""
    first, *others = optimizers
    trained = first.param_groups[0]["params"]
    for number, parameter in enumerate(trained):
        on_device = first.defaults["fused"] and parameter.device.type == "cuda"
        step = torch.zeros((), device=parameter.device if on_device else "cpu")
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        first.state[parameter] = {"step": step, **moments}
        for other in others:
            other.state[other.param_groups[0]["params"][number]] = first.state[parameter]


class TrainingBenchmark:
    """All ways to train one case.

    Args:
        model: on the device; its weights will change.
        peak: of the device, by precision.
        work: of the network, for one image.
        compiled: also compile where it does not pay for itself.
        folder: for a cache of latents.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        device: torch.device,
        peak: Callable[[Precision], Device],
        work: Work,
        compiled: bool,
        folder: Path,
    ) -> None:
        self.case, self.device, self.peak, self.work = case, device, peak, work
        self.ways = ways_to_train(device, compiled)
        model.requires_grad_(True)
        if hasattr(model, "pos_embed"):
            model.pos_embed.requires_grad_(False)
        average = EMA(model)
        self.states = {name: build_state(way, case, model, average, device) for name, way in self.ways.items()}
        optimizers = [state.optimizer for state, _ in self.states.values()]
        if device.type == "cuda":  # where a fused AdamW counts its steps on the device, the plain one on the host
            share_moments([each for each in optimizers if each.defaults["fused"]])
            share_moments([each for each in optimizers if not each.defaults["fused"]])
        else:
            share_moments(optimizers)
        self.batches = case_batches(case, device, folder)

    def run(self, rounds: int, seconds: float) -> list[Row]:
        """Measure; see `interleaved` for the arguments."""
        batch = self.batches[0]
        steps = {name: partial(self._step, name, batch) for name in self.ways}
        times = interleaved(steps, self.device, rounds, seconds)
        size, plain = self.case.batch_size, times["plain"].seconds
        rows = []
        for name, way in self.ways.items():
            second, memory = times[name].seconds, times[name].peak_memory
            mfu = _PASSES * self.work.flops * size / second / self.peak(way.precision).flops
            rows.append(Row(name, way.precision, 1e3 * second, plain / second, size / second, mfu, memory))
        numbers = iter(range(1, 1 << 30))
        reading = interleaved({"read": lambda: self.batches[next(numbers)]}, self.device, 2 * rounds, seconds / 4)
        second = reading["read"].seconds
        return [*rows, Row(BATCHES, "", 1e3 * second, plain / second, size / second)]

    def _step(self, name: str, batch: Batch) -> None:
        state, config = self.states[name]
        set_matmul_precision(self.ways[name].precision)
        state.step = 0
        train_step(state, batch, config, World())
        state.optimizer.zero_grad(set_to_none=True)  # the next way's gradients take their place


def case_batches(case: Case, device: torch.device, folder: Path) -> Batches:
    """Batches of random pictures as training reads them: latents from a cache on disk, or pixels."""
    channels = case.shape[0]
    plan = Plan(0, 64, case.batch_size, slice(None), flip=False)
    labels = torch.arange(64, device=device) % max(case.num_classes, 1)
    size = case.checkpoint.image_size
    colours = channels if case.is_image else 3
    pixels = np.random.default_rng(0).integers(0, 256, (64, size, size, colours), dtype=np.uint8)
    images = Images(ImageArrays(pixels, np.zeros(64, np.int64), ()), size, colours)
    if case.is_image:
        stream = image_stream(images, plan, 0, device)
        clean = Pixels(stream, (size, size, colours), PixelCodec(), plan, augment_probability=0.12)
        return Batches(clean, labels, plan, case.process, 0.1)
    factor = case.checkpoint.codec.factor
    save_small_vae(folder / "vae", factor)
    codec = VAECodec(CodecConfig(str(folder / "vae"), factor), device)
    cache = encode_images(images, codec, folder / "cache", flip=False, workers=0, world=World())
    latents = Latents(WorkerStream(cache, plan, 4, device), cache.shape, codec, plan)
    return Batches(latents, labels, plan, case.process, 0.1)
