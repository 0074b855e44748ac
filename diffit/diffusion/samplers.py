"""Samplers: generators of states from noise to sample, all with one signature. The caller adds bars and previews.

    for state in create_sampler(process_config, sampling_config)(model, z, noise):
        ...
    state.x

Letters: B batch, c channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from diffit.diffusion.config import SAMPLERS, EDMConfig, ProcessConfig, SamplingConfig, process_of
from diffit.diffusion.edm import heun_sampler
from diffit.diffusion.gaussian import GaussianDiffusion, Model, create_diffusion
from diffit.diffusion.solvers import solver_sampler
from diffit.diffusion.states import NoiseSource, Sampler, SamplerState, at_timestep


def ddpm_sampler(diffusion: GaussianDiffusion, config: SamplingConfig) -> Sampler:
    """Ancestral sampling, the published sampler."""

    def states(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        x, num_steps = z, diffusion.num_timesteps
        for done, (timestep, t) in enumerate(_steps_down(diffusion, z), start=1):
            step = diffusion.p_mean_variance(at_timestep(model, timestep), x, t, config.clip_denoised)
            x = diffusion.ancestral_step(step, t, noise())
            yield SamplerState(done, num_steps, x, step.pred_xstart)

    return Sampler(states, tuple(diffusion.timestep_map.tolist()))


def ddim_sampler(diffusion: GaussianDiffusion, config: SamplingConfig) -> Sampler:
    """DDIM; with eta 0 it draws no noise after the start."""

    def states(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        x, num_steps = z, diffusion.num_timesteps
        for done, (timestep, t) in enumerate(_steps_down(diffusion, z), start=1):
            step = diffusion.p_mean_variance(at_timestep(model, timestep), x, t, config.clip_denoised)
            x = diffusion.ddim_step(step, t, noise() if config.eta else torch.zeros_like(x), config.eta)
            yield SamplerState(done, num_steps, x, step.pred_xstart)

    return Sampler(states, tuple(diffusion.timestep_map.tolist()))


def _steps_down(diffusion: GaussianDiffusion, z: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The steps T-1, ..., 0 of the process: the original timestep, and the step as [B]."""
    for step in reversed(range(diffusion.num_timesteps)):
        yield int(diffusion.timestep_map[step]), torch.full((z.shape[0],), step, device=z.device)


def create_sampler(process: ProcessConfig, config: SamplingConfig) -> Sampler:
    """The sampler that a config names.

    Raises:
        ValueError: if the sampler or its steps do not fit the process.
    """
    known = SAMPLERS[process_of(process)]
    if config.sampler not in known:
        raise ValueError(f"unknown sampler '{config.sampler}' of this process: choose one of {', '.join(known)}")
    if isinstance(process, EDMConfig):
        return heun_sampler(process, config)
    if config.sampler in ("dpm++", "unipc"):
        return solver_sampler(create_diffusion(**asdict(process)), config)
    if not 0 <= config.eta <= 1:
        raise ValueError(f"eta must lie between 0 and 1, not {config.eta}")
    diffusion = create_diffusion(timestep_respacing=config.num_sampling_steps, **asdict(process))
    return ddpm_sampler(diffusion, config) if config.sampler == "ddpm" else ddim_sampler(diffusion, config)
