"""Cutting images into the windows that attention stays within, and joining them again.

Letters: B batch, C channels, h and w sides of the image, s side of a window, W = (h/s)(w/s) windows, N = s*s tokens.
"""

from torch import Tensor


def to_windows(x: Tensor, side: int) -> Tensor:
    """Cut x [B, C, h, w] into non-overlapping windows: [B, W, N, C], windows and their pixels in row-major order.

    Raises:
        ValueError: if the window does not divide the image.
    """
    B, C, h, w = x.shape
    if h % side or w % side:
        raise ValueError(f"an image of {h}x{w} cannot be cut into windows of {side}x{side}: choose a side divisible")
    x = x.reshape(B, C, h // side, side, w // side, side)  # [B, C, h/s, s, w/s, s]
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, side * side, C)  # [B, W, N, C]


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `to_windows`: windows [B, W, N, C] of an image of that size. Returns [B, C, h, w]."""
    B, _, N, C = windows.shape
    side = round(N**0.5)
    x = windows.reshape(B, height // side, width // side, side, side, C)  # [B, h/s, w/s, s, s, C]
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, height, width)  # [B, C, h, w]
