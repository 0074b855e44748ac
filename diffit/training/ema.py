"""Exponential moving averages of a network's weights: what is sampled from."""

import copy

import torch
from torch import Tensor, nn

RAMP_UP = 0.05


def ramped_decay(decay: float, step: int) -> float:
    """The decay at optimizer step `step`, counted from 1: (1 + step) / (10 + step), up to `decay`.

    The average thus forgets the initialisation.
    """
    return min(decay, (1 + step) / (10 + step))


def half_life_decay(half_life: float, batch_size: int, step: int) -> float:
    """The decay at optimizer step `step`, counted from 1, for a half-life in images, as in EDM.

    It is at most 5% of the images seen before the step: the average forgets the initialisation at once.
    """
    ramped = min(half_life, (step - 1) * batch_size * RAMP_UP)
    return 0.5 ** (batch_size / ramped) if ramped else 0.0


class EMA:
    """A copy of a network that follows it: average = decay * average + (1 - decay) * weights.

    Args:
        model: the network; its copy, in eval mode and without gradients, is `.model`. If one is sharded over processes,
            the other must be so too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Follow the network after an optimizer step, with that step's decay in [0, 1)."""
        torch._foreach_lerp_(_here(self.model), _here(model), 1 - decay)


def _here(model: nn.Module) -> list[Tensor]:
    """The parameters, or what this process holds of them."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
