"""Noise schedules and the respacing of timesteps, in float64 and plain NumPy."""

import math

import numpy as np
from numpy.typing import NDArray

from diffit.diffusion.config import NOISE_SCHEDULES, choose

FloatArray = NDArray[np.float64]


def linear_betas(num_timesteps: int) -> FloatArray:
    """Betas from 1e-4 to 0.02 at T = 1000, scaled by 1000/T otherwise (Ho et al. 2020): float64 [T]."""
    scale = 1000 / num_timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)


def cosine_betas(num_timesteps: int) -> FloatArray:
    """Betas of alpha_bar(u) = cos^2((u + 0.008) / 1.008 * pi/2), capped at 0.999: float64 [T].

    From Nichol & Dhariwal 2021, Eq. 17.
    """

    def alpha_bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = range(num_timesteps)
    return np.array([min(1 - alpha_bar((i + 1) / num_timesteps) / alpha_bar(i / num_timesteps), 0.999) for i in steps])


def named_betas(schedule: str, num_timesteps: int) -> FloatArray:
    """Betas of a forward process by the name of their schedule, float64 [T].

    Raises:
        ValueError: if the schedule is unknown or T is not positive.
    """
    if num_timesteps < 1:
        raise ValueError(f"diffusion_steps must be at least 1, not {num_timesteps}")
    return choose("noise schedule", NOISE_SCHEDULES, schedule)(num_timesteps)


def space_timesteps(num_timesteps: int, timestep_respacing: str | int) -> list[int]:
    """The timesteps of the original process that a respaced one keeps, ascending.

    timestep_respacing: "" keeps all; "250" takes 250 evenly strided; "10,15,20" takes as many from each of three equal
    sections; "ddim50" takes 50 with a fixed integer stride.

    Raises:
        ValueError: if the text cannot be read or asks for more steps than there are.
    """
    text = str(timestep_respacing).strip()
    if not text:
        return list(range(num_timesteps))
    try:
        if text.startswith("ddim"):
            count = int(text[len("ddim") :])
            strided = (range(0, num_timesteps, stride) for stride in range(1, num_timesteps + 1))
            return list(next(steps for steps in strided if len(steps) == count))
        counts = [int(part) for part in text.split(",")]
    except (ValueError, StopIteration):
        raise ValueError(
            f"--num_sampling_steps '{text}' does not fit {num_timesteps} timesteps: write a number such as 250, steps "
            'per section such as "10,15,20", or a fixed integer stride such as "ddim50"'
        ) from None
    base, extra = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = base + (section < extra)
        if not 1 <= count <= size:
            each = f" in each of {len(counts)} sections" if len(counts) > 1 else ""
            raise ValueError(f"--num_sampling_steps must be between 1 and {size}{each}, not {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # The running sum, rather than i * stride, is what the published tables were made with: it rounds alike.
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return kept


def respaced_betas(betas: FloatArray, kept: list[int]) -> FloatArray:
    """Betas of the process that visits only the kept timesteps, so that its alpha-bars are theirs."""
    alphas_cumprod = np.cumprod(1 - betas)[kept]
    previous = np.append(1.0, alphas_cumprod[:-1])
    return 1 - alphas_cumprod / previous
