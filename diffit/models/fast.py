"""A network made ready for sampling: the same `forward`, with cheaper parts in it.

- Time and label meet the tokens through x_t W_t alone, and x_t is the sum of their embeddings. So W_t, of all blocks,
  is applied to the embeddings beforehand: the two embedders become tables of finished projections, whose sum travels
  through `forward` in place of the conditioning token, and every block takes its share of it.
- The relative position bias is spread once.
- In 16 bits, weights are kept so, not cast at every call. Residuals and norms stay in float32, the tables too, and so
  do the first layer and, in image space, the last.

Letters: B batch, E channels of the conditioning token, S times that sampling visits, K classes and the null class,
P = sum of 3C over all blocks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit.models.image import ImageDiffiT
from diffit.models.latent import DiffiT
from diffit.nn.block import DiffiTBlock
from diffit.nn.fast import FastBlock, FastLinear, Kernel, choose_kernel, without_keys

_SAME_TIME = 1e-4  # times of samplers, timesteps or ln(sigma)/4, are further apart
Network = TypeVar("Network", DiffiT, ImageDiffiT)


class TimeTable(nn.Module):
    """What stands in for the time embedder: projections by time. times: [S]; table: [S, P]."""

    times: Tensor
    table: Tensor

    def __init__(self, times: Tensor, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("times", times, persistent=False)
        self.register_buffer("table", table, persistent=False)

    def forward(self, t: Tensor, offset: Tensor | None = None) -> Tensor:
        """t: [B], each of them one of the times, but for rounding. Returns [B, P].

        Any other time gives NaN, so that it cannot pass unnoticed: to raise an error, the host would have to wait for
        the device. offset, what augmentation told, is zero in sampling and ignored.
        """
        distance, row = (t[:, None].to(self.times.dtype) - self.times).abs().min(dim=1)
        return self.table[row].masked_fill((distance > _SAME_TIME)[:, None], math.nan)


class LabelTable(nn.Module):
    """What stands in for the label embedder: projections by label. table: [K, P]."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """y: [B]. Returns [B, P]. No labels are dropped in sampling."""
        return self.table[y]


class Share(nn.Module):
    """What stands in for a block's projection of the conditioning token: its part of all blocks' projections."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.part = part

    def forward(self, cond: Tensor) -> Tensor:
        """cond: [B, P]. Returns [B, 3C]."""
        return cond[:, self.part]


class FastConv(nn.Module):
    """A convolution in a precision of its own; what comes in and goes out has the caller's."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.dtype = conv.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(self.dtype)).to(x.dtype)


def prepare_for_sampling(
    model: Network, times: Sequence[float], dtype: torch.dtype = torch.float32, kernel: Kernel | None = None
) -> Network:
    """Replace a network's parts by cheaper ones, in place; it can no longer be trained or saved.

    In float32 it predicts the same as before, but for rounding.

    Args:
        model: in eval mode, on its device.
        times: what t or c_noise can be; see `Sampler.times`.
        dtype: of the blocks, and of the latent model's head.
        kernel: of attention; by default the fastest measured on this device.
    """
    return fix_weights(tabulate_conditions(model, times), dtype, kernel)


@torch.no_grad()
def tabulate_conditions(model: Network, times: Sequence[float]) -> Network:
    """Apply all blocks' W_t to all times and labels, in place. Arguments: see `prepare_for_sampling`."""
    layers = [block.attn.qkv_temb for block in _blocks(model)]
    weight = torch.cat([without_keys(layer.weight) for layer in layers])  # [P, E]
    bias = torch.cat([without_keys(layer.bias) for layer in layers])  # [P]
    visited = torch.tensor(sorted(set(times)), dtype=torch.float32, device=weight.device)  # [S]
    labels = model.y_embedder.embedding_table.weight  # [K, E]
    embedded: Tensor = model.t_embedder(visited)  # [S, E]
    model.t_embedder = TimeTable(visited, F.linear(embedded, weight, bias))  # type: ignore[assignment]
    model.y_embedder = LabelTable(F.linear(labels, weight))  # type: ignore[assignment]
    first = 0
    for block in _blocks(model):
        width = block.attn.qkv_temb.out_features
        block.attn.qkv_temb = Share(slice(first, first + width))  # type: ignore[assignment]
        first += width
    return model


@torch.no_grad()
def fix_weights(model: Network, dtype: torch.dtype = torch.float32, kernel: Kernel | None = None) -> Network:
    """Spread biases and cast the blocks, in place. Arguments: see `prepare_for_sampling`."""
    if isinstance(model, ImageDiffiT):  # as windows leave their images; before there are biases of four dimensions
        model.to(memory_format=torch.channels_last)
    _replace(model, DiffiTBlock, lambda block: _fast_block(block, dtype, kernel))
    if isinstance(model, DiffiT):
        _replace(model.final_layer, nn.Linear, lambda layer: FastLinear(layer, dtype))
    else:
        for trunk in (model.encoder, model.downs, model.ups, model.decoder):
            _replace(trunk, nn.Conv2d, lambda conv: FastConv(conv, dtype))
    return model


def _blocks(model: nn.Module) -> list[DiffiTBlock]:
    return [module for module in model.modules() if isinstance(module, DiffiTBlock)]


def _fast_block(block: DiffiTBlock, dtype: torch.dtype, kernel: Kernel | None) -> FastBlock:
    chosen = kernel or choose_kernel(block.attn.qkv.weight.device, block.attn.window_size**2, dtype)
    return FastBlock(block, chosen, dtype)


def _replace(module: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Put `make(part)` in the place of every part of a kind."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, make(child))
        else:
            _replace(child, kind, make)
