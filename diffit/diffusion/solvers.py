"""Fast ODE solvers (20-50 steps) through diffusers' schedulers: DPM-Solver++ and UniPC.

They see the same guided noise prediction as the other samplers; a learned variance has no part in an ODE.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffit.diffusion.config import SamplingConfig
from diffit.diffusion.gaussian import GaussianDiffusion, Model
from diffit.diffusion.states import NoiseSource, Sampler, SamplerState, at_timestep


def solver_sampler(diffusion: GaussianDiffusion, config: SamplingConfig) -> Sampler:
    """A second-order multistep solver over the unrespaced process.

    Raises:
        ValueError: if the number of steps is not an integer between 1 and T.
    """
    num_steps = _checked_steps(config, diffusion.num_timesteps)

    def scheduler():  # type: ignore[no-untyped-def]
        """A new one, which has seen no sample; its timesteps stay on the host, where the loop needs them."""
        fresh = _scheduler(config, diffusion)
        fresh.set_timesteps(num_steps)
        return fresh

    times = scheduler().timesteps.tolist()

    def states(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        solver, x = scheduler(), z
        for done, timestep in enumerate(times, start=1):
            t = torch.full((z.shape[0],), timestep, device=z.device)
            eps = at_timestep(model, timestep)(x, t).float()[:, : z.shape[1]]
            pred_xstart = diffusion.predict_xstart(x, t, eps)
            x = solver.step(eps, timestep, x).prev_sample
            yield SamplerState(done, num_steps, x, pred_xstart)

    return Sampler(states, tuple(times))


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
