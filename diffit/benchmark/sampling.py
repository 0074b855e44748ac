"""Sampling, the plain way and the faster ones: speed, memory, and what each changes in predictions and images.

Letters: B images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffit.benchmark.cases import Case
from diffit.benchmark.profile import shares
from diffit.benchmark.roofline import Device, Work, products_alone
from diffit.benchmark.timing import interleaved
from diffit.benchmark.ways import Way, ways_to_sample
from diffit.codec import Codec
from diffit.device import Precision, set_matmul_precision
from diffit.diffusion import SampleNoise, create_sampler, guided_model

PRODUCTS = "its matrix products alone"
_SEED = 0


@dataclass(frozen=True)
class Row:
    """What was measured of a way.

    Args:
        ms_per_call: of one guided call, the mean over the sampler's times.
        images_per_s: from the calls of the sampler and the decoding of the batch.
        end_to_end_s: seconds of a whole batch, noise to images, where it was measured.
        peak_memory: bytes that a call needs at most beside the weights, on CUDA.
        speedup: over the plain path, of a call.
        end_to_end_speedup: likewise of a whole batch.
        peak_share: of the measured peak of matrix products, the network's own operations alone.
        max_error, rms_error: of the prediction, against the plain path.
        pixels: share of the images' uint8 values that differ from the plain path's.
    """

    way: str
    precision: Precision
    ms_per_call: float
    speedup: float
    images_per_s: float | None = None
    end_to_end_s: float | None = None
    end_to_end_speedup: float | None = None
    peak_memory: int | None = None
    peak_share: float | None = None
    max_error: float | None = None
    rms_error: float | None = None
    pixels: float | None = None


class SamplingBenchmark:
    """All ways to sample one case.

    Args:
        model: in eval mode, on the device.
        codecs: of the case, the plain one and the fast one.
        peak: of the device, by precision.
        work: of the network, for one image.
        compiled: also compile where it does not pay for itself.
    """

    def __init__(
        self,
        case: Case,
        model: nn.Module,
        codecs: tuple[Codec, Codec],
        device: torch.device,
        peak: Callable[[Precision], Device],
        work: Work,
        compiled: bool,
    ) -> None:
        self.case, self.device, self.peak, self.work = case, device, peak, work
        self.plain_codec, self.codec = codecs
        self.sampler = create_sampler(case.process, case.sampling)
        self.ways = ways_to_sample(case, model, self.sampler, device, compiled)
        noise = SampleNoise(_SEED, range(case.batch_size), case.shape, device)
        self.exact: dict[float, Tensor] = {}
        self.labels = noise.labels(max(case.num_classes, 1))
        self.x = noise.start()

    @torch.no_grad()
    def run(self, rounds: int, seconds: float) -> list[Row]:
        """Measure speeds, then errors; see `interleaved` for the arguments."""
        late = self._times()[-1]  # where no guidance is skipped
        calls: dict[str, Callable[[], object]] = {
            name: partial(self._call, way, late) for name, way in self.ways.items()
        }
        early = max(self.sampler.times)  # where it is
        for name, way in self.ways.items():
            if self._skips(way):
                calls[f"{name}\0skipped"] = partial(self._labelled, way, early)
        calls[PRODUCTS] = self._products()
        times = interleaved(calls, self.device, rounds, seconds)
        self.decoding = self._measure_decoding(rounds, seconds)
        share = self.skipped_share()
        rows = []
        for name, way in self.ways.items():
            second = times[name].seconds
            if self._skips(way):
                second = (1 - share) * second + share * times[f"{name}\0skipped"].seconds
            rows.append(self._row(name, way, second, times["plain"].seconds, times[name].peak_memory))
        products = times[PRODUCTS].seconds
        rows.append(Row(PRODUCTS, rows[-1].precision, 1e3 * products, times["plain"].seconds / products))
        return rows if self._expected_seconds(rows) > seconds else self._with_images(rows, rounds, seconds)

    def _measure_decoding(self, rounds: int, seconds: float) -> dict[str, float]:
        """Seconds to decode a batch, by the plain codec and the fast one."""
        set_matmul_precision(self.ways["plain"].precision)
        codecs = {"plain": self.plain_codec, "fast": self.codec}
        decode = {name: partial(codec.decode, self.x) for name, codec in codecs.items()}
        return {name: t.seconds for name, t in interleaved(decode, self.device, rounds, seconds / 4).items()}

    def _codec(self, name: str) -> Codec:
        return self.plain_codec if name == "plain" else self.codec

    def _row(self, name: str, way: Way, second: float, plain: float, memory: int | None) -> Row:
        decoding = self.decoding["plain" if name == "plain" else "fast"]
        halves = 1 if not self.case.guided else 2 - (self.skipped_share() if self._skips(way) else 0)
        flops = halves * self.case.batch_size * self.work.flops
        error = self._error(way)
        return Row(
            name,
            way.precision,
            1e3 * second,
            plain / second,
            self.case.batch_size / (self.num_calls() * second + decoding),
            peak_memory=memory,
            peak_share=flops / second / self.peak(way.precision).flops,
            max_error=error.abs().max().item(),
            rms_error=error.square().mean().sqrt().item(),
        )

    @torch.no_grad()
    def profile(self) -> dict[str, float]:
        """Where the time of a guided call of `--fast True` goes."""
        return shares(partial(self._call, self.ways["--fast True"], self._times()[-1]), self.device)

    def num_calls(self) -> int:
        """How often a sampler calls the guided network."""
        steps = len(self.sampler.times)
        return 2 * int(self.case.sampling.num_sampling_steps) - 1 if self.case.is_image else steps

    def skipped_share(self) -> float:
        """Of the sampler's times, those at which guidance may be skipped."""
        if not self.case.skips:
            return 0.0
        guidance = self._denoiser(replace(self.ways["--fast True"], network=None))
        return sum(guidance.at(int(t)) is not guidance for t in self.sampler.times) / len(self.sampler.times)

    def _skips(self, way: Way) -> bool:
        return way.guidance.skip_below > 0

    def _denoiser(self, way: Way) -> Any:
        case = self.case
        return guided_model(way.network, self.labels, case.num_classes, way.guidance, case.process, case.shape[-1])

    def _times(self) -> tuple[float, ...]:
        """Early, in the middle and late."""
        times = sorted(self.sampler.times)
        return times[-1 - len(times) // 10], times[len(times) // 2], times[len(times) // 10]

    def _t(self, time: float) -> Tensor:
        dtype = torch.float32 if self.case.is_image else torch.int64
        return torch.full((self.case.batch_size,), time, dtype=dtype, device=self.device)

    def _call(self, way: Way, time: float) -> Tensor:
        set_matmul_precision(way.precision)
        return self._denoiser(way)(self.x, self._t(time)).float()

    def _labelled(self, way: Way, time: float) -> Tensor:
        """What is left of a call where guidance is skipped."""
        set_matmul_precision(way.precision)
        return self._denoiser(way).labelled(self.x, self._t(time))

    def _plain(self, time: float) -> Tensor:
        """The plain prediction, computed once."""
        if time not in self.exact:
            self.exact[time] = self._call(self.ways["plain"], time)
        return self.exact[time]

    def _error(self, way: Way) -> Tensor:
        """Of the predictions at three times; where guidance is skipped, also at the last time that is."""
        errors = [self._call(way, time) - self._plain(time) for time in self._times()]
        if self._skips(way):
            guidance = self._denoiser(way)
            time = min(t for t in self.sampler.times if guidance.at(int(t)) is not guidance)
            errors.append(self._labelled(way, time) - self._plain(time))
        return torch.stack(errors)

    def _products(self) -> Callable[[], None]:
        """Those of a guided call of the fast network (before it was compiled)."""
        way = self.ways["--fast True"]
        network = getattr(way.network, "_orig_mod", way.network)
        batch = self.case.batch_size * (2 if self.case.guided else 1)
        x, t = self.x.repeat(2, 1, 1, 1)[:batch], self._t(self._times()[0]).repeat(2)[:batch]
        return products_alone(network, (x, t, torch.zeros(batch, dtype=torch.int64, device=self.device)))

    def _expected_seconds(self, rows: list[Row]) -> float:
        """Of one whole batch in every way."""
        return sum(self.num_calls() * row.ms_per_call / 1e3 for row in rows)

    def _images(self, name: str) -> Tensor:
        """A whole batch, noise to images."""
        way = self.ways[name]
        set_matmul_precision(way.precision)
        noise = SampleNoise(_SEED, range(self.case.batch_size), self.case.shape, self.device)
        for state in self.sampler(self._denoiser(way), noise.start(), noise):
            x = state.x
        return self._codec(name).decode(x.float())

    def _with_images(self, rows: list[Row], rounds: int, seconds: float) -> list[Row]:
        """The rows with whole batches measured too."""
        whole = {name: partial(self._images, name) for name in self.ways}
        times = interleaved(whole, self.device, max(1, math.ceil(rounds / 2)), seconds)
        plain = whole["plain"]()
        found = []
        for row in rows:
            if row.way in whole:
                taken = times[row.way].seconds
                differing = (whole[row.way]() != plain).float().mean().item() if self.case.trained else None
                speedup = times["plain"].seconds / taken
                row = replace(row, end_to_end_s=taken, end_to_end_speedup=speedup, pixels=differing)
            found.append(row)
        return found
