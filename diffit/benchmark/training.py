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
from diffit.training.step import Stepper

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


def build_stepper(way: Way, case: Case, model: nn.Module, average: EMA, device: torch.device) -> Stepper:
    """What takes a step in this way. The average is shared with other ways, the weights' memory too."""
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
    stepper = Stepper(network, [ema], config, device, World())
    if not way.fused_optimizer:
        settings = config.optimizer
        stepper.optimizer = torch.optim.AdamW(
            stepper.trained, settings.lr, settings.betas, weight_decay=0.0, foreach=False, fused=False
        )
    return stepper


def share_moments(steppers: list[Stepper]) -> None:
    """One set of moments for all of them, so that a large network fits."""
    first = steppers[0]
    on_device = first.optimizer.defaults["fused"] and first.device.type == "cuda"
    for parameter in first.trained:
        step = torch.zeros((), device=first.device if on_device else "cpu")
        moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        first.optimizer.state[parameter] = {"step": step, **moments}
    for stepper in steppers[1:]:
        for own, other in zip(stepper.trained, first.trained, strict=True):
            stepper.optimizer.state[own] = first.optimizer.state[other]


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
        self.steppers = {name: build_stepper(way, case, model, average, device) for name, way in self.ways.items()}
        steppers = list(self.steppers.values())
        if device.type == "cuda":  # where a fused AdamW counts its steps on the device, the plain one on the host
            share_moments([s for s in steppers if s.optimizer.defaults["fused"]])
            share_moments([s for s in steppers if not s.optimizer.defaults["fused"]])
        else:
            share_moments(steppers)
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
        stepper = self.steppers[name]
        set_matmul_precision(self.ways[name].precision)
        stepper.take(batch, 0, asked=False)
        stepper.settle()
        stepper.optimizer.zero_grad(set_to_none=True)  # the next way's gradients take their place


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
