"""Samplers: generators of states from noise to sample, all with one signature. The caller adds bars and previews.

    for state in create_sampler(process_config, sampling_config)(model, z, noise):
        ...
    state.x

Letters: B batch, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffit.diffusion.gaussian import GaussianDiffusion, Model, create_diffusion
from diffit.diffusion.settings import SAMPLERS, DiffusionConfig, EDMConfig, ProcessConfig, SamplingConfig, process_of

NoiseSource = Callable[[], Tensor]


@dataclass(frozen=True)
class SamplerState:
    """After `step` of `num_steps` steps: x and the x_start predicted on the way, both [B, c, h, w]."""

    step: int
    num_steps: int
    x: Tensor
    pred_xstart: Tensor


class Sampler(Protocol):
    """(model, z [B, c, h, w] standard normal, noise source) -> the states on the way, the last one the sample."""

    def __call__(self, model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]: ...


def ddpm_sampler(diffusion: GaussianDiffusion, config: SamplingConfig) -> Sampler:
    """Ancestral sampling, the published sampler."""

    def sample(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        x, num_steps = z, diffusion.num_timesteps
        for done, t in enumerate(_steps_down(diffusion, z), start=1):
            step = diffusion.p_mean_variance(model, x, t, config.clip_denoised)
            x = diffusion.ancestral_step(step, t, noise())
            yield SamplerState(done, num_steps, x, step.pred_xstart)

    return sample


def ddim_sampler(diffusion: GaussianDiffusion, config: SamplingConfig) -> Sampler:
    """DDIM; with eta 0 it draws no noise after the start."""

    def sample(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        x, num_steps = z, diffusion.num_timesteps
        for done, t in enumerate(_steps_down(diffusion, z), start=1):
            step = diffusion.p_mean_variance(model, x, t, config.clip_denoised)
            x = diffusion.ddim_step(step, t, noise() if config.eta else torch.zeros_like(x), config.eta)
            yield SamplerState(done, num_steps, x, step.pred_xstart)

    return sample


def _steps_down(diffusion: GaussianDiffusion, z: Tensor) -> Iterator[Tensor]:
    """The steps T-1, ..., 0 of the process, each as [B]."""
    for step in reversed(range(diffusion.num_timesteps)):
        yield torch.full((z.shape[0],), step, device=z.device)


def _fast_solver(diffusion_config: DiffusionConfig, config: SamplingConfig) -> Sampler:
    from diffit.diffusion.solvers import solver_sampler

    return solver_sampler(create_diffusion(**asdict(diffusion_config)), config)


def _heun(edm_config: EDMConfig, config: SamplingConfig) -> Sampler:
    from diffit.diffusion.edm import heun_sampler

    return heun_sampler(edm_config, config)


def create_sampler(process: ProcessConfig, config: SamplingConfig) -> Sampler:
    """The sampler that a config names.

    Raises:
        ValueError: if the sampler or its steps do not fit the process.
    """
    known = SAMPLERS[process_of(process)]
    if config.sampler not in known:
        raise ValueError(f"unknown sampler '{config.sampler}' of this process: choose one of {', '.join(known)}")
    if isinstance(process, EDMConfig):
        return _heun(process, config)
    if config.sampler in ("dpm++", "unipc"):
        return _fast_solver(process, config)
    if not 0 <= config.eta <= 1:
        raise ValueError(f"eta must lie between 0 and 1, not {config.eta}")
    diffusion = create_diffusion(timestep_respacing=config.num_sampling_steps, **asdict(process))
    return ddpm_sampler(diffusion, config) if config.sampler == "ddpm" else ddim_sampler(diffusion, config)
