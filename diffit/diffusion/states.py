"""What all samplers have in common: noise in, states out, and the times at which the model is asked.

Letters: B batch, c channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffit.diffusion.gaussian import Model
from diffit.diffusion.guidance import ClassifierFreeGuidance

NoiseSource = Callable[[], Tensor]


@dataclass(frozen=True)
class SamplerState:
    """After `step` of `num_steps` steps: x and the x_start predicted on the way, both [B, c, h, w]."""

    step: int
    num_steps: int
    x: Tensor
    pred_xstart: Tensor


class States(Protocol):
    """(model, z [B, c, h, w] standard normal, noise source) -> the states on the way, the last one the sample."""

    def __call__(self, model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]: ...


@dataclass(frozen=True)
class Sampler:
    """How noise becomes a sample.

    Args:
        states: see `States`.
        times: every time that the model will be asked about: original timesteps, or the c_noise of EDM. What depends
            on them alone can be computed beforehand.
    """

    states: States
    times: tuple[float, ...]

    def __call__(self, model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        return self.states(model, z, noise)


def at_timestep(model: Model, timestep: int) -> Model:
    """What to call at an original timestep, which the host knows here: guidance may leave its null half out."""
    return model.at(timestep) if isinstance(model, ClassifierFreeGuidance) else model
