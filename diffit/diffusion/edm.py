"""The EDM process (Karras et al. 2022): preconditioning, training loss and the Heun sampler with its churn.

Letters: B batch, c channels, sigma the noise level: x = image + sigma * noise. A `denoiser` is any callable
(x [B, c, h, w], sigma [B]) -> the expected image [B, c, h, w]; a `network` any callable
(x [B, c, h, w] of unit variance, c_noise [B]) -> [B, c, h, w]: what the samplers of all processes call a model.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffit.diffusion.config import EDMConfig, SamplingConfig
from diffit.diffusion.gaussian import Model, TrainingLosses, mean_flat
from diffit.diffusion.samplers import NoiseSource, Sampler, SamplerState

Denoiser = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class EDMPrecond:
    """Makes a denoiser of a raw network F, whose input and target it keeps at unit variance (Eq. 7 and Table 1).

        D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)

    Labels are bound beforehand: `EDMPrecond(partial(network, y=labels))`.

    Args:
        network: F.
        sigma_data: standard deviation of the images.
    """

    network: Callable[[Tensor, Tensor], Tensor]
    sigma_data: float = 0.5

    def __call__(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """x: [B, c, h, w]; sigma: [B], or one for all. Returns [B, c, h, w] in the precision of x.

        The network sees float32, also when a sampler works in float64.
        """
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1, 1, 1, 1)  # [B, 1, 1, 1]
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = (sigma.log() / 4).flatten().expand(len(x))  # [B]
        output = self.network((c_in * x).float(), c_noise.float())
        return c_skip * x + c_out * output.to(x.dtype)  # [B, c, h, w]


def edm_loss(
    denoiser: Denoiser,
    images: Tensor,
    noise: Tensor | None = None,
    rnd_normal: Tensor | None = None,
    sigma_data: float = 0.5,
    p_mean: float = -1.2,
    p_std: float = 1.2,
) -> Tensor:
    """The weighted squared error of denoising, per value (Eq. 2 with the last rows of Table 1).

    images: [B, c, h, w] in [-1, 1]; noise: standard normal [B, c, h, w], and rnd_normal: standard normal [B] that
    chooses ln sigma = p_mean + p_std * rnd_normal, both drawn if not given; sigma_data: that of the denoiser.
    Returns [B, c, h, w]; the mean is what one minimises.
    """
    noise = torch.randn_like(images) if noise is None else noise
    rnd_normal = torch.randn(len(images), device=images.device) if rnd_normal is None else rnd_normal
    sigma = (p_mean + p_std * rnd_normal).exp().reshape(-1, 1, 1, 1)  # [B, 1, 1, 1]
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * (denoiser(images + sigma * noise, sigma.flatten()) - images) ** 2  # [B, c, h, w]


class EDM:
    """The process as training sees it, with the calls of GaussianDiffusion."""

    def __init__(self, config: EDMConfig | None = None) -> None:
        self.config = config or EDMConfig()

    def draw_t(self, generator: np.random.Generator, count: int) -> NDArray[np.float32]:
        """Standard normal numbers that choose ln sigma, see `edm_loss`: float32 [count]."""
        return generator.standard_normal(count, np.float32)

    def training_losses(self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor) -> TrainingLosses:
        """`edm_loss` per sample. x_start, noise: [B, c, h, w]; t: standard normal [B], for the noise level."""
        config = self.config
        denoiser = EDMPrecond(model, config.sigma_data)
        losses = edm_loss(denoiser, x_start, noise, t, config.sigma_data, config.p_mean, config.p_std)  # [B, c, h, w]
        mse = mean_flat(losses)
        return TrainingLosses(mse, mse, torch.zeros_like(mse))


def edm_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """The noise levels that sampling visits (Eq. 5), falling from sigma_max to sigma_min and then 0: float64 [steps+1].

    Raises:
        ValueError: if there is no step, the levels do not fall, or rho is not above 0.
    """
    if num_steps < 1:
        raise ValueError(f"the number of sampling steps must be at least 1, not {num_steps}")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma must fall from sigma_max to sigma_min above 0, not from {sigma_max} to {sigma_min}")
    if rho <= 0:
        raise ValueError(f"rho must be above 0, not {rho}")
    root_max, root_min = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = torch.linspace(root_max, root_min, num_steps, dtype=torch.float64) ** rho  # [steps]
    return torch.cat([levels, levels.new_zeros(1)])  # [steps + 1]


def heun_states(
    denoiser: Denoiser,
    z: Tensor,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: NoiseSource | None = None,
) -> Iterator[SamplerState]:
    """The states of `edm_sampler` as they come; arguments and errors are the same."""
    if min(S_churn, S_min, S_noise) < 0:
        raise ValueError(f"S_churn, S_min and S_noise must not be negative, as {min(S_churn, S_min, S_noise)} is")
    if S_churn and noise is None:
        raise ValueError("a sampler with S_churn above 0 adds noise at every step: give it a noise source")
    sigmas = edm_sigmas(num_steps, sigma_min, sigma_max, rho).tolist()

    def slope(x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """dx/dsigma of the probability flow (Eq. 3), and the denoised x that it points away from."""
        denoised = denoiser(x, torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)).to(x.dtype)
        return (x - denoised) / sigma, denoised

    wide = torch.float32 if z.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    x = z.to(wide) * sigmas[0]  # [B, c, h, w]
    for step in range(num_steps):
        current, following = sigmas[step], sigmas[step + 1]
        gamma = min(S_churn / num_steps, math.sqrt(2) - 1) if S_min <= current <= S_max else 0.0
        raised = current * (1 + gamma)  # the level that churn goes back to (Algorithm 2, lines 4-5)
        if S_churn:  # noise is drawn at every step, raised or not, so that its stream depends on the step alone
            x = x + math.sqrt(raised**2 - current**2) * S_noise * noise()  # type: ignore[misc]
        first, denoised = slope(x, raised)
        euler = x + (following - raised) * first
        if following > 0:  # the second order: the mean of the slopes at both ends
            second, _ = slope(euler, following)
            x = x + (following - raised) * (first + second) / 2
        else:
            x = euler
        yield SamplerState(step + 1, num_steps, x, denoised)


def edm_sampler(
    denoiser: Denoiser,
    z: Tensor,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: NoiseSource | None = None,
) -> Tensor:
    """Heun's second-order sampler in float64 (float32 on Apple's GPUs): Algorithm 1 without churn, Algorithm 2 with it.

    Args:
        denoiser: see the head of this file; EDMPrecond makes one.
        z: standard normal start [B, c, h, w], not yet scaled by sigma_max.
        num_steps: N; the denoiser is called 2N - 1 times.
        sigma_min, sigma_max, rho: see `edm_sigmas`.
        S_churn: how much noise is put back over all steps; 0 is deterministic.
        S_min, S_max: noise levels between which it is put back.
        S_noise: standard deviation of that noise.
        noise: callable () -> standard normal [B, c, h, w], called once a step when S_churn is not 0.

    Returns the samples [B, c, h, w].

    Raises:
        ValueError: if num_steps is less than 1, the noise levels do not fall, churn is negative or has no noise source.
    """
    states = heun_states(denoiser, z, num_steps, sigma_min, sigma_max, rho, S_churn, S_min, S_max, S_noise, noise)
    return deque(states, maxlen=1).pop().x


def heun_sampler(process: EDMConfig, config: SamplingConfig) -> Sampler:
    """The sampler with the call of all others: its model is the raw network F.

    Raises:
        ValueError: if the number of steps is not an integer above 0, or the noise levels do not fall.
    """
    if not isinstance(config.num_sampling_steps, int):
        raise ValueError(f"--num_sampling_steps of heun must be a whole number, not '{config.num_sampling_steps}'")
    levels = (config.num_sampling_steps, process.sigma_min, process.sigma_max, process.rho)
    edm_sigmas(*levels)  # refuses levels that do not fall before anything is loaded
    s_max = math.inf if config.s_max is None else config.s_max
    churn = (config.s_churn, config.s_min, s_max, config.s_noise)

    def states(model: Model, z: Tensor, noise: NoiseSource) -> Iterator[SamplerState]:
        return heun_states(EDMPrecond(model, process.sigma_data), z, *levels, *churn, noise)

    return states
