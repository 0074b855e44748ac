"""The Gaussian process against golden numbers and closed forms."""

import numpy as np
import pytest
import torch

from diffit.diffusion import create_diffusion, space_timesteps
from diffit.diffusion.gaussian import discretized_gaussian_log_likelihood
from diffit.diffusion.schedule import named_betas
from tests.golden_models import relative_error

SCHEDULES = ("linear", "squaredcos_cap_v2")
RESPACINGS = ("full", "250", "50", "ddim50", "10,15,20")
TABLES = (
    "betas",
    "alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("respacing", RESPACINGS)
def test_tables(golden_diffusion, schedule, respacing):
    diffusion = create_diffusion("" if respacing == "full" else respacing, noise_schedule=schedule)
    prefix = f"{schedule}/{respacing}/"
    assert diffusion.timestep_map.tolist() == golden_diffusion[prefix + "timestep_map"].tolist()
    for table in TABLES:
        np.testing.assert_allclose(getattr(diffusion, table), golden_diffusion[prefix + table], rtol=1e-12, atol=0)


def step_inputs(golden):
    return [torch.from_numpy(golden[f"step/{key}"]) for key in ("x0", "noise", "model_output", "t", "sampler_noise")]


class Recorder:
    """A model with a fixed output that remembers the timesteps it saw."""

    def __init__(self, output):
        self.output, self.seen = output, None

    def __call__(self, x, t):
        self.seen = t
        return self.output


def test_reverse_steps(golden_diffusion):
    x0, noise, output, t, sampler_noise = step_inputs(golden_diffusion)
    golden = {key[5:]: torch.from_numpy(value) for key, value in golden_diffusion.items() if key.startswith("step/")}
    diffusion, model = create_diffusion("250"), Recorder(output)
    x_t = diffusion.q_sample(x0, t, noise)
    assert relative_error(x_t, golden["q_sample"]) < 1e-6
    for clip in (False, True):
        step = diffusion.p_mean_variance(model, x_t, t, clip_denoised=clip)
        for field in ("mean", "variance", "log_variance", "pred_xstart"):
            assert relative_error(getattr(step, field), golden[f"p_mean_variance_clip{int(clip)}/{field}"]) < 1e-5
    assert model.seen.tolist() == golden["model_timesteps"].tolist()
    assert relative_error(diffusion.p_sample(model, x_t, t, sampler_noise), golden["p_sample"]) < 1e-5
    for eta in (0, 1):
        sample = diffusion.ddim_sample(model, x_t, t, sampler_noise, eta=eta)
        assert relative_error(sample, golden[f"ddim_eta{eta}"]) < 1e-5


def test_training_losses(golden_diffusion):
    x0, noise, output, *_ = step_inputs(golden_diffusion)
    t = torch.from_numpy(golden_diffusion["loss/t"])
    losses = create_diffusion("").training_losses(lambda x, t: output, x0, t, noise)
    for field in ("loss", "mse", "vb"):
        np.testing.assert_allclose(getattr(losses, field), golden_diffusion[f"loss/{field}"], rtol=2e-5, atol=1e-7)
    fixed = create_diffusion("", learn_sigma=False).training_losses(lambda x, t: output[:, :4], x0, t, noise)
    np.testing.assert_allclose(fixed.loss, golden_diffusion["loss/fixed_sigma"], rtol=1e-5)


def test_bound_does_not_train_the_mean():
    output = torch.randn(3, 8, 4, 4, requires_grad=True)
    losses = create_diffusion("").training_losses(
        lambda x, t: output, torch.randn(3, 4, 4, 4), torch.tensor([0, 5, 999]), torch.randn(3, 4, 4, 4)
    )
    (gradient,) = torch.autograd.grad(losses.vb.sum(), output)
    assert gradient[:, :4].abs().max() == 0
    assert gradient[:, 4:].abs().min() >= 0
    assert gradient[:, 4:].abs().max() > 0


def test_vb_is_zero_only_for_the_true_posterior():
    """With the right noise and the lower variance, p is the posterior q(x_{t-1} | x_t, x_0): its KL is 0."""
    diffusion = create_diffusion("")
    x0, noise = torch.rand(4, 4, 8, 8) * 2 - 1, torch.randn(4, 4, 8, 8)
    t = torch.tensor([1, 100, 500, 999])
    exact = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    assert diffusion.training_losses(lambda x, t: exact, x0, t, noise).vb.abs().max() < 1e-4
    wrong = torch.cat([noise + 1, -torch.ones_like(noise)], dim=1)
    assert diffusion.training_losses(lambda x, t: wrong, x0, t, noise).vb.min() > 1e-4


def test_the_grey_levels_share_out_the_whole_probability():
    """The 256 intervals cover the line: their probabilities sum to 1, however wide or far off the Gaussian is."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean in (-3.0, -0.999, 0.1, 1.0):
        for log_scale in (-1.0, 0.0, 1.0):
            log_p = discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(log_scale))
            assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mean", [-1.02, 0.0, 0.999])
@pytest.mark.parametrize("log_scale", [-4.0, 0.5])
def test_likelihood_in_closed_form(mean, log_scale):
    """The outermost intervals begin 1/255 before what is beyond 0.999, and reach to infinity: latents lie anywhere."""
    x = np.array([-9, -1, -0.9991, -0.9989, -0.99, 0, 0.5, 0.99, 0.9989, 0.9991, 0.99989, 0.99991, 1, 1.5, 9])

    def cdf(value):
        z = (value - mean) / np.exp(log_scale)
        return 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (z + 0.044715 * z**3)))

    low, high = np.where(x < -0.999, 0, cdf(x - 1 / 255)), np.where(x > 0.999, 1, cdf(x + 1 / 255))
    arguments = (torch.tensor(value, dtype=torch.float64) for value in (x, mean, log_scale))
    found = discretized_gaussian_log_likelihood(*arguments).numpy()
    np.testing.assert_allclose(found, np.log(np.maximum(high - low, 1e-12)), rtol=1e-6, atol=1e-9)


def test_forward_process_composes():
    """Taking q step by step has the alpha-bar of taking it at once, for every respacing."""
    full = create_diffusion("")
    for respacing in ("250", "7", "10,15,20", "ddim50"):
        kept = create_diffusion(respacing)
        np.testing.assert_allclose(kept.alphas_cumprod, full.alphas_cumprod[kept.timestep_map], rtol=1e-12)


@pytest.mark.parametrize("count", [21, 100, 4000])
def test_betas_of_other_numbers_of_steps(count):
    """Linear ones are scaled by 1000/T; those of the cosine have its alpha-bars, but for the cap at the end."""
    betas = named_betas("linear", count)
    np.testing.assert_allclose(betas, 0.1 / count + np.arange(count) * 19.9 / count / (count - 1), rtol=1e-12)
    alpha_bars = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = named_betas("squaredcos_cap_v2", count)
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], (alpha_bars / alpha_bars[0])[1:-1], rtol=1e-9)
    assert betas[-1] == 0.999


@pytest.mark.parametrize(
    ("respacing", "kept"),
    [("1", [0]), ("2", [0, 9]), ("10", range(10)), ("1,1,1", [0, 4, 7]), ("4,3,2", [0, 1, 2, 3, 4, 5, 6, 7, 9])],
)
def test_respacings_of_ten_steps(respacing, kept):
    """Three sections of ten steps have 4, 3 and 3; each keeps its first step, and its last one if it keeps two."""
    assert space_timesteps(10, respacing) == list(kept)


@pytest.mark.parametrize("respacing", ["0", "1001", "ddim501", "ddim", "fifty", "10,,20", "-3"])
def test_unreadable_respacing_is_refused(respacing):
    with pytest.raises(ValueError):
        space_timesteps(1000, respacing)


def test_wrong_channels_are_refused():
    x, t = torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="learn_sigma"):
        create_diffusion("10").p_sample(lambda x, t: x, x, t, x)
