"""The network that a run starts from: a fresh one, or the weights of another with other classes or resolution.

Letters: H heads, w side of the attention window, C channels, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit.checkpoint.weights import load_weights
from diffit.models.config import NetworkConfig, build_model
from diffit.system.console import say
from diffit.system.distributed import World
from diffit.training.config import TrainConfig, find_start


def initial_model(config: TrainConfig, network: NetworkConfig, world: World) -> nn.Module:
    """A fresh network, or the one that --init_from names; rank 0 prints each change that it needed."""
    if config.init_from is None:
        return build_model(network)
    source, found = find_start(config)
    trained = load_weights(source.fetch(), found)
    model = build_model(network)
    weights, changes = adapt_state(trained.state_dict(), model.state_dict())
    model.load_state_dict(weights)
    for change in changes if world.is_main else []:
        say(f"--init_from {source}: {change}")
    return model


def adapt_state(source: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of `source` in the shapes of `target`, and what had to be done, in sentences.

    - The label table of another number of classes is that of `target`, but for its last row: the null class is kept.
    - A relative position bias for another window is interpolated, as an image of offsets.
    - A position embedding for another grid is that of `target`: it is a formula, and needs no interpolation.

    Args:
        source: state dict of a trained network.
        target: state dict of a freshly initialised network of the same kind; it is left as it is.

    Raises:
        ValueError: in one sentence, if the networks differ in anything else.
    """
    odd = sorted(source.keys() ^ target.keys())
    if odd:
        where = "lack" if odd[0] in target else "also hold"
        raise ValueError(
            f"the weights to start from are of another network: they {where} {odd[0]}; only the number of classes and "
            "the resolution may differ"
        )
    adapted, resized, sentences = {}, [], []
    for name, wanted in target.items():
        value = source[name]
        if value.shape == wanted.shape:
            adapted[name] = value
        elif name == "y_embedder.embedding_table.weight" and value.shape[1] == wanted.shape[1]:
            adapted[name] = torch.cat([wanted[:-1], value[-1:].to(wanted)])
            sentences.append(
                f"the label table was made anew for {len(wanted) - 1} classes instead of {len(value) - 1}; "
                "its null class is kept"
            )
        elif name.endswith("relative_position_bias_table") and value.shape[1] == wanted.shape[1]:
            adapted[name] = resize_bias(value, _window(wanted))
            resized.append((_window(value), _window(wanted)))
        elif name == "pos_embed" and value.shape[2] == wanted.shape[2]:
            adapted[name] = wanted
            sides = [round(tensor.shape[1] ** 0.5) for tensor in (value, wanted)]
            sentences.append(f"the position embedding was computed for a grid of {sides[1]} instead of {sides[0]}")
        else:
            raise ValueError(
                f"the weights to start from do not fit: {name} is {list(value.shape)} instead of {list(wanted.shape)}; "
                "only the number of classes and the resolution may differ"
            )
    if resized:
        sentences.append(
            f"{len(resized)} relative position biases were interpolated from windows of {resized[0][0]} to "
            f"{resized[0][1]}"
        )
    return adapted, sentences


def _window(table: Tensor) -> int:
    """w, from a table of (2w-1)^2 rows."""
    return (round(table.shape[0] ** 0.5) + 1) // 2


def resize_bias(table: Tensor, window_size: int) -> Tensor:
    """A relative position bias table for another window: [(2w-1)^2, H] -> [(2w'-1)^2, H].

    The table is an image of 2w-1 x 2w-1 offsets. The new one covers the same extent of the picture with more tokens, so
    an offset of d' tokens there reads the bias of d' w/w' tokens here: between whole offsets linearly, and beyond
    the last one that of the last.
    """
    w, heads = _window(table), table.shape[1]
    if w == window_size:
        return table
    image = table.T.reshape(1, heads, 2 * w - 1, 2 * w - 1).float()
    offsets = torch.arange(1 - window_size, window_size, device=table.device, dtype=torch.float32) * w / window_size
    axis = offsets / max(w - 1, 1)  # where grid_sample has the outermost offsets at -1 and 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)[None]  # [1, 2w'-1, 2w'-1, 2]
    resized = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return resized.reshape(heads, -1).T.contiguous().to(table.dtype)
