"""Samplers: generators of states from noise to sample, all with one signature. The caller adds bars and previews.

    for state in create_sampler(process_config, sampling_config)(model, z, noise):
        ...
    state.x

Here are those of the Gaussian process; EDM's and the flow's stand beside their processes. Letters: B batch, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffit.diffusion.config import SAMPLERS, DiffusionConfig, ProcessConfig, SamplingConfig, choose
from diffit.diffusion.gaussian import GaussianDiffusion, Model, ReverseStep, create_diffusion

NoiseSource = Callable[[], Tensor]
# (model, z [B, c, h, w] standard normal, noise source) -> the states on the way, the last one the sample.
Sampler = Callable[[Model, Tensor, NoiseSource], Iterator["SamplerState"]]


@dataclass(frozen=True)
class SamplerState:
    """After `step` of `num_steps` steps: x and the x_start predicted on the way, both [B, c, h, w]."""

    step: int
    num_steps: int
    x: Tensor
    pred_xstart: Tensor


def create_sampler(process: ProcessConfig, config: SamplingConfig) -> Sampler:
    """The sampler that a config names.

    Raises:
        ValueError: if the sampler or its steps do not fit the process.
    """
    functions = {name: entry.function for name, entry in SAMPLERS[process.name].items()}
    return choose(f"sampler of the {process.name} process", functions, config.sampler)(process, config)


def model_at(model: Model, time: float) -> Model:
    """The callable for a time that is known on the host; reading it from the tensor t would wait for the device.

    A model with a method `at(time)` may return a cheaper one: guidance leaves out its null half where it hardly counts.
    Any other model is returned as it is.
    """
    at = getattr(model, "at", None)
    return model if at is None else at(time)


def ddpm_sampler(process: DiffusionConfig, config: SamplingConfig) -> Sampler:
    """Ancestral sampling, the published sampler."""
    return _reverse_process(
        process, config, lambda diffusion, step, t, noise: diffusion.ancestral_step(step, t, noise())
    )


def ddim_sampler(process: DiffusionConfig, config: SamplingConfig) -> Sampler:
    """DDIM; with eta 0 it draws no noise after the start."""

    def step_back(diffusion: GaussianDiffusion, step: ReverseStep, t: Tensor, noise: NoiseSource) -> Tensor:
        return diffusion.ddim_step(step, t, noise() if config.eta else torch.zeros_like(step.mean), config.eta)

    return _reverse_process(process, config, step_back)


def _reverse_process(process: DiffusionConfig, config: SamplingConfig, step_back: Callable[..., Tensor]) -> Sampler:
    """Walk the respaced process from T-1 down to 0, one call of the model a step."""
    if not 0 <= config.eta <= 1:
        raise ValueError(f"eta must lie between 0 and 1, not {config.eta}")
    diffusion = create_diffusion(config.num_sampling_steps, **asdict(process))
    num_steps = diffusion.num_timesteps

    def states(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        x = z
        for index in reversed(range(num_steps)):
            t = torch.full((z.shape[0],), index, device=z.device)  # [B]
            at_t = model_at(model, int(diffusion.timestep_map[index]))
            step = diffusion.p_mean_variance(at_t, x, t, config.clip_denoised)
            x = step_back(diffusion, step, t, noise)
            yield SamplerState(num_steps - index, num_steps, x, step.pred_xstart)

    return states


def dpm_solver_sampler(process: DiffusionConfig, config: SamplingConfig) -> Sampler:
    """DPM-Solver++ of second order (20-50 steps), through the scheduler of diffusers."""
    from diffusers import DPMSolverMultistepScheduler

    create = partial(DPMSolverMultistepScheduler, algorithm_type="dpmsolver++", use_karras_sigmas=False)
    return _ode_solver(process, config, create)


def unipc_sampler(process: DiffusionConfig, config: SamplingConfig) -> Sampler:
    """UniPC of second order (20-50 steps), through the scheduler of diffusers."""
    from diffusers import UniPCMultistepScheduler

    return _ode_solver(process, config, UniPCMultistepScheduler)


def _ode_solver(process: DiffusionConfig, config: SamplingConfig, create: Callable[..., Any]) -> Sampler:
    """A multistep solver over the unrespaced process. A learned variance has no part in an ODE.

    Raises:
        ValueError: if the number of steps is not an integer between 1 and T - 1.
    """
    diffusion = create_diffusion(**asdict(process))
    num_steps = integer_steps(config, max(1, diffusion.num_timesteps - 1))  # of T, two would have the same timestep

    def states(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        x, betas = z, diffusion.betas
        # A new solver, which has seen no sample; its timesteps stay on the host, where the loop needs them.
        solver = create(num_train_timesteps=len(betas), trained_betas=betas, solver_order=2, prediction_type="epsilon")
        solver.set_timesteps(num_steps)
        for done, timestep in enumerate(solver.timesteps.tolist(), start=1):
            t = torch.full((z.shape[0],), timestep, device=z.device)  # [B]
            eps = model_at(model, timestep)(x, t).float()[:, : z.shape[1]]
            pred_xstart = diffusion.predict_xstart(x, t, eps)
            x = solver.step(eps, timestep, x).prev_sample
            yield SamplerState(done, num_steps, x, pred_xstart)

    return states


def integer_steps(config: SamplingConfig, most: int | None = None) -> int:
    """The number of steps of a sampler that takes no respacing.

    Raises:
        ValueError: if it is not an integer above 0, or above `most`.
    """
    text = str(config.num_sampling_steps)
    if not text.isdigit() or int(text) < 1 or (most is not None and int(text) > most):
        limits = f" between 1 and {most}" if most is not None else " above 0"
        raise ValueError(f"--num_sampling_steps of {config.sampler} must be a whole number{limits}, not '{text}'")
    return int(text)
