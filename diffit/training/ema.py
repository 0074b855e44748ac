"""Exponential moving averages (EMA) of the weights, which are sampled from, and their decays.

EMAs of power functions, and how others are made of them: Karras et al. 2024, 'Analyzing and Improving the Training
Dynamics of Diffusion Models', section 3 and appendix C.
"""

import copy
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffit.training.config import TrainConfig


def ramped_decay(decay: float, step: int) -> float:
    """The decay at optimizer step `step`, counted from 1: (1 + step) / (10 + step), up to `decay`.

    The EMA thus forgets the initialisation.
    """
    return min(decay, (1 + step) / (10 + step))


def ema_decays(config: TrainConfig, step: int) -> list[float]:
    """The decay of each EMA at optimizer step `step`, counted from 1."""
    if config.ema_half_life is None:
        return [ramped_decay(decay, step) for decay in config.ema_rates]
    # As in EDM a half-life is at most 5% of the images seen before the step: the initialisation is forgotten at once.
    half_lives = [min(half_life, (step - 1) * config.batch_size * 0.05) for half_life in config.ema_rates]
    return [0.5 ** (config.batch_size / half_life) if half_life else 0.0 for half_life in half_lives]


@cache
def power_exponent(sigma_rel: float) -> float:
    """The gamma of an EMA in which weights of time s count as s^gamma, from 0 to now.

    sigma_rel: standard deviation of that profile over the time since the start, in (0, 0.28]; it is
        sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).
    """
    cubic = np.polysub(np.poly([-2, -2, -3]), [sigma_rel**-2, sigma_rel**-2])  # (g + 2)^2 (g + 3) - (g + 1) / sigma^2
    return float(np.roots(cubic).real.max())


def power_decay(sigma_rel: float, images: int, batch_size: int) -> float:
    """The decay of a power function EMA after a step of `batch_size` images, which ends at `images` in all.

    The first is 0. A step so counts as the integral of the profile over its images.
    """
    return float((1 - batch_size / images) ** (power_exponent(sigma_rel) + 1))


def posthoc_coefficients(
    snapshots: Sequence[tuple[float, float]], images: float, sigma_rel: float
) -> tuple[NDArray[np.float64], float]:
    """Coefficients of snapshots whose sum is close to an EMA of another length, by least squares.

    Args:
        snapshots: images seen, and sigma_rel, of each of N snapshots in fp16.
        images: images seen by the EMA to make.
        sigma_rel: length of the EMA to make, in (0, 0.28].

    Returns:
        The coefficients [N], whose sum is 1, and the relative root mean square error of their profile and rounding.
    """
    t, gamma = np.array([(t / images, power_exponent(s)) for t, s in (*snapshots, (images, sigma_rel))]).T
    # Inner products of the profiles (gamma + 1) s^gamma / t^(gamma + 1), over s from 0 to the earlier of both ends.
    end = np.minimum.outer(t, t)
    falls = (end / t) ** gamma
    products = (
        np.outer(gamma + 1, gamma + 1) / (np.add.outer(gamma, gamma) + 1) * falls * falls.T * end / np.outer(t, t)
    )
    products /= products[-1, -1]
    products[:-1, :-1] += 2.0**-24 * np.eye(len(t) - 1)  # the variance of fp16's rounding; it keeps coefficients small
    system = products.copy()  # the last row and column, the target's, become the constraint and its multiplier
    system[-1], system[:, -1], system[-1, -1] = 1, 1, 0
    coefficients = np.linalg.solve(system, np.append(products[:-1, -1], 1))[:-1]
    difference = np.append(coefficients, -1)
    return coefficients, float(np.sqrt(max(0.0, difference @ products @ difference)))


class EMA:
    """A copy of a network that follows it: ema = decay * ema + (1 - decay) * weights.

    Args:
        model: the network; its copy, in eval mode and without gradients, is `.model`. If one is sharded over ranks,
            the other must be so too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Follow the network after an optimizer step, with that step's decay in [0, 1)."""
        torch._foreach_lerp_(_here(self.model), _here(model), 1 - decay)


def _here(model: nn.Module) -> list[Tensor]:
    """The parameters, or what this rank holds of them."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
