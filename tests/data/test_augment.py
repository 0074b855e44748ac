"""The augmentation: each transform against its closed form, borders, anti-aliasing, labels and reproducibility."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffit.data.augment import _DOWN, _UP, Augmentation, augment, draw_augmentation, resample

NAMES = ("x_flip", "y_flip", "scale", "rotation", "stretch", "axis", "x_shift", "y_shift")


def only(batch: int = 1, **values: float) -> Augmentation:
    """An augmentation that does just this, to every image of a batch."""
    return Augmentation(**{name: torch.full((batch,), values.get(name, 0.0), dtype=torch.float64) for name in NAMES})


def blob(height: int, width: int, centre: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """A Gaussian bump as an image [1, 1, h, w]; centre in pixels from the image's (x right, y down)."""
    y, x = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in (height, width)), indexing="ij")
    points = torch.stack([x, y], dim=-1) - centre
    return torch.exp(-0.5 * torch.einsum("yxi,ij,yxj->yx", points, covariance.inverse(), points))[None, None]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_exact(out, expected):
    """Up to rounding: white noise, so that a neighbouring pixel would be off by about 1."""
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5)


def test_flips_are_bit_exact(images):
    assert torch.equal(augment(images, only(2, x_flip=1)), images.flip(3))
    assert torch.equal(augment(images, only(2, y_flip=1)), images.flip(2))
    assert torch.equal(augment(images, only(2)), images)


@pytest.mark.parametrize("quarters", [-1, 1, 2])
def test_quarter_turns(images, quarters):
    """Counter-clockwise as seen, as rot90 turns."""
    turned = augment(images, only(2, rotation=quarters * math.pi / 2))
    assert_exact(turned, images.rot90(quarters, (2, 3)))


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -5), (7, 2), (-40, 0)])
def test_whole_pixel_shifts_and_reflected_borders(images, right, down):
    """Output pixel (i, j) is input pixel (i - down, j - right), read in the image reflected about its border pixels."""
    shifted = augment(images, only(2, x_shift=right / 4, y_shift=down / 4))  # in eighths of 32
    reflected = np.pad(images.numpy(), ((0, 0), (0, 0), (64, 64), (64, 64)), mode="reflect")
    expected = reflected[:, :, 64 - down : 96 - down, 64 - right : 96 - right]
    assert_exact(shifted, torch.from_numpy(expected.copy()))


def test_images_need_not_be_square():
    images = torch.rand(1, 2, 16, 24)
    assert_exact(augment(images, only(x_shift=1.0))[..., 3:], images[..., :-3])
    assert_exact(augment(images, only(y_shift=1.0))[:, :, 2:], images[:, :, :-2])
    assert_exact(augment(images, only(rotation=math.pi)), images.rot90(2, (2, 3)))


def turn(angle: float) -> torch.Tensor:
    """Counter-clockwise as seen, where y points down."""
    return torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def stretch(w: float, axis: float) -> torch.Tensor:
    return turn(axis) @ torch.diag(torch.tensor([2 ** (0.2 * w), 2 ** (-0.2 * w)])) @ turn(axis).T


@pytest.mark.parametrize(
    ("values", "linear"),
    [
        ({"scale": 1.3}, 2**0.26 * torch.eye(2)),
        ({"scale": -1.7}, 2**-0.34 * torch.eye(2)),
        ({"rotation": 0.5}, turn(0.5)),
        ({"stretch": 1.5, "axis": 0.0}, torch.diag(torch.tensor([2**0.3, 2**-0.3]))),
        ({"stretch": 1.5, "axis": 0.9}, stretch(1.5, 0.9)),
        ({"x_shift": 0.4, "y_shift": -0.3}, torch.eye(2)),
        (
            {"scale": 0.8, "rotation": -2.0, "stretch": -1.2, "axis": 0.7, "x_shift": 0.5},
            2**0.16 * stretch(-1.2, 0.7) @ turn(-2.0),
        ),
    ],
)
def test_smooth_images_against_the_formula(values, linear):
    """A Gaussian bump goes over into a Gaussian bump: the image of its centre, the image of its covariance.

    Interpolation costs up to 1% of its height; a wrong sign, order or factor would cost at least ten.
    """
    centre, covariance = torch.tensor([2.0, -1.0]), torch.tensor([[7.0, 2.0], [2.0, 4.0]])
    shift = 4 * torch.tensor([values.get("x_shift", 0.0), values.get("y_shift", 0.0)])  # eighths of 32 pixels
    out = augment(blob(32, 32, centre, covariance), only(**values))
    expected = blob(32, 32, linear @ centre + shift, linear @ covariance @ linear.T)
    torch.testing.assert_close(out, expected, rtol=0, atol=0.015)


