"""From a picture of any size to a square of the wanted one: the centre crop that ADM trained and was measured with.

Letters: S wanted side, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}


def centre_crop(picture: Image, size: int) -> Image:
    """The central size x size square of a picture whose short side was brought to that size (ADM, section on data).

    Halved by box averages while both sides are at least twice the size, then resized bicubically: so no step shrinks by
    more than 2, whatever the filter of the library does beyond.
    """
    from PIL.Image import Resampling

    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def square_pixels(picture: Image, size: int, channels: int) -> NDArray[np.uint8]:
    """The centre crop of a picture as uint8 [S, S, C]."""
    pixels = np.array(centre_crop(picture.convert(MODES[channels]), size))
    return pixels.reshape(size, size, channels)
