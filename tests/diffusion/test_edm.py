"""EDM against golden numbers, closed forms, and a Gaussian data set whose best denoiser is a formula."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffit import ImageDiffiT
from diffit.diffusion import EDMPrecond, edm_loss, edm_sampler
from diffit.diffusion.edm import edm_sigmas, heun_states
from tests.conftest import GOLDEN
from tests.golden_models import relative_error


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "edm.npz") as stored:
        return {key.removeprefix("edm/"): torch.from_numpy(stored[key]) for key in stored}


def golden_network(x, c_noise):
    """The raw network of golden/edm.npz."""
    return torch.tanh(x) * (1 + 0.1 * c_noise.view(-1, 1, 1, 1))


DENOISER = EDMPrecond(golden_network)


def test_golden_denoiser(golden):
    x = golden["x"] * golden["sigma"].view(-1, 1, 1, 1)  # stored at unit variance
    assert relative_error(DENOISER(x, golden["sigma"]), golden["denoised"]) < 1e-5


@pytest.mark.parametrize("num_steps", [18, 40])
def test_golden_heun(golden, num_steps):
    sample = edm_sampler(DENOISER, golden["z"], num_steps)
    assert sample.dtype == torch.float64
    assert relative_error(sample, golden[f"heun{num_steps}"]) < 1e-5


def test_golden_churn(golden):
    noise = iter(golden["churn_noise"]).__next__
    sample = edm_sampler(DENOISER, golden["z"], 18, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003, noise=noise)
    assert relative_error(sample, golden["heun18_churn"]) < 1e-5


def test_golden_loss(golden):
    loss = edm_loss(DENOISER, golden["loss_images"], golden["loss_noise"], golden["loss_rnd_normal"])
    assert relative_error(loss, golden["loss"]) < 1e-5


def test_preconditioning_of_another_sigma_data():
    """The formulas in NumPy, at sigma_data other than the golden 0.5, one noise level for all or each its own."""
    generator = np.random.default_rng(0)
    x, sigma = generator.normal(size=(3, 2, 4, 4)), np.exp(generator.normal(size=3))
    s, sd = sigma[:, None, None, None], 0.8
    seen = x / np.sqrt(s**2 + sd**2)
    raw = np.tanh(seen) * (1 + 0.1 * np.log(s) / 4)
    expected = sd**2 / (s**2 + sd**2) * x + s * sd / np.sqrt(s**2 + sd**2) * raw
    denoiser = EDMPrecond(golden_network, sigma_data=sd)
    out = denoiser(torch.from_numpy(x), torch.from_numpy(sigma))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    for one in (0.3, torch.tensor(0.3), torch.full((3,), 0.3), torch.full((3, 1, 1, 1), 0.3)):
        again = denoiser(torch.from_numpy(x), one)
        torch.testing.assert_close(again, denoiser(torch.from_numpy(x), torch.full((3,), 0.3)))


def test_preconditioning_keeps_unit_variance():
    """What the network reads, and what it should answer, have variance 1 at every noise level; so does the weight."""
    torch.manual_seed(0)
    images, noise = 0.5 * torch.randn(3, 1, 300, 300), torch.randn(3, 1, 300, 300)
    sigma = torch.tensor([0.02, 0.5, 20.0]).view(-1, 1, 1, 1)
    read = []
    skipped = EDMPrecond(lambda x, c_noise: read.append(x) or torch.zeros_like(x))(images + sigma * noise, sigma)
    gain = EDMPrecond(lambda x, c_noise: torch.ones_like(x))(torch.zeros_like(images), sigma)
    torch.testing.assert_close(read[0].var((1, 2, 3)), torch.ones(3), rtol=0.02, atol=0)
    torch.testing.assert_close(((images - skipped) / gain).var((1, 2, 3)), torch.ones(3), rtol=0.02, atol=0)
    rnd_normal = (sigma.flatten().log() + 1.2) / 1.2
    off_by_the_gain = edm_loss(lambda x, s: images + gain, images, noise, rnd_normal)
    torch.testing.assert_close(off_by_the_gain, torch.ones_like(images), rtol=1e-4, atol=0)


def test_loss_reaches_every_noise_level():
    """ln sigma is normal(-1.2, 1.2^2) unless given, and the right answer costs nothing."""
    torch.manual_seed(0)
    images, seen = torch.randn(20_000, 1, 1, 1), []

    def perfect(x, sigma):
        seen.append(sigma)
        return images

    assert edm_loss(perfect, images).abs().max() == 0
    assert float(seen[0].log().mean()) == pytest.approx(-1.2, abs=0.04)
    assert float(seen[0].log().std()) == pytest.approx(1.2, abs=0.03)


def test_noise_levels():
    """Eq. 5 in plain Python, and its ends."""
    sigmas = edm_sigmas(5, sigma_min=0.01, sigma_max=10.0, rho=3.0)
    expected = [(10 ** (1 / 3) + i / 4 * (0.01 ** (1 / 3) - 10 ** (1 / 3))) ** 3 for i in range(5)]
    np.testing.assert_allclose(sigmas, [*expected, 0.0], rtol=1e-12)
    np.testing.assert_allclose(edm_sigmas(1), [80.0, 0.0], rtol=1e-12)


MEAN = torch.tensor([0.3, -0.1, 0.0, 0.5], dtype=torch.float64)
FACTOR = torch.tensor(
    [[0.5, 0.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0], [-0.2, 0.1, 0.3, 0.0], [0.0, 0.2, 0.0, 0.1]], dtype=torch.float64
)
COVARIANCE = FACTOR @ FACTOR.T


def gaussian_denoiser(x, sigma):
    """E[image | x] = mean + C (C + sigma^2)^-1 (x - mean) for images ~ N(mean, C) of 1x2x2 pixels."""
    noisy = COVARIANCE + (sigma**2).view(-1, 1, 1) * torch.eye(4, dtype=torch.float64)
    centred = (x.flatten(1) - MEAN)[:, :, None]
    return (MEAN + (COVARIANCE @ torch.linalg.solve(noisy[:1], centred))[:, :, 0]).view_as(x)


def heun_variance(variance: float, num_steps: int) -> float:
    """Of what Heun's steps make of N(0, variance): they are linear, so one number goes through them by hand."""
    sigmas = edm_sigmas(num_steps).tolist()
    gain = sigmas[0]
    for now, then in pairwise(sigmas):
        slope = gain * now / (variance + now**2)
        euler = gain + (then - now) * slope
        gain = gain + (then - now) * (slope + euler * then / (variance + then**2)) / 2 if then else euler
    return gain**2


