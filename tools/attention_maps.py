"""Fig. 2: where a token looks while a picture comes into being, as a strip of attention maps over the trajectory.

    python tools/attention_maps.py                                             # the bundled model
    python tools/attention_maps.py --model_path FILE --class_labels Sneaker --per_block --out sneaker.png

Above, the picture that the network expects at that time; below it, the attention of one token (by default the central
one) to all others, as a multiple of what it would be if it looked everywhere alike, mean over heads and over blocks.
Windowed networks look within a window; the rest of the picture is left white.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from plots import new_figure, save_figure
from torch import Tensor, nn

from diffit import load_model
from diffit.cli.parser import fail
from diffit.codec import create_codec
from diffit.device import resolve_device
from diffit.diffusion import SampleNoise, create_sampler, guided_model
from diffit.nn.attention import WindowAttention
from diffit.sampling.images import batch_labels, class_names, resolve_labels
from diffit.sources import CheckpointConfig

Position = tuple[float, float]  # row and column of a token, in parts of the side
Maps = dict[str, NDArray[np.float64]]  # by block [B, S, S], S the block's side in tokens


def attention_map(layer: WindowAttention, qkv: Tensor, bias: Tensor, at: Position) -> NDArray[np.float64]:
    """The attention of one token to all others by Eq. 6, mean over heads, times the N tokens of its window: [B, S, S].

    qkv: [B, W, N, 3C]; bias: [1 or B*W, H, N, N]. It is NaN outside of the token's window.
    """
    (B, W, N, _), side = qkv.shape, layer.window_size
    q, k, _ = qkv.view(B * W, N, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B*W, H, N, D]
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1).mean(1).view(B, W, N, N)
    across = round(W**0.5)  # windows in a row of the image
    row, column = (int(part * across * side) for part in at)
    top, left = row // side, column // side  # of the window, in windows
    seen = N * weights[:, top * across + left, row % side * side + column % side]  # [B, N]
    found = np.full((B, across, side, across, side), np.nan)
    found[:, top, :, left] = seen.view(B, side, side).double().cpu().numpy()
    return found.reshape(B, across * side, across * side)


def watch(model: nn.Module, at: Position) -> Maps:
    """Have every attention of a network keep its map of the last call in the dictionary that is returned.

    Raises:
        ValueError: if the network has no attention that is known here.
    """
    maps: Maps = {}

    def attend(name: str, layer: WindowAttention, qkv: Tensor, bias: Tensor) -> Tensor:
        maps[name] = attention_map(layer, qkv, bias, at)
        return type(layer).attend(layer, qkv, bias)

    for name, layer in model.named_modules():
        if isinstance(layer, WindowAttention):
            short = name.removesuffix(".attn").removesuffix(".block").replace("blocks.", "block ")
            layer.attend = partial(attend, short, layer)  # type: ignore[method-assign]
            maps[short] = np.empty(0)
    if not maps:
        raise ValueError(f"a {type(model).__name__} has no attention within windows to look at")
    return maps


@dataclass
class Moment:
    """What is shown of a time: pictures [B, H, W, C] uint8 and maps by block."""

    title: str
    pictures: NDArray[np.uint8]
    maps: Maps


@torch.no_grad()
def record(
    model: nn.Module, config: CheckpointConfig, labels: Tensor, at: Position, count: int, seed: int
) -> list[Moment]:
    """Sample images of these labels [B], and look at `count` about evenly spaced moments on the way."""
    device, size = labels.device, config.network.input_size
    codec, sampler = create_codec(config.codec, device), create_sampler(config.process_config, config.sampling)
    noise = SampleNoise(seed, range(len(labels)), (config.network.in_channels, size, size), device)
    null = config.network.num_classes
    maps = watch(model, at)
    denoiser = guided_model(model, labels, null, config.guidance, config.process_config, size)
    moments = []
    for state in sampler(denoiser, noise.start(), noise):
        if state.step in np.linspace(1, state.num_steps, min(count, state.num_steps)).round():
            labelled = {name: found[: len(labels)] for name, found in maps.items()}  # the null half of guidance follows
            pictures = codec.decode(state.pred_xstart.float()).cpu().numpy()
            moments.append(Moment(f"step {state.step}/{state.num_steps}", pictures, labelled))
    return moments


def average(maps: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean over blocks [B, S, S] at the finest side; coarser maps are enlarged, what no block sees stays NaN."""
    side = max(each.shape[-1] for each in maps)
    enlarged = np.stack([each.repeat(side // each.shape[-1], 1).repeat(side // each.shape[-1], 2) for each in maps])
    return np.ma.masked_invalid(enlarged).mean(0).filled(np.nan)


def draw_strip(moments: Sequence[Moment], names: Sequence[str], at: Position, per_block: bool) -> Any:
    """A figure with a column for each moment: for every sample its picture and the mean map of all blocks.

    names: of the samples [B]; per_block: the maps of all blocks of the first sample alone, a row for each.
    """
    from matplotlib.patches import Rectangle

    rows: list[tuple[str, list[NDArray[Any]]]] = []
    for sample, name in enumerate(names[:1] if per_block else names):
        rows.append((f"{name}:\nexpected image", [moment.pictures[sample] for moment in moments]))
        if per_block:
            rows += [(block, [moment.maps[block][sample] for moment in moments]) for block in moments[0].maps]
        else:
            rows.append(("attention", [average(list(moment.maps.values()))[sample] for moment in moments]))
    seen = np.concatenate([each.ravel() for _, row in rows for each in row if each.dtype == np.float64])
    colours = {"cmap": "viridis", "vmin": 0, "vmax": float(np.nanpercentile(seen, 99.5))}
    finest = max(each.shape[-1] for each in moments[0].maps.values())
    height, width = len(rows), len(moments)
    figure, axes = new_figure(height, width, max(6.0, 1.3 * width + 1.8), 1.35 * height + 1)
    for axis, moment in zip(axes[0], moments, strict=True):
        axis.set_title(moment.title, fontsize=9)
    for line, (label, row) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label, fontsize=9)
        for axis, picture in zip(line, row, strict=True):
            is_map, side = picture.dtype == np.float64, len(picture)
            scale = colours if is_map else {"cmap": "gray", "vmin": 0, "vmax": 255}
            shown = axis.imshow(picture.squeeze(), interpolation="nearest", **scale)
            tokens = side if is_map else finest
            top, left = (int(part * tokens) * side / tokens - 0.5 for part in at)
            axis.add_patch(Rectangle((left, top), side / tokens, side / tokens, fill=False, color="red", lw=1.2))
            axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(shown, ax=axes, shrink=min(1.0, 2.5 / height), pad=0.01)  # the last row holds maps
    bar.set_label("attention (1: everywhere alike)", fontsize=9)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="Diffit-Fashion", help="checkpoint (default: the bundled model)")
    parser.add_argument("--class_labels", nargs="+", default=[], help="numbers or names; drawn at random by default")
    parser.add_argument("--num_samples", type=int, default=3, help="pictures (default: 3)")
    parser.add_argument("--moments", type=int, default=8, help="columns (default: 8)")
    parser.add_argument("--token", type=float, nargs=2, default=(0.5, 0.5), help="row and column, in parts of the side")
    parser.add_argument("--per_block", action="store_true", help="a row for every block of the first picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("attention_maps.png"))
    args = parser.parse_args(argv)
    try:
        if not all(0 <= part < 1 for part in args.token) or min(args.num_samples, args.moments) < 1:
            raise ValueError("--token lies in [0, 1), and --num_samples and --moments are at least 1")
        device, at = resolve_device(args.device), (args.token[0], args.token[1])
        model, config = load_model(args.model_path)
        known = class_names(config)
        wanted = resolve_labels(args.class_labels, known)
        labels = batch_labels(config, range(args.num_samples), args.seed, wanted, device)
        moments = record(model.to(device), config, labels, at, args.moments, args.seed)
        names = [known[int(y)] if known else f"sample {i}" for i, y in enumerate(labels)]
        figure = draw_strip(moments, names, at, args.per_block)
        token = "the central token" if at == (0.5, 0.5) else "the marked token"
        what = f"{config.model} ({config.network.conditioning}): noise to image"
        figure.suptitle(f"Attention of {token} (red) to all others while sampling,\n{what}", fontsize=11)
        save_figure(figure, args.out)
    except (ValueError, OSError) as error:
        fail(str(error))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
