"""Guidance against golden numbers and its closed form."""

import pytest
import torch

from diffit.diffusion import (
    ClassifierFreeGuidance,
    EDMPrecond,
    create_sampler,
    guidance_weight,
    guided_model,
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
    with pytest.raises(ValueError, match=r"skip_below must be between 0 and 1e\+06, not -1"):
        check_process(DiffusionConfig(), SamplingConfig(), GuidanceConfig(skip_below=-1.0))
    with pytest.raises(ValueError, match="edm process has no timesteps"):
        check_process(EDMConfig(), SamplingConfig("heun"), GuidanceConfig(skip_below=1e-3))


def test_auto_schedule():
    assert resolve_schedule("auto", 32) == "power_cosine"
    assert resolve_schedule("auto", 64) == "constant"
    assert resolve_schedule("constant", 32) == "constant"
    with pytest.raises(ValueError, match="linear"):
        resolve_schedule("linear", 32)


def exact_denoiser(deviation):
    """The raw prediction (of EDM's preconditioning, sigma_data 0.5) that denoises data N(0, deviation^2) exactly."""

    def predict(x_in, c_noise, y):
        sigma = (4 * c_noise).exp().view(-1, 1, 1, 1)
        total = sigma**2 + 0.5**2
        x = x_in * total.sqrt()  # c_in is undone
        denoised = deviation**2 / (deviation**2 + sigma**2) * x
        return (denoised - 0.5**2 / total * x) * total.sqrt() / (0.5 * sigma)

    return predict


def test_autoguidance_extrapolates_from_the_guides_gaussian_to_the_models():
    """Prediction and sample in closed form: dx/dsigma = (x - D)/sigma, D = x (g + s (m - g)), is separable."""
    main, guide, scale = 1.0, 1.3, 2.5
    labels, x = torch.zeros(4, dtype=torch.int64), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    config = EDMConfig()
    guidance = GuidanceConfig(scale=scale, channels="all", guide="named")
    guided = guided_model(exact_denoiser(main), labels, 0, guidance, config, 2, exact_denoiser(guide))
    for sigma in (0.1, 1.0, 10.0):
        shares = [s**2 / (s**2 + sigma**2) for s in (main, guide)]
        denoised = EDMPrecond(guided, 0.5)(x, torch.full((4,), sigma))
        torch.testing.assert_close(denoised, x * (shares[1] + scale * (shares[0] - shares[1])), rtol=1e-4, atol=1e-4)
    sampler = create_sampler(config, SamplingConfig("heun", num_sampling_steps=60))
    *_, last = sampler(guided, x, lambda: x)
    shrink = [(s**2 / (s**2 + config.sigma_max**2)) ** 0.5 for s in (main, guide)]
    factor = config.sigma_max * shrink[0] ** scale * shrink[1] ** (1 - scale)
    assert factor < main  # narrower than the data: what the guide does worse is left out
    torch.testing.assert_close(last.x.float(), x * factor, rtol=5e-3, atol=1e-4)


def test_autoguidance_asks_the_guide_only_where_it_counts():
    calls = []

    def guide(x, t, y):
        calls.append(y)
        return linear_model(x, t, y)

    x, labels, t = torch.ones(2, 4, 2, 2), torch.tensor([1, 2]), torch.full((2,), 500)
    alone = guided_model(linear_model, labels, 10, GuidanceConfig(scale=1.0), DiffusionConfig(), 32, guide)
    torch.testing.assert_close(alone(x, t), linear_model(x, t, labels), rtol=0, atol=0)
    settings = GuidanceConfig(scale=3.0, interval=(400, 600))
    guided = guided_model(linear_model, labels, 10, settings, DiffusionConfig(), 32, guide)
    torch.testing.assert_close(guided.at(700)(x, t), linear_model(x, t, labels), rtol=0, atol=0)
    assert not calls
    guided.at(500)(x, t)
    assert torch.equal(calls[0], labels)  # with the label, as the model itself
