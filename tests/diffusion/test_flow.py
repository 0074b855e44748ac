"""Flow matching on a Gaussian data set, whose velocity and whose flow are formulas."""

import numpy as np
import pytest
import torch

from diffit.diffusion import FlowMatching, create_process, create_sampler
from diffit.diffusion.config import FlowConfig, GuidanceConfig, SamplingConfig, check_process

MEAN, STD = 0.3, 0.5


def velocity(x, t):
    """E[eps - x_start | x_t] for data ~ N(MEAN, STD^2); t as the network is asked, in 0..1000."""
    t = t.to(x.dtype).view(-1, 1, 1, 1) / 1000
    variance = ((1 - t) * STD) ** 2 + t**2
    slope = (t - (1 - t) * STD**2) / variance  # of the mean of eps - x_start in x_t
    return -MEAN + slope * (x - (1 - t) * MEAN)


def flow(z):
    """The flow is linear in x and maps quantiles to quantiles: z ~ N(0, 1) at t = 1 to N(MEAN, STD^2) at t = 0."""
    return MEAN + STD * z


def samples(sampler, steps, z):
    chosen = create_sampler(FlowConfig(), SamplingConfig(sampler, steps))
    return list(chosen(velocity, z, lambda: pytest.fail("a flow draws no noise")))


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_samplers_solve_the_flow_at_their_order(sampler, order):
    z = torch.linspace(-2, 2, 64).view(1, 1, 8, 8)
    errors = {steps: (samples(sampler, steps, z)[-1].x - flow(z)).abs().max().item() for steps in (20, 40)}
    assert errors[40] < 0.04 if order == 1 else errors[40] < 1e-3
    assert errors[20] / errors[40] == pytest.approx(2**order, rel=0.15)


def test_states_count_down_from_noise():
    z = torch.linspace(-2, 2, 4).view(1, 1, 2, 2)
    states = samples("heun", 5, z)
    assert [(state.step, state.num_steps) for state in states] == [(step, 5) for step in range(1, 6)]
    # At t = 1 nothing is known of the sample: the first prediction is the mean of the data.
    torch.testing.assert_close(states[0].pred_xstart, torch.full_like(z, MEAN))


def test_the_model_is_asked_in_the_range_of_timesteps():
    for sampler, expected in (("euler", [1000, 750, 500, 250]), ("heun", [1000, 500, 500, 0])):
        asked = []

        def model(x, t, asked=asked):
            asked.append(round(t[0].item()))
            return torch.zeros_like(x)

        z = torch.zeros(1, 1, 2, 2)
        list(create_sampler(FlowConfig(), SamplingConfig(sampler, 4 if sampler == "euler" else 2))(model, z, z.clone))
        assert asked == expected


def test_the_loss_is_the_squared_error_of_the_velocity():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    t = torch.tensor([0.0, 0.25, 1.0])
    seen = {}

    def model(x_t, time):
        seen.update(x_t=x_t, time=time)
        return torch.zeros_like(x_t)

    losses = FlowMatching().training_losses(model, x, t, noise)
    torch.testing.assert_close(losses.loss, ((noise - x) ** 2).flatten(1).mean(1))
    torch.testing.assert_close(losses.loss, losses.mse)
    assert not losses.vb.any()
    torch.testing.assert_close(seen["x_t"], torch.stack([x[0], 0.75 * x[1] + 0.25 * noise[1], noise[2]]))
    assert seen["time"].tolist() == [0, 250, 1000]


def test_the_best_velocity_minimises_the_loss():
    """Against the posterior variance: Var(eps - x_start | x_t) = STD^2 / ((1-t)^2 STD^2 + t^2)."""
    generator = torch.Generator().manual_seed(1)
    x = MEAN + STD * torch.randn(4, 1, 256, 256, generator=generator)
    noise = torch.randn(4, 1, 256, 256, generator=generator)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9])
    loss = FlowMatching().training_losses(velocity, x, t, noise).loss
    expected = STD**2 / (((1 - t) * STD) ** 2 + t**2)
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("name", ["uniform", "logit_normal"])
def test_times_follow_their_distribution(name):
    t = create_process(FlowConfig(name)).draw_t(np.random.default_rng(0), 100_000)
    assert t.dtype == np.float32
    assert 0 <= t.min() < t.max() <= 1
    middle = ((t > 0.25) & (t < 0.75)).mean()
    expected = 0.5 if name == "uniform" else 2 * 0.8640 - 1  # P(|n| < ln 3) of a standard normal number
    assert middle == pytest.approx(expected, abs=0.01)


def test_refusals():
    for sampling, guidance, words in (
        (
            SamplingConfig("ddpm"),
            GuidanceConfig(),
            "the ddpm sampler does not fit the flow process: choose euler or heun",
        ),
        (
            SamplingConfig("euler", eta=1.0),
            GuidanceConfig(),
            "euler sampler .* does not read --sampling.eta",
        ),
        (
            SamplingConfig("heun", s_churn=1.0),
            GuidanceConfig(),
            "heun sampler .* not read --sampling.s_churn",
        ),
        (SamplingConfig("heun"), GuidanceConfig(schedule="power_cosine"), "no guidance schedule power_cosine"),
    ):
        with pytest.raises(ValueError, match=words):
            check_process(FlowConfig(), sampling, guidance)
    check_process(FlowConfig(), SamplingConfig("heun"), GuidanceConfig(interval=(100, 800)))
    with pytest.raises(ValueError, match="of euler must be a whole number above 0, not '0'"):
        create_sampler(FlowConfig(), SamplingConfig("euler", 0))
    with pytest.raises(ValueError, match="unknown distribution of times 'beta'"):
        FlowMatching(FlowConfig("beta"))
