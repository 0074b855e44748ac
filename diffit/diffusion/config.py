"""The settings of diffusion, each a frozen dataclass, and the choices by name.

Every choice (process, sampler, noise schedule, distribution of times, guidance schedule) is listed here once, and the
command-line parser reads it from here. A value "module:function" is imported when it is used, so that --help needs no
tensor library.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias, get_args

from diffit.settings import SAME, check_settings, setting

_HERE = "diffit.diffusion"

NOISE_SCHEDULES = {
    "linear": f"{_HERE}.schedule:linear_betas",
    "squaredcos_cap_v2": f"{_HERE}.schedule:cosine_betas",
}
TIME_DISTRIBUTIONS = {
    "uniform": f"{_HERE}.flow:uniform_times",
    "logit_normal": f"{_HERE}.flow:logit_normal_times",
}
GUIDANCE_SCHEDULES = {
    "constant": f"{_HERE}.guidance:constant_weight",
    "power_cosine": f"{_HERE}.guidance:power_cosine_weight",
}


class SamplerEntry(NamedTuple):
    """A function (process config, sampling config) -> sampler, and what it reads beside the number of steps."""

    function: str
    reads: tuple[str, ...] = ()


# Process -> sampler -> its entry; the first one is the default of the process.
SAMPLERS = {
    "gaussian": {
        "ddpm": SamplerEntry(f"{_HERE}.samplers:ddpm_sampler", ("clip_denoised",)),
        "ddim": SamplerEntry(f"{_HERE}.samplers:ddim_sampler", ("eta", "clip_denoised")),
        "dpm++": SamplerEntry(f"{_HERE}.samplers:dpm_solver_sampler"),
        "unipc": SamplerEntry(f"{_HERE}.samplers:unipc_sampler"),
    },
    "edm": {"heun": SamplerEntry(f"{_HERE}.edm:heun_sampler", ("s_churn", "s_min", "s_max", "s_noise"))},
    "flow": {
        "euler": SamplerEntry(f"{_HERE}.flow:euler_sampler"),
        "heun": SamplerEntry(f"{_HERE}.flow:heun_sampler"),
    },
}

if TYPE_CHECKING:  # a type checker takes no computed Literal
    ProcessName: TypeAlias = str
    SamplerName: TypeAlias = str
    NoiseSchedule: TypeAlias = str
    TimeDistribution: TypeAlias = str
    GuidanceSchedule: TypeAlias = str
else:
    ProcessName = Literal[tuple(SAMPLERS)]
    SamplerName = Literal[tuple(dict.fromkeys(name for names in SAMPLERS.values() for name in names))]
    NoiseSchedule = Literal[tuple(NOISE_SCHEDULES)]
    TimeDistribution = Literal[tuple(TIME_DISTRIBUTIONS)]
    GuidanceSchedule = Literal[tuple(["auto"] + list(GUIDANCE_SCHEDULES))]  # noqa: RUF005 (Python 3.10 has no star here)


def choose(what: str, choices: Mapping[str, str], name: str) -> Any:
    """The function or class that a choice names.

    Raises:
        ValueError: if there is no such choice.
    """
    if name not in choices:
        raise ValueError(f"unknown {what} '{name}': choose {' or '.join(choices)}")
    return pkgutil.resolve_name(choices[name])


@dataclass(frozen=True)
class DiffusionConfig:
    """The Gaussian process that a network was trained for.

    Args:
        noise_schedule: betas of the forward process.
        diffusion_steps: T, the number of steps of the forward process.
        learn_sigma: the network also predicts the variance.
    """

    noise_schedule: NoiseSchedule = "linear"
    diffusion_steps: int = setting(1000, at_least=2, at_most=10**5)
    learn_sigma: bool = True

    name: ClassVar = "gaussian"
    title: ClassVar = "DDPM"
    implementation: ClassVar = f"{_HERE}.gaussian:create_process"
    guidance_schedules: ClassVar = ("constant", "power_cosine")
    spaces: ClassVar = ("latents",)  # the inputs of networks that it trains

    @staticmethod
    def default_steps(input_size: int) -> int:
        """Default number of sampling steps for a network of this input size."""
        return 250

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps that the network is trained for."""
        return self.diffusion_steps


