"""What a denoising process is to training: it draws times and computes losses.

Its config (config.py) names what it is to sampling: samplers and guidance schedules.
"""

from __future__ import annotations

import pkgutil
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffit.diffusion.config import ProcessConfig
from diffit.diffusion.gaussian import Model, TrainingLosses


class Process(Protocol):
    """GaussianDiffusion, EDM, FlowMatching."""

    def draw_t(self, generator: np.random.Generator, count: int) -> NDArray[Any]:
        """What chooses the noise level of each of `count` images, as training_losses takes it: [count]."""

    def training_losses(self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor) -> TrainingLosses:
        """Losses per sample. x_start: [B, c, h, w]; t: [B], see `draw_t`; noise: standard normal [B, c, h, w]."""


def create_process(config: ProcessConfig) -> Process:
    """The process that a config describes.

    Raises:
        ValueError: if a choice of the config is unknown.
    """
    return pkgutil.resolve_name(config.implementation)(config)
