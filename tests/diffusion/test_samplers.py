"""Samplers on a Gaussian data set, whose best denoiser is a formula and whose ODE has a closed-form solution."""

import re
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from diffit.diffusion import ClassifierFreeGuidance, SampleNoise, create_diffusion, create_sampler
from diffit.diffusion.config import (
    SAMPLERS,
    DiffusionConfig,
    EDMConfig,
    GuidanceConfig,
    ProcessConfig,
    ProcessSettings,
    SamplingConfig,
    changed_sampling,
    check_process,
    unread_settings,
)

MEAN, STD = 0.3, 0.5
PROCESS = create_diffusion("")
PROCESSES = [process() for process in get_args(ProcessConfig)]


def best_denoiser(x, t):
    """E[noise | x_t] for data ~ N(MEAN, STD^2), with the true log variance left to its lower bound."""
    alpha_bar = torch.from_numpy(PROCESS.alphas_cumprod).to(x.dtype)[t].view(-1, 1, 1, 1)
    residual = x - alpha_bar.sqrt() * MEAN
    eps = (1 - alpha_bar).sqrt() * residual / (alpha_bar * STD**2 + 1 - alpha_bar)
    return torch.cat([eps, -torch.ones_like(x)], dim=1)


def ode_solution(z):
    """The probability flow maps quantiles to quantiles: x_T ~ N(m, s^2) goes linearly to the data."""
    alpha_bar = PROCESS.alphas_cumprod[-1]
    mean, std = np.sqrt(alpha_bar) * MEAN, np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    return MEAN + STD * (z - mean) / std


def run(z, **settings):
    sampler = create_sampler(DiffusionConfig(), SamplingConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    states = list(sampler(best_denoiser, z, lambda: torch.randn(z.shape, generator=generator, dtype=z.dtype)))
    assert [state.step for state in states] == list(range(1, states[0].num_steps + 1))
    return states


@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"),
    [
        ("ddim", 1000, 5e-3),
        ("ddim", 100, 5e-2),
        ("dpm++", 20, 5e-2),
        ("dpm++", 50, 5e-3),
        ("unipc", 20, 5e-2),
        ("unipc", 50, 5e-3),
    ],
)
def test_deterministic_samplers_solve_the_ode(sampler, steps, tolerance):
    z = torch.linspace(-2, 2, 64, dtype=torch.float64).view(1, 1, 8, 8).float()
    x = run(z, sampler=sampler, num_sampling_steps=steps)[-1].x
    assert (x - ode_solution(z)).abs().max() < tolerance


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0)])
def test_stochastic_samplers_give_the_distribution(sampler, eta):
    """At the full number of steps, within the Monte-Carlo error and the little that the discretisation adds."""
    z = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    x = run(z, sampler=sampler, eta=eta, num_sampling_steps=1000)[-1].x.double()
    count = x.numel()
    assert abs(x.mean() - MEAN) < 4 * STD / count**0.5 + 2e-3
    assert abs(x.std() - STD) < 4 * STD / (2 * count) ** 0.5 + 4e-3


def test_the_model_sees_original_timesteps():
    seen = []

    def model(x, t):
        seen.append(int(t[0]))
        return torch.zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])

    for sampler in ("ddpm", "ddim", "dpm++", "unipc"):
        seen.clear()
        chosen = create_sampler(DiffusionConfig(), SamplingConfig(sampler, 10))
        for _ in chosen(model, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2).clone):
            pass
        assert len(seen) == 10
        assert seen == sorted(seen, reverse=True)
        assert seen[0] == 999
        assert seen[-1] < 120