@dataclass(frozen=True)
class EDMConfig:
    """The EDM process that a network was trained for: x = image + sigma * noise.

    Args:
        sigma_data: standard deviation of the images.
        sigma_min: lowest noise level that sampling visits.
        sigma_max: highest noise level, where sampling starts.
        rho: exponent of the spacing of noise levels; a higher one puts more of them at the low end.
        p_mean: mean of ln sigma in training.
        p_std: standard deviation of ln sigma in training.
    """

    sigma_data: float = setting(0.5, at_least=1e-6, at_most=1e6)
    sigma_min: float = setting(0.002, at_least=1e-9, at_most=1e6)
    sigma_max: float = setting(80.0, at_least=1e-9, at_most=1e6)
    rho: float = setting(7.0, at_least=0.1, at_most=100)
    p_mean: float = setting(-1.2, at_least=-10, at_most=10)
    p_std: float = setting(1.2, at_least=0, at_most=5)

    name: ClassVar = "edm"
    title: ClassVar = "EDM"
    implementation: ClassVar = f"{_HERE}.edm:EDM"
    guidance_schedules: ClassVar = ("constant",)
    spaces: ClassVar = ("pixels",)
    learn_sigma: ClassVar = False
    num_timesteps: ClassVar = None  # the network's time is ln(sigma)/4: there are no timesteps

    @staticmethod
    def default_steps(input_size: int) -> int:
        """The EDM paper's for CIFAR-10, and for FFHQ-64 above."""
        return 18 if input_size <= 32 else 40


@dataclass(frozen=True)
class FlowConfig:
    """The rectified flow that a network was trained for: x_t = (1 - t) x + t eps, t in [0, 1].

    Args:
        time_distribution: distribution of t in training: uniform, or logit-normal, which is denser in the middle.
    """

    time_distribution: TimeDistribution = "uniform"

    name: ClassVar = "flow"
    title: ClassVar = "rectified flow"
    implementation: ClassVar = f"{_HERE}.flow:FlowMatching"
    guidance_schedules: ClassVar = ("constant",)
    spaces: ClassVar = ("latents", "pixels")
    learn_sigma: ClassVar = False
    num_timesteps: ClassVar = 1000  # the network's time is 1000 t

    @staticmethod
    def default_steps(input_size: int) -> int:
        """50 steps of Euler, a round number that was not tuned."""
        return 50


ProcessConfig = DiffusionConfig | EDMConfig | FlowConfig


def fitting_processes(space: str) -> list[str]:
    """The processes for networks of `latents` or of `pixels`; the first one is the default."""
    return [process.name for process in get_args(ProcessConfig) if space in process.spaces]


@dataclass(frozen=True)
class SamplingConfig:
    """How noise becomes a sample.

    Args:
        sampler: name of the sampler. The Gaussian process has ddpm, the published one, and ddim, dpm++ and unipc, which
            need fewer steps; EDM has heun; a flow has euler and heun.
        num_sampling_steps: number of steps; for ddpm and ddim also "ddim50" (fixed integer stride) or "10,15,20" (steps
            in equal sections of the T timesteps).
        eta: amount of noise of ddim, from 0 (deterministic) to 1 (ancestral).
        clip_denoised: clamp the predicted x_start to [-1, 1] at every step of the Gaussian process; for pixels, not for
            latents.
        s_churn: amount of noise that EDM's heun adds over all steps; 0 is deterministic.
        s_min: lowest noise level at which it adds noise.
        s_max: highest noise level at which it adds noise; no limit by default.
        s_noise: standard deviation of the noise that it adds.
    """

    sampler: SamplerName = "ddpm"
    num_sampling_steps: int | str = setting(250, at_least=1, at_most=10**5)
    eta: float = setting(0.0, at_least=0, at_most=1)
    clip_denoised: bool = False
    s_churn: float = setting(0.0, at_least=0, at_most=1e6)
    s_min: float = setting(0.0, at_least=0, at_most=1e12)
    s_max: float | None = setting(None, at_least=0, at_most=1e12)
    s_noise: float = setting(1.0, at_least=0, at_most=1e6)


@dataclass(frozen=True)
class GuidanceConfig:
    """Classifier-free guidance, or autoguidance by a second network.

    Args:
        scale: guidance scale s; 1 is no guidance.
        enabled: False samples class-conditionally without guidance, whatever the scale.
        schedule: weight over time; auto is power_cosine up to 32x32 latents and constant above, as published. EDM and
            flows have constant alone.
        power: exponent of power_cosine.
        channels: number of guided noise channels: 3 reproduces the published numbers, 'all' is the textbook form.
        interval: first and last of the T timesteps at which guidance acts; everywhere by default. Outside, the null
            half is not evaluated.
        guide: autoguidance (Karras et al. 2024): weights, as --model_path takes them, of a worse network of the same
            process and data, smaller or trained less. It predicts with the label what the null half predicts without
            one in classifier-free guidance.
        skip_below: where the weight differs from 1 by less than this, the null half is not evaluated: with power_cosine
            at 4.4, 1e-3 saves 16% of the passes. 0 evaluates both halves everywhere.
    """

    scale: float = setting(1.0, at_least=-1e6, at_most=1e6)
    enabled: bool = True
    schedule: GuidanceSchedule = "auto"
    power: float = setting(4.0, at_least=0, at_most=1e6)
    channels: int | Literal["all"] = setting(3, at_least=1)
    interval: tuple[int, int] | None = setting(None, at_least=0)
    skip_below: float = setting(0.0, at_least=0, at_most=1e6)
    guide: str | None = None


