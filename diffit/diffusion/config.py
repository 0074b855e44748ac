"""The settings of this floor's parts, each a frozen dataclass of its own; no tensor library is needed to read them."""

from dataclasses import dataclass, fields
from typing import Literal

Process = Literal["gaussian", "edm"]


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
class EDMConfig:
    """The EDM process that a network was trained for: x = image + sigma * noise.

    Args:
        sigma_data: standard deviation of the images.
        sigma_min: lowest noise level that sampling visits.
        sigma_max: highest noise level, where sampling starts.
        rho: how the levels in between crowd towards the low end.
        p_mean: mean of ln sigma in training.
        p_std: standard deviation of ln sigma in training.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    p_mean: float = -1.2
    p_std: float = 1.2


ProcessConfig = DiffusionConfig | EDMConfig


@dataclass(frozen=True)
class SamplingConfig:
    """How noise becomes a sample.

    Args:
        sampler: of the Gaussian process, ddpm is the published one; ddim, dpm++ and unipc need fewer steps. heun is
            that of EDM.
        num_sampling_steps: how many of the T steps are taken; also "ddim50" (fixed integer stride) or "10,15,20"
            (steps per equal section) for ddpm and ddim.
        eta: noise of ddim, 0 (deterministic) to 1 (ancestral).
        clip_denoised: clamp the predicted x_start to [-1, 1] at every step of the Gaussian process; for pixels, not for
            latents.
        s_churn: noise that heun puts back over all steps; 0 is deterministic.
        s_min: lowest noise level at which heun puts noise back.
        s_max: highest such level; none by default.
        s_noise: standard deviation of that noise.
    """

    sampler: Literal["ddpm", "ddim", "dpm++", "unipc", "heun"] = "ddpm"
    num_sampling_steps: int | str = 250
    eta: float = 0.0
    clip_denoised: bool = False
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float | None = None
    s_noise: float = 1.0


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance.

    Args:
        scale: guidance scale s; 1 is no guidance.
        enabled: False samples class-conditionally without guidance, whatever the scale.
        schedule: weight over time; auto is power_cosine up to 32x32 latents and constant above, as published. EDM has
            constant alone.
        power: exponent of power_cosine.
        channels: how many noise channels are guided: 3 reproduces the published numbers, 'all' is the textbook form.
        interval: [first, last] timestep (of T) at which guidance acts, inclusive; everywhere by default.
        skip_below: where the weight differs from 1 by less than this, the null half is not evaluated: with power_cosine
            at 4.4, 1e-3 saves 16% of the passes. 0 evaluates both halves everywhere.
    """

    scale: float = 1.0
    enabled: bool = True
    schedule: Literal["auto", "constant", "power_cosine"] = "auto"
    power: float = 4.0
    channels: int | Literal["all"] = 3
    interval: tuple[int, int] | None = None
    skip_below: float = 0.0


SAMPLERS: dict[Process, tuple[str, ...]] = {"gaussian": ("ddpm", "ddim", "dpm++", "unipc"), "edm": ("heun",)}
# The sampling settings that only one process reads.
_OWN_SETTINGS: dict[Process, tuple[str, ...]] = {
    "gaussian": ("eta", "clip_denoised"),
    "edm": ("s_churn", "s_min", "s_max", "s_noise"),
}


def process_of(config: ProcessConfig) -> Process:
    """The name of the process that a config describes."""
    return "edm" if isinstance(config, EDMConfig) else "gaussian"


def check_process(process: Process, sampling: SamplingConfig, guidance: GuidanceConfig) -> None:
    """Refuse settings that mean nothing to a process.

    Raises:
        ValueError: if its samplers are others, a setting of sampling belongs to another process or is out of range, or
            guidance is over timesteps that it does not have.
    """
    if sampling.sampler not in SAMPLERS[process]:
        choices = " or ".join(SAMPLERS[process])
        raise ValueError(f"the {sampling.sampler} sampler does not fit the {process} process: choose {choices}")
    foreign = [name for other, names in _OWN_SETTINGS.items() if other != process for name in names]
    for setting in fields(sampling):
        if setting.name in foreign and getattr(sampling, setting.name) != setting.default:
            raise ValueError(f"--sampling.{setting.name} means nothing to the {process} process: leave it out")
    _check_churn(sampling)
    if guidance.skip_below < 0:
        raise ValueError(f"--guidance.skip_below must not be negative, as {guidance.skip_below} is")
    if process == "edm" and (
        guidance.schedule == "power_cosine" or guidance.interval is not None or guidance.skip_below
    ):
        raise ValueError(
            "the edm process has no timesteps for --guidance.schedule power_cosine, --guidance.interval or "
            "--guidance.skip_below to go by: leave them out"
        )


def _check_churn(sampling: SamplingConfig) -> None:
    for name in ("s_churn", "s_min", "s_noise"):
        if getattr(sampling, name) < 0:
            raise ValueError(f"--sampling.{name} must not be negative, as {getattr(sampling, name)} is")
    if sampling.s_max is not None and sampling.s_max < sampling.s_min:
        raise ValueError(
            f"heun puts noise back between s_min and s_max: --sampling.s_max must be at least {sampling.s_min}, not "
            f"{sampling.s_max}"
        )
