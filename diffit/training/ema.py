"""Exponential moving averages (EMA) of the weights, which are sampled from, and their decays."""

import copy

import torch
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
