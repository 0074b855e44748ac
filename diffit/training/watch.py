"""Watching a run: one bar, log.jsonl, and TensorBoard where it is installed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffit.distributed import World
from diffit.models.config import NetworkConfig
from diffit.training.config import TrainConfig
from diffit.training.estimate import estimate, measured_peak, peak_memory
from diffit.training.logs import JsonLog


class Watch:
    """Shows and writes what the loop reports. Only rank 0 shows and writes.

    Args:
        network: what is trained, to count its operations.
        first: the step that the run goes on from; later lines of an earlier start are forgotten.
    """

    def __init__(
        self, config: TrainConfig, network: NetworkConfig, first: int, device: torch.device, world: World
    ) -> None:
        self.config, self.device, self.world = config, device, world
        self.bar = tqdm(total=config.steps, initial=first, unit="step", disable=not world.is_main)
        self.flops = estimate(network).flops
        self.peak = measured_peak(device, config.precision) if device.type == "cuda" else None
        self.since, self.first = time.monotonic(), first
        if world.is_main:
            folder = Path(config.run_dir)
            self.log = JsonLog(folder / "log.jsonl", first)
            self.board = _tensorboard(folder / "tensorboard", first)

    def say(self, sentence: str) -> None:
        """A sentence above the bar."""
        if self.world.is_main:
            self.bar.write(sentence)

    def restart_clock(self, step: int) -> None:
        """Leave the time up to here, spent on a checkpoint or a preview, out of the speed."""
        self.since, self.first = time.monotonic(), step

    def report(self, step: int, values: dict[str, Any]) -> None:
        """Log what happened since the last report. values: what the loop measured, `loss` among it."""
        speed = (step - self.first) * self.config.batch_size / (time.monotonic() - self.since)
        mfu = self.peak and speed / self.world.size * self.flops / self.peak
        self.restart_clock(step)
        loss = values["loss"]
        self.bar.set_postfix(loss="not finite" if loss is None else f"{loss:.4f}", img_s=f"{speed:.0f}")
        if not self.world.is_main:
            return
        values |= {"images_per_s": round(speed, 1), "mfu": mfu, "peak_memory": peak_memory(self.device)}
        self._write(step, values)

    def log_scores(self, step: int, scores: dict[str, float]) -> None:
        """Log the scores of samples, on a line of their own."""
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
        if self.world.is_main:
            self._write(step, scores)

    def _write(self, step: int, values: dict[str, Any]) -> None:
        values = {"step": step, "images": step * self.config.batch_size} | values
        self.log.write(**values)
        if self.board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, step)

    def show(self, name: str, picture: Any, step: int) -> None:
        """A picture [H, W, C] for TensorBoard."""
        if self.world.is_main and self.board is not None:
            self.board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.bar.close()
        if self.world.is_main and self.board is not None:
            self.board.close()


def _tensorboard(folder: Path, first: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first + 1)
