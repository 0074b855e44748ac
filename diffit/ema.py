"""Exponential moving average of a network's weights: what is sampled from."""

import copy

import torch
from torch import nn


class EMA:
    """A copy of a network that follows it: average = decay * average + (1 - decay) * weights.

    Args:
        model: the network; its copy, in eval mode and without gradients, is `.model`.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Follow the network after optimizer step `step`, counted from 1.

        In the first steps the decay is smaller, (1 + step) / (10 + step): the average forgets the initialisation.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
