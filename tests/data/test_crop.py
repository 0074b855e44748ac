"""ADM's crop against closed forms: ramps and constants, which box averages and bicubic resizing carry through."""

import numpy as np
import pytest
from PIL import Image

from diffit.data.files import centre_crop, square_pixels


def ramp(height, width, slope, axis=1):
    """A grey picture whose value is slope times the column (or row)."""
    values = slope * np.arange(width if axis else height)
    pixels = np.broadcast_to(values if axis else values[:, None], (height, width))
    return Image.fromarray(pixels.astype(np.uint8))


def test_no_resizing_takes_the_central_columns():
    pixels = square_pixels(ramp(16, 49, 3), 16, 1)[..., 0]
    assert (pixels == 3 * np.arange(16, 32)).all()  # (49 - 16) // 2 = 16 on the left, 17 on the right
    pixels = square_pixels(ramp(49, 16, 3, axis=0), 16, 1)[..., 0]
    assert (pixels == 3 * np.arange(16, 32)[:, None]).all()


def test_halvings_are_box_averages():
    """Twice halved, columns 4j .. 4j + 3 of slope 2 become their mean 8j + 3."""
    pixels = square_pixels(ramp(64, 64, 2), 16, 1)[..., 0]
    assert (pixels == 8 * np.arange(16) + 3).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_bicubic_resizing_keeps_a_ramp(axis):
    """Column j of the smaller picture lies at 1.5 (j + 1/2) - 1/2 of the larger: 9j + 1.5 at slope 6."""
    pixels = square_pixels(ramp(36, 36, 6, axis), 24, 1)[..., 0].astype(float)
    along = pixels if axis else pixels.T
    assert (along == along[0]).all()
    inside = slice(3, -3)
    assert (abs(along[0] - (9 * np.arange(24) + 1.5))[inside] <= 0.5).all()


@pytest.mark.parametrize("size", [(31, 31), (32, 32), (33, 47), (500, 375), (63, 64), (64, 200), (7, 9), (1, 1)])
def test_sizes_are_exact(size):
    picture = Image.new("RGB", size, (10, 200, 30))
    pixels = square_pixels(picture, 32, 3)
    assert pixels.shape == (32, 32, 3)
    assert (pixels == (10, 200, 30)).all()


def test_halving_stops_below_twice_the_size():
    """64 x 66 is halved once, 63 x 66 is not: then the bicubic filter alone shrinks it, and the edge rings."""
    edge = np.zeros((66, 64), np.uint8)
    edge[:, 32:] = 200
    halved = np.asarray(centre_crop(Image.fromarray(edge), 32))
    assert set(halved[0].tolist()) == {0, 200}  # columns 2j and 2j + 1 are on the same side
    resized = np.asarray(centre_crop(Image.fromarray(edge[:, :63]), 32))
    assert not set(resized[0].tolist()) <= {0, 200}


def test_modes_are_converted():
    """RGBA loses its alpha, a palette and grey become RGB, RGB becomes grey by the usual luma weights."""
    assert (square_pixels(Image.new("RGBA", (8, 8), (1, 2, 3, 0)), 8, 3) == (1, 2, 3)).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert (square_pixels(palette, 8, 3) == (9, 8, 7)).all()
    assert (square_pixels(Image.new("L", (8, 8), 77), 8, 3) == 77).all()
    assert (square_pixels(Image.new("RGB", (8, 8), (100, 0, 0)), 8, 1) == 30).all()  # 0.299 * 100