def knowing(process, x_start, z):
    """The model that knows the image: what a perfect network of this process predicts for a data set of one."""
    if isinstance(process, DiffusionConfig):
        alphas_cumprod = torch.from_numpy(PROCESS.alphas_cumprod)

        def model(x, t):
            alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
            eps = (x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
            return torch.cat([eps, -torch.ones_like(x)], dim=1)
    elif isinstance(process, EDMConfig):

        def model(x, c_noise):
            sigma, data = (4 * c_noise.double()).exp().view(-1, 1, 1, 1), process.sigma_data
            noisy = x * (sigma**2 + data**2).sqrt()
            return (x_start - data**2 / (sigma**2 + data**2) * noisy) * (sigma**2 + data**2).sqrt() / (sigma * data)
    else:

        def model(x, t):
            return z - x_start  # the velocity, which is the same at all times

    return model


@pytest.mark.parametrize(
    ("process", "sampler"), [(process, sampler) for process in PROCESSES for sampler in SAMPLERS[process.name]]
)
def test_every_sampler_predicts_the_image(process, sampler):
    """At every step x_start is that of the data set's only image, and so is the sample; the states before are not."""
    churn = {"s_churn": 10.0} if process.name == "edm" else {}
    sampling = SamplingConfig(sampler, 12, eta=0.5 if sampler == "ddim" else 0.0, **churn)
    generator = torch.Generator().manual_seed(0)
    x_start, z = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64).clamp(-1, 1) for _ in range(2))

    def noise():
        return torch.randn(z.shape, generator=generator, dtype=z.dtype)

    states = list(create_sampler(process, sampling)(knowing(process, x_start, z), z, noise))
    for state in states:
        assert (state.pred_xstart - x_start).abs().max() < 2e-4 * max(1, state.x.abs().max())
    assert (states[0].x - x_start).abs().max() > 0.3
    assert (states[-1].x - x_start).abs().max() < 5e-3


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "heun"])
def test_no_sampling_step_waits_for_a_gpu(sampler):
    """Not for the noise level, nor for the weight of guidance; tables are brought there in the first run.

    Without a GPU only the states are looked at.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process = EDMConfig() if sampler == "heun" else DiffusionConfig()
    chosen = create_sampler(process, SamplingConfig(sampler, 5))
    noise = SampleNoise(0, range(2), (4, 8, 8), device)
    labels, z = noise.labels(3), noise.start()

    def model(x, t, y):
        output = torch.sin(x + t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1))
        return output if sampler == "heun" else torch.cat([output, output], dim=1)

    guided = ClassifierFreeGuidance(model, labels, 3, 4.4, "power_cosine", skip_below=1e-3)
    for mode in ("default", "error") if device.type == "cuda" else ("default",):
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            states = list(chosen(guided, z, noise))  # mode "error" raises where the host would wait
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert len(states) == 5
        assert states[-1].x.isfinite().all()


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "euler"},
        {"sampler": "ddim", "eta": 1.5},
        {"sampler": "ddim", "eta": -0.5},
        {"sampler": "dpm++", "num_sampling_steps": "ddim50"},
        {"num_sampling_steps": 0},
    ],
)
def test_unusable_settings_are_refused(settings):
    with pytest.raises(ValueError):
        create_sampler(DiffusionConfig(), SamplingConfig(**settings))


# Another value of each setting of sampling beside sampler and steps.
OTHERS = {"eta": 0.5, "clip_denoised": True, "s_churn": 2.0, "s_min": 1.0, "s_max": 1.0, "s_noise": 1.5}


@pytest.mark.parametrize("setting", OTHERS)
@pytest.mark.parametrize(("process", "name"), [(p, name) for p, entries in SAMPLERS.items() for name in entries])
def test_a_sampler_reads_what_the_table_says(process, name, setting):
    """A setting that it reads changes the samples; any other changes none, and is refused by name."""
    config = ProcessSettings(process=process).process_config
    base = (
        SamplingConfig(name, 5, s_churn=3.0) if "s_churn" in SAMPLERS[process][name].reads else SamplingConfig(name, 5)
    )
    changed = replace(base, **{setting: OTHERS[setting]})

    def sample(sampling):
        generator = torch.Generator().manual_seed(0)
        outputs = 2 if config.learn_sigma else 1
        states = create_sampler(config, sampling)(
            lambda x, t: torch.cat([x.float().tanh()] * outputs, dim=1),
            torch.randn(2, 1, 4, 4, generator=generator),
            lambda: torch.randn(2, 1, 4, 4, generator=generator),
        )
        return list(states)[-1].x

    same = torch.equal(sample(base), sample(changed))
    assert same == (setting in unread_settings(process, name)) == (setting not in SAMPLERS[process][name].reads)
    if same:
        with pytest.raises(ValueError, match=f"the {re.escape(name)} sampler .* does not read --sampling.{setting}"):
            check_process(config, changed, GuidanceConfig())
        assert changed_sampling(process, changed) == base  # as where a checkpoint recommended it for another sampler
    else:
        check_process(config, changed, GuidanceConfig())
