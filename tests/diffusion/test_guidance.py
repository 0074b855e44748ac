"""Guidance against golden numbers and its closed form."""

import pytest
import torch

from diffit.diffusion import (
    ClassifierFreeGuidance,
    create_sampler,
    guidance_weight,
    resolve_schedule,
)
from diffit.diffusion.config import DiffusionConfig, EDMConfig, GuidanceConfig, SamplingConfig, check_process
from tests.golden_models import NAMES, golden_network, golden_tensors, relative_error


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("schedule", ["power_cosine", "constant"])
@pytest.mark.parametrize("t", [950, 321, 10])
@torch.no_grad()
def test_guided_prediction(golden_latent, name, schedule, t):
    model = golden_network(golden_latent, name)
    x, labels, out = golden_tensors(golden_latent, name, "x", "y_cfg", f"cfg_{schedule}_t{t}")
    guided = ClassifierFreeGuidance(model, labels[:2], model.num_classes, 4.4, schedule)(x[:2], torch.full((2,), t))
    assert relative_error(guided, out[:2]) < 1e-5


@pytest.mark.parametrize(("name", "schedule"), [("tiny_a", "power_cosine"), ("tiny_b", "constant")])
@torch.no_grad()
def test_guided_trajectory(golden_latent, name, schedule):
    model = golden_network(golden_latent, name)
    z, labels, sample = golden_tensors(golden_latent, name, "ddim10_z", "ddim10_y", "ddim10_cfg4.4_sample")
    guided = ClassifierFreeGuidance(model, labels, model.num_classes, 4.4, schedule)
    sampler = create_sampler(DiffusionConfig(), SamplingConfig("ddim", "10"))
    states = list(sampler(guided, z, lambda: z))
    assert [state.step for state in states] == list(range(1, 11))
    assert relative_error(states[-1].x, sample) < 1e-5


def linear_model(x, t, y):
    """Eight output channels that tell label and channel apart."""
    ramp = torch.arange(8.0).view(1, 8, 1, 1) + 1
    return ramp * (y.view(-1, 1, 1, 1) + 1.0) * torch.ones_like(x[:, :1])


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (1, 1), (None, 4), (4, 4), (9, 4)])
def test_channels(channels, guided):
    x, t = torch.zeros(2, 4, 2, 2), torch.tensor([0, 999])
    labels, null = torch.tensor([3, 5]), 9
    out = ClassifierFreeGuidance(linear_model, labels, null, 2.0, "constant", channels=channels)(x, t)
    labelled, empty = linear_model(x, t, labels), linear_model(x, t, torch.full((2,), null))
    torch.testing.assert_close(out[:, :guided], (empty + 2 * (labelled - empty))[:, :guided])
    torch.testing.assert_close(out[:, guided:], labelled[:, guided:])


def test_interval_turns_guidance_off_outside():
    x, t = torch.zeros(4, 4, 2, 2), torch.tensor([99, 100, 200, 201])
    labels = torch.tensor([0, 1, 2, 3])
    cfg = ClassifierFreeGuidance(linear_model, labels, 9, 3.0, "constant", interval=(100, 200))
    assert cfg.weight(t).tolist() == [1, 3, 3, 1]
    torch.testing.assert_close(cfg(x, t)[[0, 3]], linear_model(x, t, labels)[[0, 3]])


def test_power_cosine_ends():
    w = guidance_weight(torch.tensor([0, 999]), 4.4, "power_cosine")
    torch.testing.assert_close(w, torch.tensor([4.4, 1.0]))
    halfway = torch.tensor([1000 * (1 - 0.5**0.25)])  # where (1 - t/T)^4 = 1/2, w is in the middle
    torch.testing.assert_close(guidance_weight(halfway, 5.0, "power_cosine"), torch.tensor([3.0]))


