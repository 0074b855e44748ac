"""Guidance: eps = eps_worse + w(t) (eps_label - eps_worse).

Worse is the prediction without a label (classifier-free guidance), or that of a worse network with it (autoguidance;
Karras et al. 2024, 'Guiding a Diffusion Model with a Bad Version of Itself').

Letters: B batch, c channels, o = c or 2c output channels, T steps of the original process, s guidance scale.
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffit.diffusion.config import GUIDANCE_SCHEDULES, GuidanceConfig, ProcessConfig, choose


def constant_weight(t: Tensor, scale: float, power: float, num_timesteps: int) -> Tensor:
    """w(t) = s. t: [B]. Returns float32 [B]."""
    return torch.full(t.shape, scale, dtype=torch.float32, device=t.device)


def power_cosine_weight(t: Tensor, scale: float, power: float, num_timesteps: int) -> Tensor:
    """w(t) = 1 + (s - 1) (1 - cos(pi (1 - t/T)^power)) / 2, which rises from 1 at t = T to s at t = 0.

    t: [B] original timesteps in 0..T-1. Returns float32 [B].
    """
    remaining = 1 - t.float() / num_timesteps
    return 1 + (scale - 1) * 0.5 * (1 - torch.cos(math.pi * remaining**power))


def guidance_weight(t: Tensor, scale: float, schedule: str, power: float = 4.0, num_timesteps: int = 1000) -> Tensor:
    """w(t) of a schedule by name, float32 [B], for original timesteps t [B] in 0..T-1.

    Raises:
        ValueError: if the schedule is unknown.
    """
    return choose("guidance schedule", GUIDANCE_SCHEDULES, schedule)(t, scale, power, num_timesteps)


def resolve_schedule(schedule: str, input_size: int) -> str:
    """What `auto` means for a latent of this side: power-cosine up to 32, constant above. The choice is logged.

    The published commands name no schedule: 256 pixels (side 32) used one, 512 (64) the other.

    Raises:
        ValueError: if the schedule is unknown.
    """
    if schedule == "auto":
        schedule = "power_cosine" if input_size <= 32 else "constant"
        logging.getLogger(__name__).info("guidance schedule: %s (auto, latent side %d)", schedule, input_size)
    choose("guidance schedule", GUIDANCE_SCHEDULES, schedule)
    return schedule


class ClassifierFreeGuidance:
    """Makes a denoiser (x, t) -> prediction out of a class-conditional model, guided towards the labels.

    With a guide it is autoguidance, of a model with classes or without.

    Args:
        model: callable (x [2B, c, h, w], t [2B], y [2B]) -> [2B, o, h, w].
        labels: int64 [B].
        null_label: the label that means 'no class'.
        scale: guidance scale s.
        schedule: see `guidance_weight`.
        power: exponent of power_cosine.
        channels: how many of the c noise channels are guided, None for all. With 3 of 4, the fourth noise channel and
            all variance channels come from the labelled half as they are: inherited from DiT, and what the published
            numbers were made with.
        interval: (first, last) original timesteps between which guidance acts, inclusive; elsewhere w = 1.
        num_timesteps: T of the original process.
        skip_below: where |w - 1| is less, `at` gives a denoiser that does not evaluate the null half; where w is 1
            it never does.
        guide: another model (x [B, c, h, w], t [B], y [B]) -> [B, o, h, w], whose prediction takes the place of the
            null half's.

    Raises:
        ValueError: if the schedule is unknown, or channels is less than 1.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        labels: Tensor,
        null_label: int,
        scale: float,
        schedule: str = "power_cosine",
        power: float = 4.0,
        channels: int | None = 3,
        interval: tuple[int, int] | None = None,
        num_timesteps: int = 1000,
        skip_below: float = 0.0,
        guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self._weight = choose("guidance schedule", GUIDANCE_SCHEDULES, schedule)
        if channels is not None and channels < 1:
            raise ValueError(f"guidance channels must be at least 1 or all, not {channels}")
        self.model, self.guide = model, guide
        self.labels = torch.cat([labels, torch.full_like(labels, null_label)])  # [2B]
        self.scale, self.power = scale, power
        self.channels = channels
        self.interval = interval
        self.num_timesteps = num_timesteps
        self.skip_below = skip_below

    def weight(self, t: Tensor) -> Tensor:
        """w(t), float32 [B]."""
        w = self._weight(t, self.scale, self.power, self.num_timesteps)
        if self.interval is not None:
            first, last = self.interval
            w = torch.where((t >= first) & (t <= last), w, 1.0)
        return w

    def at(self, timestep: float) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser for a batch at one original timestep: without the null half where it does not, or hardly, count.

        It does not where w is 1 by definition: outside the interval, and at scale 1. (power_cosine comes so close to 1
        that float32 rounds it, near T: there the null half stays, and with it every bit of the published samples.)
        A sampler knows its timesteps on the host; to ask the tensor t would wait for the device.
        """
        if self.scale == 1 or (self.interval is not None and not self.interval[0] <= timestep <= self.interval[1]):
            return self.labelled
        weight = self.weight(torch.tensor([timestep])).item()
        return self.labelled if abs(weight - 1) < self.skip_below else self

    def labelled(self, x: Tensor, t: Tensor) -> Tensor:
        """The labelled half alone: what `__call__` gives where w = 1, but for rounding. Shapes as there."""
        return self.model(x, t, self.labels[: len(x)]).float()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x: [B, c, h, w]; t: [B] original timesteps. Returns the labelled half, guided, in float32: [B, o, h, w]."""
        if self.guide is None:
            output = self.model(torch.cat([x, x]), torch.cat([t, t]), self.labels).float()  # [2B, o, h, w]
            labelled, worse = output.chunk(2)
        else:
            labelled = self.labelled(x, t).clone()  # a compiled network's output is overwritten by the next one's
            worse = self.guide(x, t, self.labels[: len(x)]).float()
        guided = x.shape[1] if self.channels is None else min(self.channels, x.shape[1])
        w = self.weight(t).view(-1, 1, 1, 1)
        eps = worse[:, :guided] + w * (labelled[:, :guided] - worse[:, :guided])
        return torch.cat([eps, labelled[:, guided:]], dim=1)  # [B, o, h, w]


def guided_model(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    guidance: GuidanceConfig,
    process: ProcessConfig,
    input_size: int,
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, t) -> prediction for these labels, guided if the settings say so and there are classes to guide to.

    The raw prediction is what is guided. In EDM and flows the denoised image is an affine function of it, so that
    guiding either is the same.

    Args:
        model: see `ClassifierFreeGuidance`, as for labels and null_label; a null_label of 0 means that there are no
            classes.
        process: of the model.
        input_size: side of what the network sees, which chooses the schedule `auto`.
        guide: of autoguidance, which needs no classes.
    """
    if not ((null_label or guide) and guidance.enabled and guidance.scale != 1):
        return lambda x, t: model(x, t, labels)
    only_one = len(process.guidance_schedules) == 1
    return ClassifierFreeGuidance(
        model,
        labels,
        null_label,
        guidance.scale,
        process.guidance_schedules[0] if only_one else resolve_schedule(guidance.schedule, input_size),
        guidance.power,
        None if guidance.channels == "all" else guidance.channels,
        guidance.interval,
        process.num_timesteps or 1000,
        guidance.skip_below,
        guide,
    )
