"""Cutting images into the windows that attention stays within, and joining them again.

Each of the two moves every pixel once, in runs of its C channels: images are read and left in channels-last memory,
which their shape [B, C, h, w] does not show. Convolutions take it as it is, and on most devices prefer it.

Letters: B batch, C channels, h and w sides of the image, s side of a window, W = (h/s)(w/s) windows, N = s*s tokens.
"""

import math

from torch import Tensor


def to_windows(x: Tensor, side: int) -> Tensor:
    """Cut x [B, C, h, w] into non-overlapping windows: [B, W, N, C], windows and their pixels in row-major order.

    Raises:
        ValueError: if the window does not divide the image.
    """
    B, C, h, w = x.shape
    if h % side or w % side:
        raise ValueError(f"an image of {h}x{w} cannot be cut into windows of {side}x{side}: choose a side divisible")
    x = x.permute(0, 2, 3, 1).reshape(B, h // side, side, w // side, side, C)  # a view: [B, h/s, s, w/s, s, C]
    return x.permute(0, 1, 3, 2, 4, 5).reshape(B, -1, side * side, C)  # [B, W, N, C]


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`: windows [B, W, N, C] of an image of that size. Returns [B, C, h, w]."""
    B, _, N, C = windows.shape
    side = math.isqrt(N)
    x = windows.reshape(B, height // side, width // side, side, side, C)  # a view: [B, h/s, w/s, s, s, C]
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(B, height, width, C)  # [B, h, w, C]
    return x.permute(0, 3, 1, 2)  # a view: [B, C, h, w]
