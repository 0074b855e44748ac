"""Where a token looks while an image comes into being: attention maps of a network at work, as in the paper's Fig. 2.

Letters: B images, W windows of N tokens, H heads, C channels, D channels of a head, S side of a map in tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

from diffit.data.files import picture_of
from diffit.nn.attention import WindowAttention
from diffit.sampling.folder import draw_grid

Position = tuple[float, float]  # row and column of a token, in parts of the side
Maps = dict[str, NDArray[np.float64]]  # by block [B, S, S]


def attention_map(layer: WindowAttention, qkv: Tensor, bias: Tensor, at: Position) -> NDArray[np.float64]:
    """The attention of one token to all others by Eq. 6, mean over heads, times N: [B, S, S].

    1 is the attention of a token that looks everywhere alike; outside of the token's window it is NaN.

    Args:
        layer: an attention.
        qkv: its projections [B, W, N, 3C].
        bias: of relative positions [1 or B*W, H, N, N].
        at: where the token is.
    """
    (B, W, N, _), side = qkv.shape, layer.window_size
    q, k, _ = qkv.view(B * W, N, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B*W, H, N, D]
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1).mean(1).view(B, W, N, N)
    across = round(W**0.5)  # windows in a row of the image
    row, column = (int(part * across * side) for part in at)
    top, left = row // side, column // side  # of the window, in windows
    seen = N * weights[:, top * across + left, row % side * side + column % side]  # [B, N]
    maps = np.full((B, across, side, across, side), np.nan)
    maps[:, top, :, left] = seen.view(B, side, side).double().cpu().numpy()
    return maps.reshape(B, across * side, across * side)


@contextmanager
def watch(model: nn.Module, at: Position) -> Iterator[Maps]:
    """Within the block, the dictionary holds the maps of the network's last call; its outputs stay what they are.

    Raises:
        ValueError: if a token is outside of the image, or the network has no attention that is known here.
    """
    if not all(0 <= part < 1 for part in at):
        raise ValueError(f"a token's row and column are parts of the side, in [0, 1), not {at[0]} and {at[1]}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, WindowAttention)}
    if not layers:
        raise ValueError(f"a {type(model).__name__} has no attention within windows to look at")
    maps: Maps = {}

    def attend(name: str, layer: WindowAttention, qkv: Tensor, bias: Tensor) -> Tensor:
        maps[name] = attention_map(layer, qkv, bias, at)
        return type(layer).attend(layer, qkv, bias)

    for name, layer in layers.items():
        short = name.removesuffix(".attn").removesuffix(".block").replace("blocks.", "block ")
        layer.attend = partial(attend, short, layer)  # type: ignore[method-assign]
    try:
        yield maps
    finally:
        for layer in layers.values():
            del layer.attend  # the method of its class is seen again


def average(maps: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean over blocks [B, S, S] at the finest side; coarser maps are enlarged, what no block sees stays NaN."""
    side = max(each.shape[-1] for each in maps)
    enlarged = np.stack([each.repeat(side // each.shape[-1], 1).repeat(side // each.shape[-1], 2) for each in maps])
    return np.ma.masked_invalid(enlarged).mean(0).filled(np.nan)


def draw_attention(moments: Sequence[tuple[NDArray[np.uint8], NDArray[np.float64], str]], at: Position) -> Image.Image:
    """Images [H, W, C] with titles above and, below, the maps [S, S] of what the token in the red box sees."""
    images, maps, titles = zip(*moments, strict=True)
    highest, side, tokens = max(float(np.nanmax(seen)) for seen in maps), len(images[0]), len(maps[0])
    pictures = [picture_of(image).convert("RGB") for image in images]
    for seen in maps:
        grey = Image.fromarray(np.nan_to_num(255 * seen / highest).astype(np.uint8))
        coloured = ImageOps.colorize(grey, "#220044", "#ffee44", mid="#cc3355")
        pictures.append(coloured.resize((side, side), Image.Resampling.NEAREST))
    top, left = (int(part * tokens) * side // tokens for part in at)
    for shown in pictures:
        ImageDraw.Draw(shown).rectangle((left, top, left + side // tokens - 1, top + side // tokens - 1), outline="red")
    below = [f"up to {np.nanmax(seen):.1f}x" for seen in maps]
    return draw_grid([np.asarray(shown) for shown in pictures], [*titles, *below], columns=len(images))
