"""Fast ODE solvers (20-50 steps) through diffusers' schedulers: DPM-Solver++ and UniPC.

They see the same guided noise prediction as the other samplers; a learned variance has no part in an ODE.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffit.diffusion.gaussian import GaussianDiffusion, Model
from diffit.diffusion.samplers import NoiseSource, Sampler, SamplerState
from diffit.diffusion.settings import SamplingConfig


def solver_sampler(diffusion: GaussianDiffusion, config: SamplingConfig) -> Sampler:
    """A second-order multistep solver over the unrespaced process.

    Raises:
        ValueError: if the number of steps is not an integer between 1 and T.
    """
    num_steps = _checked_steps(config, diffusion.num_timesteps)

    def sample(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        scheduler = _scheduler(config, diffusion)
        scheduler.set_timesteps(num_steps, device=z.device)
        x = z
        for done, t in enumerate(scheduler.timesteps, start=1):
            steps = torch.full((z.shape[0],), int(t), device=z.device)
            eps = model(x, steps).float()[:, : z.shape[1]]
            pred_xstart = diffusion.predict_xstart(x, steps, eps)
            x = scheduler.step(eps, t, x).prev_sample
            yield SamplerState(done, num_steps, x, pred_xstart)

    return sample


def _checked_steps(config: SamplingConfig, num_timesteps: int) -> int:
    try:
        num_steps = int(config.num_sampling_steps)
    except ValueError:
        num_steps = 0
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"{config.sampler} takes a number of steps between 1 and {num_timesteps}, not '{config.num_sampling_steps}'"
        )
    return num_steps


def _scheduler(config: SamplingConfig, diffusion: GaussianDiffusion):  # type: ignore[no-untyped-def]
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    common = {
        "num_train_timesteps": diffusion.num_timesteps,
        "trained_betas": diffusion.betas,
        "solver_order": 2,
        "prediction_type": "epsilon",
    }
    if config.sampler == "unipc":
        return UniPCMultistepScheduler(**common)
    return DPMSolverMultistepScheduler(**common, algorithm_type="dpmsolver++", use_karras_sigmas=False)