def assert_distribution(samples, covariance, tolerance=0.0):
    """Mean and covariance of samples [n, 4], within 4 standard errors (plus a share of the largest variance)."""
    variances = covariance.diag()
    mean_error = (variances / len(samples)).sqrt()
    covariance_error = ((covariance**2 + torch.outer(variances, variances)) / len(samples)).sqrt()
    assert ((samples.mean(0) - MEAN).abs() < 4 * mean_error).all()
    assert ((samples.T.cov() - covariance).abs() < 4 * covariance_error + tolerance * variances.max()).all()


def gaussian_samples(num_steps, **churn):
    draw = partial(torch.randn, 40_000, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return edm_sampler(gaussian_denoiser, draw(), num_steps, **churn, noise=draw).flatten(1)


def test_gaussian_data():
    """18 Heun steps give the data's mean and, within Monte-Carlo error, the covariance that such steps can give.

    Their variance is 10 to 20% too large, depending on the principal axis: the error of 18 steps, whatever the code.
    """
    values, axes = torch.linalg.eigh(COVARIANCE)
    reached = torch.tensor([heun_variance(float(value), 18) for value in values], dtype=torch.float64)
    assert_distribution(gaussian_samples(18), axes @ reached.diag() @ axes.T)
    assert_distribution(gaussian_samples(18), COVARIANCE, tolerance=0.15)


@pytest.mark.parametrize("churn", [{}, {"S_churn": 20.0, "S_min": 0.05, "S_max": 50.0}])
def test_gaussian_data_in_small_steps(churn):
    """With 150 steps nothing but Monte-Carlo error is left, deterministic or not."""
    assert_distribution(gaussian_samples(150, **churn), COVARIANCE)


def exact_flow(z):
    """The probability flow of the Gaussian solved in closed form: each principal axis shrinks by a known factor."""
    values, axes = torch.linalg.eigh(COVARIANCE)
    shrunk = (values / (values + 80.0**2)).sqrt()
    return MEAN + ((80.0 * z.flatten(1) - MEAN) @ axes * shrunk) @ axes.T


def test_heun_is_of_second_order():
    z = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = [float((edm_sampler(gaussian_denoiser, z, n).flatten(1) - exact_flow(z)).abs().max()) for n in (64, 128)]
    assert errors[0] < 0.01
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_churn_written_out():
    """Algorithm 2 in scalar arithmetic: levels, where noise is put back, how much, and both slopes."""
    denoise = lambda x, sigma: x / (1 + sigma**2)  # noqa: E731 - images ~ N(0, 1)
    draws, z = [0.7, -1.1, 0.4, 2.0], 0.3
    sigmas = edm_sigmas(4, 0.1, 10.0, 5.0).tolist()
    x = z * sigmas[0]
    for i, (now, then) in enumerate(pairwise(sigmas)):
        gamma = min(1.0 / 4, math.sqrt(2) - 1) if 0.5 <= now <= 5.0 else 0.0
        hat = now + gamma * now
        x_hat = x + math.sqrt(hat**2 - now**2) * 1.1 * draws[i]
        slope = (x_hat - denoise(x_hat, hat)) / hat
        x = x_hat + (then - hat) * slope
        if then:
            x = x_hat + (then - hat) * (slope + (x - denoise(x, then)) / then) / 2
    noise = iter([torch.full((1, 1, 1, 1), draw) for draw in draws]).__next__
    start = torch.full((1, 1, 1, 1), z, dtype=torch.float64)
    sample = edm_sampler(denoise, start, 4, 0.1, 10.0, 5.0, S_churn=1.0, S_min=0.5, S_max=5.0, S_noise=1.1, noise=noise)
    assert sample.item() == pytest.approx(x, rel=1e-6)


def test_states(golden):
    states = list(heun_states(DENOISER, golden["z"], 18))
    assert [(state.step, state.num_steps) for state in states] == [(i + 1, 18) for i in range(18)]
    torch.testing.assert_close(states[-1].x, states[-1].pred_xstart)  # the last step goes all the way to sigma = 0
    assert torch.equal(states[-1].x, edm_sampler(DENOISER, golden["z"], 18))


@torch.no_grad()
def test_network_sees_float32():
    """Of a sampler in float64, a real network gets what it was trained on: float32, and ln(sigma)/4."""
    model, seen = ImageDiffiT(input_size=8, channels=(8,), blocks=(1,), head_dim=4, cond_dim=12).eval(), []
    torch.nn.init.normal_(model.head.weight)

    def network(x, c_noise):
        seen.append((x.dtype, c_noise))
        return model(x, c_noise)

    sample = edm_sampler(EDMPrecond(network), torch.randn(2, 3, 8, 8), 3)
    assert sample.dtype == torch.float64
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert len(seen) == 5
    torch.testing.assert_close(seen[0][1], torch.full((2,), math.log(80) / 4))


def test_unfitting_settings_are_refused():
    z = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        edm_sampler(DENOISER, z, 0)
    with pytest.raises(ValueError, match="sigma must fall"):
        edm_sampler(DENOISER, z, 18, sigma_min=90.0)
    with pytest.raises(ValueError, match="rho must be above 0"):
        edm_sampler(DENOISER, z, 18, rho=0.0)
    with pytest.raises(ValueError, match="must not be negative, as -1"):
        edm_sampler(DENOISER, z, 18, S_churn=-1)
    with pytest.raises(ValueError, match="noise source"):
        edm_sampler(DENOISER, z, 18, S_churn=40)


def test_the_default_levels_are_edms():
    """Table 1 of Karras et al. (2022): from 80 to 0.002, evenly spaced in their seventh roots; then 0."""
    most, least = 80 ** (1 / 7), 0.002 ** (1 / 7)
    expected = torch.tensor([80, ((most + least) / 2) ** 7, 0.002, 0], dtype=torch.float64)
    torch.testing.assert_close(edm_sigmas(3).double(), expected, rtol=1e-6, atol=0)
