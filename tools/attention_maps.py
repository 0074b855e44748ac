"""Fig. 2: where a token looks while a picture comes into being, as a strip of attention maps over the trajectory.

    python tools/attention_maps.py                                             # the bundled model
    python tools/attention_maps.py --model_path FILE --class_labels Sneaker --per_block --out sneaker.png

Above, the picture on its way from noise; below it, the attention of one token (by default the central one) to all
others, as a multiple of what it would be if it looked everywhere alike, mean over heads and over blocks.
Windowed networks look within a window; the rest of the picture is left white.
"""

from __future__ import annotations

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("attention_maps:main")())

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from plots import new_figure, save_figure
from torch import nn

from diffit import ImageSampler, load_model
from diffit.checkpoint.config import CheckpointConfig
from diffit.cli.run import one_sentence
from diffit.sampling.attention import Maps, Position, average, watch
from diffit.sampling.labels import class_names, resolve_labels
from diffit.system.device import resolve_device


@dataclass
class Moment:
    """What is shown of a step: pictures [B, H, W, C] uint8 and maps by block."""

    title: str
    pictures: NDArray[np.uint8]
    maps: Maps


def record(
    model: nn.Module,
    config: CheckpointConfig,
    at: Position,
    count: int,
    device: torch.device,
    num_samples: int,
    class_labels: Sequence[str] = (),
    seed: int = 0,
) -> tuple[list[Moment], NDArray[np.int64]]:
    """Sample in one batch, and look at `count` about evenly spaced steps; also the labels [B]."""
    pictures, indices, moments = ImageSampler.create(model, config, device), range(num_samples), []
    labels = pictures.labels(indices, seed, resolve_labels(class_labels, class_names(config)))
    with watch(model, at) as maps:
        for state in pictures.states(indices, labels, seed):
            if state.step in np.linspace(1, state.num_steps, min(count, state.num_steps)).round():
                labelled = {
                    name: seen[:num_samples] for name, seen in maps.items()
                }  # the null half of guidance follows
                shown = pictures.codec.decode(state.x).cpu().numpy()
                moments.append(Moment(f"step {state.step}/{state.num_steps}", shown, labelled))
    return moments, labels.cpu().numpy()


def draw_strip(moments: Sequence[Moment], names: Sequence[str], at: Position, per_block: bool) -> Any:
    """A figure with a column for each moment: for every sample its picture and the mean map of all blocks.

    names: of the samples [B]; per_block: the maps of all blocks of the first sample alone, a row for each.
    """
    from matplotlib.patches import Rectangle

    rows: list[tuple[str, list[NDArray[Any]]]] = []
    for sample, name in enumerate(names[:1] if per_block else names):
        rows.append((name, [moment.pictures[sample] for moment in moments]))
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


@one_sentence()
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
    if min(args.num_samples, args.moments) < 1:
        raise ValueError("--num_samples and --moments must be at least 1")
    device, at = resolve_device(args.device), (args.token[0], args.token[1])
    model, config = load_model(args.model_path)
    moments, labels = record(model, config, at, args.moments, device, args.num_samples, args.class_labels, args.seed)
    known = class_names(config)
    names = [known[int(y)] if known else f"sample {i}" for i, y in enumerate(labels)]
    figure = draw_strip(moments, names, at, args.per_block)
    token = "the central token" if at == (0.5, 0.5) else "the marked token"
    what = f"{config.model} ({config.network.conditioning}): noise to image"
    figure.suptitle(f"Attention of {token} (red) to all others while sampling,\n{what}", fontsize=11)
    save_figure(figure, args.out)
    print(args.out)
    return 0
