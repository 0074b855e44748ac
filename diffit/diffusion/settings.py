"""The settings of this floor's parts, each a frozen dataclass of its own; no tensor library is needed to read them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DiffusionConfig:
    """The Gaussian process that a network was trained for.

    Args:
        noise_schedule: betas of the forward process.
        diffusion_steps: T, the number of steps of the forward process.
        learn_sigma: the network also predicts the variance.
    """

    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    diffusion_steps: int = 1000
    learn_sigma: bool = True


@dataclass(frozen=True)
class SamplingConfig:
    """How noise becomes a sample.

    Args:
        sampler: ddpm is the published one; ddim, dpm++ and unipc need fewer steps.
        num_sampling_steps: how many of the T steps are taken; also "ddim50" (fixed integer stride) or "10,15,20"
            (steps per equal section) for ddpm and ddim.
        eta: noise of ddim, 0 (deterministic) to 1 (ancestral).
        clip_denoised: clamp the predicted x_start to [-1, 1] at every step; for pixels, not for latents.
    """

    sampler: Literal["ddpm", "ddim", "dpm++", "unipc"] = "ddpm"
    num_sampling_steps: int | str = 250
    eta: float = 0.0
    clip_denoised: bool = False


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance.

    Args:
        scale: guidance scale s; 1 is no guidance.
        enabled: False samples class-conditionally without guidance, whatever the scale.
        schedule: weight over time; auto is power_cosine up to 32x32 latents and constant above, as published.
        power: exponent of power_cosine.
        channels: how many noise channels are guided: 3 reproduces the published numbers, 'all' is the textbook form.
        interval: [first, last] timestep (of T) at which guidance acts, inclusive; everywhere by default.
    """

    scale: float = 1.0
    enabled: bool = True
    schedule: Literal["auto", "constant", "power_cosine"] = "auto"
    power: float = 4.0
    channels: int | Literal["all"] = 3
    interval: tuple[int, int] | None = None