def test_the_null_half_is_left_out_where_it_hardly_counts():
    """Where |w - 1| is below the bound a sampler's model sees B images, elsewhere 2B: 16% fewer at 4.4."""
    sizes = []

    def model(x, t, y):
        sizes.append(len(x))
        return linear_model(x, t, y)

    def sample(sampler, **settings):
        sizes.clear()
        guided = ClassifierFreeGuidance(model, torch.tensor([3, 5]), 9, 4.4, "power_cosine", **settings)
        config = SamplingConfig(sampler, 250 if sampler != "dpm++" else 50)
        noise = torch.zeros(2, 4, 2, 2)
        states = create_sampler(DiffusionConfig(), config)(guided, torch.ones(2, 4, 2, 2), noise.clone)
        return list(states)[-1].x, sum(sizes)

    for sampler, steps in (("ddpm", 250), ("ddim", 250), ("dpm++", 50)):
        exact, passes = sample(sampler)
        assert passes == 4 * steps
        assert set(sizes) == {4}
        skipped, fewer = sample(sampler, skip_below=1e-3)
        assert set(sizes) == {2, 4}
        assert sizes == sorted(sizes)  # the weight rises: what is skipped comes first
        assert 0.82 * passes < fewer < 0.86 * passes
        torch.testing.assert_close(skipped, exact, rtol=2e-2, atol=2e-2)
        assert not torch.equal(skipped, exact)


@pytest.mark.parametrize("schedule", ["power_cosine", "constant"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 20), ("dpm++", 10)])
@torch.no_grad()
def test_the_null_half_is_left_out_outside_the_interval(golden_latent, schedule, sampler, steps):
    """B rows outside, 2B inside; the sample is that of both halves, which a callable without `at` evaluates."""
    network = golden_network(golden_latent, "tiny_a")
    z, labels = golden_tensors(golden_latent, "tiny_a", "ddim10_z", "ddim10_y")
    calls = []

    def model(x, t, y):
        calls.append((len(x), t[0].item()))
        return network(x, t, y)

    def sample(both_halves, **settings):
        calls.clear()
        guided = ClassifierFreeGuidance(model, labels, network.num_classes, 4.4, schedule, **settings)
        states = create_sampler(DiffusionConfig(), SamplingConfig(sampler, steps))
        denoiser = (lambda x, t: guided(x, t)) if both_halves else guided
        return list(states(denoiser, z, lambda: z))[-1].x, list(calls)

    exact, every = sample(True, interval=(300, 600))
    cheaper, fewer = sample(False, interval=(300, 600))
    inside = [t for _, t in every if 300 <= t <= 600]
    assert 0 < len(inside) < steps
    assert fewer == [(len(z) * (2 if t in inside else 1), t) for _, t in every]
    torch.testing.assert_close(cheaper, exact, rtol=1e-6, atol=1e-6 * exact.abs().max().item())
    without, rows = sample(False)
    assert {count for count, _ in rows} == {2 * len(z)}
    assert torch.equal(without, sample(True)[0])


def test_scale_1_needs_no_null_half():
    for schedule in ("power_cosine", "constant"):
        guided = ClassifierFreeGuidance(linear_model, torch.tensor([3]), 9, 1.0, schedule)
        assert guided.at(10) == guided.labelled


def test_what_is_skipped_is_bounded():
    labels = torch.tensor([3, 5])
    cfg = ClassifierFreeGuidance(linear_model, labels, 9, 4.4, "power_cosine", skip_below=1e-3)
    skipped = [t for t in range(1000) if cfg.at(t) is not cfg]
    assert skipped == list(range(min(skipped), 1000))
    weights = cfg.weight(torch.tensor([min(skipped) - 1, min(skipped)])) - 1
    assert weights[0] >= 1e-3 > weights[1]
    x, t = torch.randn(2, 4, 2, 2), torch.full((2,), min(skipped))
    difference = (linear_model(x, t, labels) - linear_model(x, t, torch.full((2,), 9))).abs().max()
    assert (cfg.labelled(x, t) - cfg(x, t)).abs().max() <= 1e-3 * difference + 1e-5
    with pytest.raises(ValueError, match="skip_below must be at least 0, not -1"):
        check_process(DiffusionConfig(), SamplingConfig(), GuidanceConfig(skip_below=-1.0))
    with pytest.raises(ValueError, match="edm process has no timesteps"):
        check_process(EDMConfig(), SamplingConfig("heun"), GuidanceConfig(skip_below=1e-3))


def test_auto_schedule():
    assert resolve_schedule("auto", 32) == "power_cosine"
    assert resolve_schedule("auto", 64) == "constant"
    assert resolve_schedule("constant", 32) == "constant"
    with pytest.raises(ValueError, match="linear"):
        resolve_schedule("linear", 32)
