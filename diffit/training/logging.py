"""What one sees of a run: one bar, log.jsonl, and a tracker of curves and pictures."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffit.models.config import NetworkConfig
from diffit.system.console import printable, progress
from diffit.system.distributed import World
from diffit.system.files import write_failure
from diffit.training.config import TrainConfig
from diffit.training.ema import ema_decays
from diffit.training.estimate import estimate, measured_peak, peak_memory
from diffit.training.record import forget_later_lines
from diffit.training.step import TrainState
from diffit.training.tracker import create_tracker


class MetricLogger:
    """Shows how far a run is, and logs what its steps measure. Only rank 0 shows and writes.

    Args:
        network: what is trained, to count its operations.
        first: the step that the run goes on from; later lines of an earlier start are forgotten.
    """

    def __init__(
        self, config: TrainConfig, network: NetworkConfig, first: int, device: torch.device, world: World
    ) -> None:
        self.config, self.device, self.world = config, device, world
        self.bar = progress(show=world.is_main, total=config.steps, initial=first, unit="step")
        self.flops = estimate(network).flops
        self.peak = measured_peak(device, config.precision) if device.type == "cuda" else None
        self.path, self.tracker = Path(config.run_dir) / "log.jsonl", None
        self.failed: set[str] = set()
        if world.is_main:
            self.info(forget_later_lines(self.path, first))
            self.tracker = create_tracker(config, first)
        self.since, self.first = time.monotonic(), first  # from where the speed is measured

    def info(self, sentence: str) -> None:
        """A sentence above the bar, if there is one to say."""
        if self.world.is_main and sentence:
            self.bar.write(printable(sentence))

    @contextlib.contextmanager
    def optional(self, kind: str, sentence: str, together: bool = False) -> Iterator[None]:
        """A block whose errors do not end the run: the first of each kind is said, by this sentence.

        together: whether other ranks take part in the block; these would wait for the one that fails.
        """
        try:
            yield
        except Exception as error:
            if together and self.world.size > 1:
                raise
            if kind not in self.failed:
                self.failed.add(kind)
                self.info(f"{sentence} ({write_failure(error)}); the run goes on")

    def count_step(self) -> None:
        """One step more on the bar; once some are timed, a line says how long the run will take."""
        self.bar.update()
        done = 0 if self.bar.disable else self.bar.n - self.bar.initial
        if done == 2:  # the first steps also compile
            self.timed = time.monotonic()
        elif done == 12:
            seconds = (time.monotonic() - self.timed) / 10
            left, speed = self.config.steps - self.bar.n, self.config.batch_size / seconds
            self.info(f"{left:,} steps to go at {speed:,.0f} images/s: {self.bar.format_interval(left * seconds)}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the speed what a checkpoint or a preview takes."""
        begun = time.monotonic()
        yield
        self.since += time.monotonic() - begun

    def metrics(self, state: TrainState) -> None:
        """Log the means over ranks and the steps taken since the last call; None if none was taken."""
        if self.world.size > 1:
            dist.all_reduce(state.sums)
        count, totals = state.summed, (state.sums / self.world.size).tolist()
        means = [total / count for total in totals] if count else 4 * [None]
        state.sums, state.summed = torch.zeros_like(state.sums), 0
        step, loss, now = state.step, means[0], time.monotonic()
        speed = (step - self.first) * self.config.batch_size / (now - self.since)
        self.since, self.first = now, step
        mfu = self.peak and speed / self.world.size * self.flops / self.peak
        self.bar.set_postfix(loss="not finite" if loss is None else f"{loss:.4f}", img_s=f"{speed:.0f}", refresh=False)
        values: dict[str, Any] = dict(zip(("loss", "mse", "vb", "grad_norm"), means, strict=True))
        values |= {"lr": state.optimizer.param_groups[0]["lr"], "skipped": state.skipped}
        values |= {"ema_decay": ema_decays(self.config, step)[0]}
        if state.scaler.is_enabled():
            values["loss_scale"] = state.scaler.get_scale()
        clock = {"images_per_s": round(speed, 1), "mfu": mfu, "peak_memory": peak_memory(self.device)}
        self._write(step, values | clock)

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Log the scores of samples, on a line of their own."""
        self.info(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        self._write(step, scores)

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture file for the tracker."""
        if self.tracker is not None:
            with self.optional("tracker", f"{self.config.tracker} could not take the picture of step {step}"):
                self.tracker.image(step, name, path)

    def close(self) -> None:
        self.bar.close()
        if self.tracker is not None:
            with self.optional("tracker", f"{self.config.tracker} could not be closed"):
                self.tracker.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        values = {"images": step * self.config.batch_size} | values
        with self.optional("log", f"step {step} could not be logged"), open(self.path, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        if self.tracker is not None:
            with self.optional("tracker", f"{self.config.tracker} could not log step {step}"):
                self.tracker.log(step, {name: value for name, value in values.items() if value is not None})