def test_filters_undo_each_other():
    """Up and then down is the identity, to all printed digits; both keep constants."""
    up, down = (np.array(half[:0:-1] + half) for half in (_UP, _DOWN))
    product = np.convolve(up, down)
    np.testing.assert_allclose(product[len(product) // 2 :: 2], [1, 0, 0, 0], atol=1e-13)
    np.testing.assert_allclose([up[::2].sum(), up[1::2].sum(), down.sum()], 1, atol=1e-13)


@pytest.mark.parametrize(("frequency", "bound"), [(0.7, 0.2), (0.8, 0.06), (1.0, 1e-5)])
def test_shrinking_does_not_alias(frequency, bound):
    """At half the size, what lies above the new Nyquist frequency (0.5) is filtered out; plain reading lets it fold."""
    grating = torch.cos(math.pi * frequency * torch.arange(64) + 0.3).expand(1, 1, 64, 64)
    source = torch.tensor([[[2.0, 0.0, 0.3], [0.0, 2.0, 0.2]]], dtype=torch.float64)
    inner = (..., slice(24, 40), slice(24, 40))  # where no border is read
    assert resample(grating, source)[inner].abs().max() < bound
    grid = F.affine_grid(source.float() * torch.tensor([1, 1, 1 / 31.5]), [1, 1, 64, 64], align_corners=True)
    plain = F.grid_sample(grating, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
    assert plain[inner].abs().max() > 0.4


def test_labels():
    """In the order x-flip, y-flip, scale, rotation (2), anisotropic scale (2), translation (2)."""
    values = dict(zip(NAMES, (1.0, 0.0, -0.4, 2.0, 1.5, 0.3, 0.7, -0.9), strict=True))
    expected = [1, 0, -0.4, math.cos(2) - 1, math.sin(2), 1.5 * math.cos(0.3), 1.5 * math.sin(0.3), 0.7, -0.9]
    np.testing.assert_allclose(only(**values).labels()[0], expected, rtol=1e-6)
    assert torch.equal(only(3).labels(), torch.zeros(3, 9))


def test_draws():
    """Frequencies and distributions over many images."""
    count, probability = 20_000, 0.3
    drawn = draw_augmentation([np.random.default_rng(1)] * count, probability)
    error = 4 * math.sqrt(0.25 / count)
    applied = {name: float((getattr(drawn, name) != 0).double().mean()) for name in NAMES}
    expected = {"x_flip": 0.5, "y_flip": probability / 2, "axis": probability / 2}
    for name in NAMES:
        assert applied[name] == pytest.approx(expected.get(name, probability), abs=error), name
    for name in ("scale", "stretch", "x_shift", "y_shift"):
        values = getattr(drawn, name)[getattr(drawn, name) != 0]
        assert float(values.mean()) == pytest.approx(0, abs=0.06), name
        assert float(values.std()) == pytest.approx(1, abs=0.04), name
    for name in ("rotation", "axis"):
        values = getattr(drawn, name)[getattr(drawn, name) != 0]
        assert values.abs().max() <= math.pi
        assert float(values.std()) == pytest.approx(math.pi / math.sqrt(3), abs=0.06), name
    assert torch.equal(drawn.x_shift != 0, drawn.y_shift != 0)
    assert (drawn.axis[drawn.stretch == 0] == 0).all()
    together = ((drawn.scale != 0) & (drawn.rotation != 0)).double().mean()
    assert float(together) == pytest.approx(probability**2, abs=error)


def test_the_layout_in_memory_does_not_matter(images):
    """Images come as [H, W, C], permuted."""
    augmentation = draw_augmentation([np.random.default_rng(0)] * 2, 1.0)
    permuted = images.contiguous(memory_format=torch.channels_last)
    assert_exact(augment(permuted, augmentation), augment(images, augmentation))


def test_a_part_of_a_batch_is_augmented_as_in_the_whole():
    """Neither an image's place in the batch nor its neighbours matter."""
    images = torch.rand(6, 3, 16, 16)
    augmentation = draw_augmentation([np.random.default_rng(0)] * 6, 0.8)
    together = augment(images, augmentation)
    for part in (slice(1, 2), slice(4, 6)):
        alone = Augmentation(**{name: getattr(augmentation, name)[part] for name in NAMES})
        torch.testing.assert_close(together[part], augment(images[part], alone), rtol=0, atol=1e-6)
    assert (together - images).abs().amax((1, 2, 3)).min() > 0.01


def test_probability_zero_flips_only():
    drawn = draw_augmentation([np.random.default_rng(0)] * 50, 0.0)
    assert torch.equal(drawn.labels()[:, 1:], torch.zeros(50, 8))
    assert set(drawn.x_flip.tolist()) == {0.0, 1.0}
