"""The Gaussian diffusion process: forward noising, one reverse step, and the training loss (as in ADM).

Letters: B batch, c channels, T steps of the (possibly respaced) process. A `model` is any callable
(x [B, c, h, w], t [B] original timesteps) -> [B, c or 2c, h, w]; here t counts the steps of this process, 0..T-1.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffit.diffusion.config import DiffusionConfig
from diffit.diffusion.schedule import FloatArray, named_betas, respaced_betas, space_timesteps

Model = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ReverseStep:
    """p(x_{t-1} | x_t): mean, variance and log variance, and the x_start and noise they come from; all [B, c, h, w]."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor
    eps: Tensor


@dataclass(frozen=True)
class TrainingLosses:
    """Per-sample losses [B]: `loss`, which is minimised, and its parts.

    `mse` is the (in EDM weighted) squared error; `vb`, in bits/dim, is zero where no variance is learned.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor


def mean_flat(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) per element; arguments broadcast."""
    ratio = torch.exp(log_variance1 - log_variance2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + distance - 1)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of 8-bit values scaled to [-1, 1] under N(mean, exp(log_scale)^2), per element.

    A value owns the interval of half a grey level (1/255) to each side; the outermost reach to infinity.
    """

    def cdf(z: Tensor) -> Tensor:
        """Of the normal distribution, in the tanh approximation that ADM uses: losses agree with published code."""
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred = x - mean
    inverse_scale = torch.exp(-log_scale)
    upper, lower = cdf(inverse_scale * (centred + 1 / 255)), cdf(inverse_scale * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


class GaussianDiffusion:
    """A discrete-time Gaussian process with the tables that describe it, all float64 arrays [T].

    Args:
        betas: of this process, float64 [T].
        timestep_map: the original timestep that the network sees at each step, int64 [T]; 0..T-1 by default.
        learn_sigma: the model's second half of channels interpolates the log variance (Nichol & Dhariwal 2021);
            otherwise the variance is fixed at beta_t.
    """

    def __init__(self, betas: FloatArray, timestep_map: list[int] | None = None, learn_sigma: bool = True) -> None:
        self.betas = np.asarray(betas, dtype=np.float64)
        self.num_timesteps = len(self.betas)
        self.timestep_map = np.arange(self.num_timesteps) if timestep_map is None else np.array(timestep_map)
        self.learn_sigma = learn_sigma
        self.alphas_cumprod = np.cumprod(1 - self.betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        # q(x_{t-1} | x_t, x_0), Eq. 6-7 of Ho et al. 2020.
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # The variance at t = 0 is zero; its logarithm borrows the next one.
        second = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
        self._tables: dict[tuple[str, torch.device], Tensor] = {}
        self._log_betas = np.log(self.betas)
        # 'Fixed large' variance of ADM: beta_t, whose first value also borrows the second posterior variance.
        self._log_fixed_variance = np.log(np.append(second, self.betas[1:]))
        self._sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self._sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self._sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self._sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)

    def _at(self, name: str, t: Tensor) -> Tensor:
        """Entries t of a table, [B, 1, 1, 1] float32, from a copy that stays on the device of t."""
        key = (name, t.device)
        if key not in self._tables:
            table = torch.from_numpy(getattr(self, name))
            self._tables[key] = (table if name == "timestep_map" else table.float()).to(t.device)
        return self._tables[key][t].view(-1, 1, 1, 1)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0) for the given standard normal noise. x_start, noise: [B, c, h, w]; t: [B]."""
        return self._at("_sqrt_alphas_cumprod", t) * x_start + self._at("_sqrt_one_minus_alphas_cumprod", t) * noise

    def p_mean_variance(self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = False) -> ReverseStep:
        """The model's p(x_{t-1} | x_t). x: [B, c, h, w]; t: [B]; clip_denoised clamps the predicted x_start to [-1, 1].

        Raises:
            ValueError: if the model's number of channels does not fit learn_sigma.
        """
        output = model(x, self._at("timestep_map", t).flatten())
        return self._reverse_step(output.float(), x, t, clip_denoised)

    def _reverse_step(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool) -> ReverseStep:
        eps, log_variance = self._split(output, x, t)
        pred_xstart = self.predict_xstart(x, t, eps)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
            eps = (self._at("_sqrt_recip_alphas_cumprod", t) * x - pred_xstart) / self._at(
                "_sqrt_recipm1_alphas_cumprod", t
            )
        mean = self._at("posterior_mean_coef1", t) * pred_xstart + self._at("posterior_mean_coef2", t) * x
        return ReverseStep(mean, log_variance.exp(), log_variance, pred_xstart, eps)

    def _split(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The model's output as noise and log variance, both [B, c, h, w]."""
        channels = x.shape[1]
        if output.shape[1] != (2 * channels if self.learn_sigma else channels):
            raise ValueError(
                f"the model gave {output.shape[1]} channels for {channels}: learn_sigma={self.learn_sigma} "
                f"needs {2 * channels if self.learn_sigma else channels}"
            )
        if not self.learn_sigma:
            return output, self._at("_log_fixed_variance", t).expand_as(x)
        eps, v = output.chunk(2, dim=1)
        fraction = (v + 1) / 2  # v in [-1, 1] spans the two bounds of the log variance
        high, low = self._at("_log_betas", t), self._at("posterior_log_variance_clipped", t)
        return eps, fraction * high + (1 - fraction) * low

    def predict_xstart(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_start that x_t and its noise imply. x, eps: [B, c, h, w]; t: [B]."""
        return self._at("_sqrt_recip_alphas_cumprod", t) * x - self._at("_sqrt_recipm1_alphas_cumprod", t) * eps

    def p_sample(self, model: Model, x: Tensor, t: Tensor, noise: Tensor, clip_denoised: bool = False) -> Tensor:
        """One ancestral step x_t -> x_{t-1} with the given noise (none is added at t = 0). Shapes as above."""
        return self.ancestral_step(self.p_mean_variance(model, x, t, clip_denoised), t, noise)

    def ancestral_step(self, step: ReverseStep, t: Tensor, noise: Tensor) -> Tensor:
        """Draw x_{t-1} from a reverse step with the given noise."""
        nonzero = (t > 0).view(-1, 1, 1, 1)
        return step.mean + nonzero * (0.5 * step.log_variance).exp() * noise

    def ddim_sample(
        self, model: Model, x: Tensor, t: Tensor, noise: Tensor, eta: float = 0.0, clip_denoised: bool = False
    ) -> Tensor:
        """One DDIM step x_t -> x_{t-1} (Song et al. 2021, Eq. 12); eta 0 ignores the noise. Shapes as p_sample."""
        return self.ddim_step(self.p_mean_variance(model, x, t, clip_denoised), t, noise, eta)

    def ddim_step(self, step: ReverseStep, t: Tensor, noise: Tensor, eta: float) -> Tensor:
        """x_{t-1} from a reverse step's x_start and noise, Eq. 12 and 16 of Song et al. 2021."""
        alpha_bar, previous = self._at("alphas_cumprod", t), self._at("alphas_cumprod_prev", t)
        sigma = eta * torch.sqrt((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous))
        mean = step.pred_xstart * previous.sqrt() + (1 - previous - sigma**2).sqrt() * step.eps
        nonzero = (t > 0).view(-1, 1, 1, 1)
        return mean + nonzero * sigma * noise

    def draw_t(self, generator: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Timesteps for training, uniform over 0..T-1: int64 [count]."""
        return generator.integers(self.num_timesteps, size=count)

    def training_losses(self, model: Model, x_start: Tensor, t: Tensor, noise: Tensor) -> TrainingLosses:
        """MSE on the noise plus, with a learned variance, the variational bound with its mean detached.

        x_start, noise: [B, c, h, w]; t: [B]. The bound trains the variance only (Nichol & Dhariwal 2021, section 3.1)
        and enters with factor 1.
        """
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self._at("timestep_map", t).flatten()).float()
        mse = mean_flat((noise - output[:, : x_start.shape[1]]) ** 2)
        if not self.learn_sigma:
            self._split(output, x_t, t)  # refuses a model whose channels do not fit
            return TrainingLosses(mse, mse, torch.zeros_like(mse))
        eps, v = output.chunk(2, dim=1)
        vb = self._variational_bound(torch.cat([eps.detach(), v], dim=1), x_start, x_t, t)
        return TrainingLosses(mse + vb, mse, vb)

    def _variational_bound(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """L_t in bits/dim: a KL between two Gaussians, or at t = 0 the discretised likelihood of 8-bit values."""
        step = self._reverse_step(output, x_t, t, clip_denoised=False)
        mean = self._at("posterior_mean_coef1", t) * x_start + self._at("posterior_mean_coef2", t) * x_t
        kl = normal_kl(mean, self._at("posterior_log_variance_clipped", t), step.mean, step.log_variance)
        nll = -discretized_gaussian_log_likelihood(x_start, step.mean, 0.5 * step.log_variance)
        bits = torch.where(t == 0, mean_flat(nll), mean_flat(kl))
        return bits / float(np.log(2.0))


def create_diffusion(
    timestep_respacing: str | int = "",
    noise_schedule: str = "linear",
    learn_sigma: bool = True,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """The process of `diffusion_steps` steps, or the part of it that `timestep_respacing` keeps.

    Raises:
        ValueError: see `space_timesteps` and `named_betas`.
    """
    betas = named_betas(noise_schedule, diffusion_steps)
    kept = space_timesteps(diffusion_steps, timestep_respacing)
    return GaussianDiffusion(respaced_betas(betas, kept), kept, learn_sigma)


def create_process(config: DiffusionConfig) -> GaussianDiffusion:
    """The whole process of a config, as training sees it."""
    return create_diffusion(**asdict(config))
