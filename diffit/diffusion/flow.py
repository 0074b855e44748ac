"""Rectified flow (Liu et al. 2023; the linear path of SiT, Ma et al. 2024): x_t = (1 - t) x + t eps, t in [0, 1].

The network predicts the velocity dx_t/dt = eps - x, and is asked at 1000 t, so that its time embedding sees the range
of other processes. Letters: B batch, c channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffit.diffusion.config import TIME_DISTRIBUTIONS, FlowConfig, SamplingConfig, choose
from diffit.diffusion.gaussian import Model, TrainingLosses, mean_flat
from diffit.diffusion.samplers import NoiseSource, Sampler, SamplerState, integer_steps, model_at

TIME_SCALE = 1000


def uniform_times(generator: np.random.Generator, count: int) -> NDArray[np.float32]:
    """t uniform in [0, 1): float32 [count]."""
    return generator.random(count, np.float32)


def logit_normal_times(generator: np.random.Generator, count: int) -> NDArray[np.float32]:
    """t = 1 / (1 + exp(-n)) of standard normal numbers n (Esser et al. 2024): float32 [count] in (0, 1)."""
    return np.float32(1) / (1 + np.exp(-generator.standard_normal(count, np.float32)))


class FlowMatching:
    """The process as training sees it, with the calls of GaussianDiffusion.

    Args:
        config: the distribution of t.

    Raises:
        ValueError: if the distribution is unknown.
    """

    def __init__(self, config: FlowConfig | None = None) -> None:
        config = config or FlowConfig()
        self._draw = choose("distribution of times", TIME_DISTRIBUTIONS, config.time_distribution)

    def draw_t(self, generator: np.random.Generator, count: int) -> NDArray[np.float32]:
        """Times for training in [0, 1]: float32 [count]."""
        return self._draw(generator, count)

    def training_losses(self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor) -> TrainingLosses:
        """The mean squared error of the velocity. x_start, noise: [B, c, h, w]; t: [B] in [0, 1]."""
        at = t.view(-1, 1, 1, 1)  # [B, 1, 1, 1]
        x_t = (1 - at) * x_start + at * noise  # [B, c, h, w]
        velocity = model(x_t, TIME_SCALE * t).float()[:, : x_start.shape[1]]
        mse = mean_flat((velocity - (noise - x_start)) ** 2)  # [B]
        return TrainingLosses(mse, mse, torch.zeros_like(mse))


def euler_sampler(process: FlowConfig, config: SamplingConfig) -> Sampler:
    """Euler's method on equal steps of t from 1 to 0: one call of the model a step."""
    return _flow_sampler(integer_steps(config), second_order=False)


def heun_sampler(process: FlowConfig, config: SamplingConfig) -> Sampler:
    """Heun's second-order method on equal steps of t from 1 to 0: two calls of the model a step."""
    return _flow_sampler(integer_steps(config), second_order=True)


def _flow_sampler(num_steps: int, second_order: bool) -> Sampler:
    def velocity(model: Model, x: Tensor, time: float) -> Tensor:
        t = torch.full((len(x),), TIME_SCALE * time, device=x.device)  # [B]
        return model_at(model, TIME_SCALE * time)(x, t).float()[:, : x.shape[1]]

    def states(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        x = z
        for step in range(num_steps):
            time, following = 1 - step / num_steps, 1 - (step + 1) / num_steps
            first = slope = velocity(model, x, time)
            if second_order:  # the mean of the slopes at both ends
                slope = (first + velocity(model, x + (following - time) * first, following)) / 2
            pred_xstart = x - time * first
            x = x + (following - time) * slope
            yield SamplerState(step + 1, num_steps, x, pred_xstart)

    return states
