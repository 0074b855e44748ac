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
from dataclasses import dataclass, field
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
from diffit.nn.attention import WindowAttention, matmul_attention
from diffit.sampling.images import batch_labels, class_names, resolve_labels
from diffit.sources import CheckpointConfig


@dataclass
class Recorder:
    """Keeps the maps of one token of the last call of a network, by block: [B, S, S], S the block's side in tokens.

    Args:
        at: row and column of the token, in parts of the side.
        count: how many images of a batch are looked at; what follows them is the null half of guidance.
    """

    at: tuple[float, float]
    count: int
    batch: int = 0
    maps: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def watch(self, model: nn.Module) -> list[str]:
        """Have every attention of a network write its map here; returns their names in order of their blocks.

        Raises:
            ValueError: if the network has no attention that is known here.
        """

        def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.batch = len(inputs[0])

        model.register_forward_pre_hook(begin)
        names = [name for name, module in model.named_modules() if isinstance(module, WindowAttention)]
        if not names:
            raise ValueError(f"a {type(model).__name__} has no attention within windows to look at")
        for name in names:
            module: Any = model.get_submodule(name)
            module.attention = self.attention(name, module.window_size)
        return names

    def attention(self, name: str, side: int) -> Any:
        """Eq. 6, which also keeps the weights of the token's row."""

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias  # [B*W, H, N, N]
            weights = scores.softmax(-1).mean(1).unflatten(0, (self.batch, -1))[: self.count]  # [B, W, N, N]
            across = round(weights.shape[1] ** 0.5)  # windows
            row, column = (int(part * across * side) for part in self.at)
            window, token = row // side * across + column // side, row % side * side + column % side
            seen = np.full((len(weights), across * side, across * side), np.nan)
            top, left = row // side * side, column // side * side
            looked = weights[:, window, token].unflatten(-1, (side, side))  # [B, w, w]
            seen[:, top : top + side, left : left + side] = looked.double().cpu().numpy() * side**2
            self.maps[name] = seen
            return matmul_attention(q, k, v, bias)

        return attend


@dataclass
class Moment:
    """What is shown of a time: pictures [B, H, W, C] uint8 and maps by block [B, S, S]."""

    title: str
    pictures: NDArray[np.uint8]
    maps: dict[str, NDArray[np.float64]]


@torch.no_grad()
def record(
    model: nn.Module, config: CheckpointConfig, labels: Tensor, recorder: Recorder, moments: int, seed: int
) -> list[Moment]:
    """Sample images of these labels [B], and look at about evenly spaced moments on the way."""
    device, size = labels.device, config.network.input_size
    codec, sampler = create_codec(config.codec, device), create_sampler(config.process_config, config.sampling)
    noise = SampleNoise(seed, range(len(labels)), (config.network.in_channels, size, size), device)
    null = config.network.num_classes
    denoiser = guided_model(model, labels, null, config.guidance, config.process_config, size)
    found = []
    for state in sampler(denoiser, noise.start(), noise):
        wanted = {round(step) for step in np.linspace(1, state.num_steps, min(moments, state.num_steps))}
        if state.step in wanted:
            title = f"step {state.step}/{state.num_steps}"
            pictures = codec.decode(state.pred_xstart.to(noise.start().dtype)).cpu().numpy()
            found.append(Moment(title, pictures, dict(recorder.maps)))
    return found


def average(maps: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The mean over blocks [B, S, S] at the finest side; coarser maps are enlarged, what no block sees stays NaN."""
    side = max(each.shape[-1] for each in maps)
    enlarged = np.stack([each.repeat(side // each.shape[-1], 1).repeat(side // each.shape[-1], 2) for each in maps])
    seen = ~np.isnan(enlarged)
    total = np.where(seen, enlarged, 0).sum(0)
    return np.where(seen.any(0), total / np.maximum(seen.sum(0), 1), np.nan)


def draw_strip(moments: list[Moment], names: Sequence[str], rows: list[str], at: tuple[float, float]) -> Any:
    """A figure with a column for each moment.

    names: of the samples [B]; rows: the blocks to show of the first sample, or none: their mean for every sample.
    """
    from matplotlib.patches import Rectangle

    samples = range(1 if rows else len(names))
    lines: list[tuple[str, list[NDArray[Any]]]] = []
    for sample in samples:
        lines.append((f"{names[sample]}:\nexpected image", [moment.pictures[sample] for moment in moments]))
        if rows:
            lines += [(_short(row), [moment.maps[row][sample] for moment in moments]) for row in rows]
        else:
            lines.append(("attention", [average(list(moment.maps.values()))[sample] for moment in moments]))
    shown = np.concatenate([each.ravel() for _, line in lines for each in line if each.dtype == np.float64])
    top = float(np.nanpercentile(shown, 99.5))
    shape = (len(lines), len(moments))
    finest = max(each.shape[-1] for each in moments[0].maps.values())
    figure, axes = new_figure(*shape, max(6.0, 1.3 * shape[1] + 1.8), 1.35 * shape[0] + 1)
    for row, (label, line) in enumerate(lines):
        for column, picture in enumerate(line):
            axis = axes[row, column]
            axis.set(xticks=[], yticks=[])
            if picture.dtype == np.uint8:
                axis.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            else:
                image = axis.imshow(picture, cmap="viridis", vmin=0, vmax=top, interpolation="nearest")
            side = len(picture)
            cells = finest if picture.dtype == np.uint8 else side
            corner = [int(part * cells) * side / cells - 0.5 for part in at]
            mark = {"fill": False, "edgecolor": "red", "linewidth": 1.2}
            axis.add_patch(Rectangle((corner[1], corner[0]), side / cells, side / cells, **mark))
            if row == 0:
                axis.set_title(moments[column].title, fontsize=9)
        axes[row, 0].set_ylabel(label, fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 2.5 / shape[0]), pad=0.01)
    bar.set_label("attention (1: everywhere alike)", fontsize=9)
    return figure


def _short(name: str) -> str:
    """Of an attention's name, what tells its block from others: 'block 3', 'encoder.0.1'."""
    name = name.removesuffix(".attn").removesuffix(".block")
    return name.replace("blocks.", "block ")


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
        device = resolve_device(args.device)
        model, config = load_model(args.model_path)
        recorder = Recorder(tuple(args.token), args.num_samples)
        blocks = recorder.watch(model.to(device))
        wanted = resolve_labels(args.class_labels, class_names(config))
        labels = batch_labels(config, range(args.num_samples), args.seed, wanted, device)
        moments = record(model, config, labels, recorder, args.moments, args.seed)
        known = class_names(config)
        names = [known[int(y)] if known else f"sample {i}" for i, y in enumerate(labels)]
        kind = config.network.conditioning
        token = "the central token" if tuple(args.token) == (0.5, 0.5) else "the marked token"
        title = f"Attention of {token} (red) to all others while sampling,\n{config.model} ({kind}): noise to image"
        figure = draw_strip(moments, names, blocks if args.per_block else [], tuple(args.token))
        figure.suptitle(title, fontsize=11)
        save_figure(figure, args.out)
    except (ValueError, OSError) as error:
        fail(str(error))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
