"""How fast the weights learn, and how fast their averages follow, step by step."""

from __future__ import annotations

import math

from diffit.training.config import OptimizerConfig, TrainConfig
from diffit.training.ema import half_life_decay, ramped_decay


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0, of a run of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * step / steps)) if config.schedule == "cosine" else 1.0
    return config.lr * warm * decay


def averaging_decays(config: TrainConfig, step: int) -> list[float]:
    """The decay of each average at optimizer step `step`, counted from 1."""
    if config.ema_half_life is None:
        return [ramped_decay(decay, step) for decay in config.averages]
    return [half_life_decay(half_life, config.batch_size, step) for half_life in config.averages]