# Weights of guidance that differ from 1 by less do less to a sample than rounding to bf16 does: docs/benchmarks.md.
SKIP_BELOW = 1e-3


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Settings that sampling, training and checkpoints share: a node for each process, of which `process` is used."""

    process: ProcessName = setting("gaussian", SAME)
    diffusion: DiffusionConfig = setting(DiffusionConfig(), SAME)
    edm: EDMConfig = setting(EDMConfig(), SAME)
    flow: FlowConfig = setting(FlowConfig(), SAME)
    sampling: SamplingConfig = setting(SamplingConfig(), SAME)
    guidance: GuidanceConfig = setting(GuidanceConfig(), SAME)

    @property
    def process_config(self) -> ProcessConfig:
        """The node of the process that is used."""
        nodes = [getattr(self, each.name) for each in fields(ProcessSettings)]
        return next(node for node in nodes if isinstance(node, ProcessConfig) and node.name == self.process)


def unread_settings(process: str, sampler: str) -> dict[str, Any]:
    """The settings of sampling that a sampler does not read, and their defaults; {} if the process does not have it."""
    entry, (_, _, *others) = SAMPLERS[process].get(sampler), fields(SamplingConfig)
    return {each.name: each.default for each in others if entry and each.name not in entry.reads}


def changed_sampling(process: str, recommended: SamplingConfig, **changes: Any) -> SamplingConfig:
    """Recommended settings with some changed; the others that the sampler does not read return to their defaults."""
    unread = unread_settings(process, changes.get("sampler", recommended.sampler))
    return replace(recommended, **(unread | changes))


def check_process(process: ProcessConfig, sampling: SamplingConfig, guidance: GuidanceConfig) -> None:
    """Refuse settings that do not work: out of their ranges, or without a meaning to the process.

    Raises:
        ValueError: if a number is out of its range, the levels or betas of the process do not fit one another, its
            samplers are others, a setting of sampling belongs to another process, or guidance is over timesteps that
            it does not have.
    """
    name = process.name
    node = next(each.name for each in fields(ProcessSettings) if type(each.default) is type(process))
    for key, config in {node: process, "sampling": sampling, "guidance": guidance}.items():
        check_settings(config, f"--{key}.")
    if isinstance(process, EDMConfig) and process.sigma_min >= process.sigma_max:
        raise ValueError(f"--edm.sigma_min must be below --edm.sigma_max {process.sigma_max}, not {process.sigma_min}")
    if isinstance(process, DiffusionConfig) and process.noise_schedule == "linear" and process.diffusion_steps <= 20:
        raise ValueError(  # the last beta is 20 / T
            f"--diffusion.diffusion_steps must be above 20 with the linear schedule, not {process.diffusion_steps}"
        )
    if sampling.sampler not in SAMPLERS[name]:
        choices = " or ".join(SAMPLERS[name])
        raise ValueError(f"the {sampling.sampler} sampler does not fit the {name} process: choose {choices}")
    for key, default in unread_settings(name, sampling.sampler).items():
        if getattr(sampling, key) != default:
            raise ValueError(
                f"the {sampling.sampler} sampler of the {name} process does not read --sampling.{key}: leave it out"
            )
    if sampling.s_max is not None and sampling.s_max < sampling.s_min:
        raise ValueError(
            f"heun adds noise between --sampling.s_min and --sampling.s_max: s_max must be at least {sampling.s_min}, "
            f"not {sampling.s_max}"
        )
    if guidance.interval is not None and guidance.interval[0] > guidance.interval[1]:
        first, last = guidance.interval
        raise ValueError(f"--guidance.interval {first} {last} is empty: its first timestep must not lie above its last")
    if process.num_timesteps is None and (
        guidance.schedule == "power_cosine" or guidance.interval is not None or guidance.skip_below
    ):
        raise ValueError(
            f"the {name} process has no timesteps for --guidance.schedule power_cosine, --guidance.interval or "
            "--guidance.skip_below to go by: leave them out"
        )
    if guidance.schedule not in ("auto", *process.guidance_schedules):
        choices = " or ".join(process.guidance_schedules)
        raise ValueError(f"the {name} process has no guidance schedule {guidance.schedule}: choose {choices}")
