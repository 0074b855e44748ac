"""The two terms of the variational bound, in nats (as in Nichol & Dhariwal 2021)."""

import math

import torch
from torch import Tensor


def mean_flat(x: Tensor) -> Tensor:
    """Mean over everything but the batch: [B, ...] -> [B]."""
    return x.flatten(1).mean(1)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N(mean1, variance1) || N(mean2, variance2)) per element; arguments broadcast."""
    ratio = torch.exp(log_variance1 - log_variance2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + distance - 1)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the normal CDF that ADM uses; kept, so that losses agree with published code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of 8-bit values scaled to [-1, 1] under N(mean, exp(log_scale)^2), per element.

    A value owns the interval of half a grey level (1/255) to each side; the outermost reach to infinity.
    """
    centred = x - mean
    inverse_scale = torch.exp(-log_scale)
    upper = approx_standard_normal_cdf(inverse_scale * (centred + 1 / 255))
    lower = approx_standard_normal_cdf(inverse_scale * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
