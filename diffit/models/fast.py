"""The network of `--fast True`: it is made ready for sampling, with the same `forward` and cheaper parts in it.

- In 16 bits the blocks' weights are kept so, not cast at every call. Residuals, norms and softmax's sums stay in
  float32, and so do the embedders, the first layer and, in image space, the last.
- On a CPU a layer is one call of oneDNN, GELU included, with weights in its own layout.
- The relative position bias is spread once, and what time adds to keys and values is left out or added later.
- On CUDA the GELU is part of the product before it.

Letters: B batch, W windows per image, w side of a window, N = w*w tokens of a window, C channels, E channels of the
conditioning token, H heads, D = C/H.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._triton import has_triton

from diffit.config import Precision
from diffit.models.image import DiffiTResBlock, ImageDiffiT
from diffit.models.latent import DiffiT
from diffit.nn.attention import TMSA, relative_position_bias
from diffit.nn.block import DiffiTBlock

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and Arm processors that multiply bf16


def fast_precision(device: torch.device) -> Precision:
    """The 16 bits that the device computes with at full speed, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _BF16_FLAGS & set(cpu_info("flags", "Features").split()):
        return "bf16"
    return "fp32"


def cpu_info(*fields: str) -> str:
    """What Linux says of the first processor under one of these names; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(fields)), "")


def compiles(device: torch.device) -> bool:
    """Whether compilation can be had and pays for itself: on CUDA; on a CPU it takes longer than most runs."""
    return device.type == "cuda" and has_triton()  # which is not there on Windows, nor for old GPUs


def compiled(network: Any) -> Any:
    """A network that is compiled at its first call, on CUDA to CUDA graphs: once for each shape of its inputs.

    Guidance stays outside of the graph: inside it would save 0.05 ms of the 17.2 that a guided call takes an H200.
    """
    return torch.compile(network, mode="reduce-overhead", dynamic=False)


@torch.no_grad()
def prepare_for_sampling(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Replace a network's blocks by cheaper ones, in place; it can no longer be trained or saved.

    In float32 it predicts the same as before, but for rounding.

    Args:
        model: a DiffiT or ImageDiffiT in eval mode, on its device.
        dtype: of the blocks, and of the latent model's head.

    Raises:
        ValueError: if the network, or a block of it, is of a kind that this file does not know; it is left as it was.
    """
    _refuse_unknown_kinds(model)
    if isinstance(model, ImageDiffiT):  # as windows leave their images; before there are biases of four dimensions
        model.to(memory_format=torch.channels_last)
    _replace(model, DiffiTBlock, lambda block: FastBlock(block, dtype))
    if isinstance(model, DiffiT):
        _replace(model.final_layer, nn.Linear, lambda layer: FastLinear(layer.weight, layer.bias, dtype))
    else:
        for trunk in (model.encoder, model.downs, model.ups, model.decoder):
            _replace(trunk, nn.Conv2d, lambda conv: FastConv(conv, dtype))
    return model


def _refuse_unknown_kinds(model: Any) -> None:
    """A subclass may compute something else: it is never replaced by what its parent computes."""
    unknown = [] if type(model) in (DiffiT, ImageDiffiT) else [model]
    if not unknown:
        blocks = [part.block if type(part) is DiffiTResBlock else part for part in model.blocks_in_order()]
        unknown += [block for block in blocks if type(block) is not DiffiTBlock]
        unknown += [block.attn for block in blocks if type(block) is DiffiTBlock and type(block.attn) is not TMSA]
    if unknown:
        raise ValueError(f"--fast does not know how to compute a {type(unknown[0]).__name__}: leave --fast out")


def _replace(module: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Put `make(part)` in the place of every part of a kind."""
    for name, child in module.named_children():
        if type(child) is kind:
            setattr(module, name, make(child))
        else:
            _replace(child, kind, make)


def _onednn_takes(weight: Tensor) -> bool:
    """Whether the CPU library that fuses layers is there, and works in this precision on this processor."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return weight.dtype not in asked or getattr(torch.ops.mkldnn, asked[weight.dtype])()


class FastLinear(nn.Module):
    """A linear layer whose weights no longer change, and perhaps the GELU after it.

    Args:
        weight: [C', C].
        bias: [C'], or None.
        dtype: of weights and output; its input may have any.
        gelu: apply GELU, in its tanh approximation, to the output.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, gelu: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        self.bias: Any = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        self.dtype, self.gelu = dtype, gelu
        takes = _onednn_takes(self.weight)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight) if takes else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., C]. Returns [..., C']."""
        x = x.to(self.dtype)
        if not torch.compiler.is_compiling() and self.packed is not None:
            # One call of oneDNN with weights in its own layout, as the compiler makes it (which does not take this
            # one): by itself, a CPU's GELU in 16 bits takes as long as the product before it.
            after, how = ("gelu", "tanh") if self.gelu else ("none", "")
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, after, [], how)
        if self.gelu and x.device.type == "cuda":
            # In the product's epilogue; cublasLt's GELU is the tanh form. (Elsewhere this function's is the exact one.)
            # Three blocks took an H200 1.95 ms at 256 pixels, 2.05 without; 4.89 at 512, 4.96 without.
            out = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
            return out.view(*x.shape[:-1], -1)
        x = F.linear(x, self.weight, self.bias)
        return F.gelu(x, approximate="tanh") if self.gelu else x


class FastConv(nn.Module):
    """A convolution in a precision of its own; what comes in and goes out has the caller's."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv, self.dtype = conv.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(self.dtype)).to(x.dtype)


class FastTMSA(nn.Module):
    """A TMSA whose weights no longer change, with what time adds in fewer places.

    Let q_t, k_t, v_t be what conditioning token and biases add to queries, keys and values (Eq. 3-5): the same vector
    for all tokens of an image. Then Eq. 6 stays what it is, but for rounding, when

    - k_t is left out: it adds the same number to all scores of a query, which softmax does not see. Scores are smaller,
      and rounding them to 16 bits costs less.
    - v_t is added after it: rows of softmax sum to 1, so attention(q, k, v + v_t) = attention(q, k, v) + v_t. After the
      projection W that is a vector W v_t for each image, which one product makes of the token.

    Only queries need an addition to every token, and nothing is copied. The bias is spread once. With the GELU in its
    product this took a network of three blocks from 2.13 to 1.95 ms at 256 pixels and from 5.16 to 4.89 at 512 (H200).
    Adding q_t in float32, before rounding, gained neither time nor precision.

    Args:
        attn: the TMSA, whose weights it takes.
        dtype: of everything within but the projections of the conditioning token; inputs may have any.
    """

    bias: Tensor

    def __init__(self, attn: TMSA, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.dtype, self.attention = attn.num_heads, dtype, attn.attention
        self.qkv, self.proj = FastLinear(attn.qkv.weight, None, dtype), FastLinear(attn.proj.weight, None, dtype)
        (q_t, _, v_t), (q_b, _, v_b) = attn.qkv_temb.weight.chunk(3), (attn.qkv_temb.bias + attn.qkv.bias).chunk(3)
        rows, biases = [q_t, attn.proj.weight @ v_t], [q_b, attn.proj.weight @ v_b + attn.proj.bias]
        self.temb = FastLinear(torch.cat(rows), torch.cat(biases), torch.float32)  # [2C, E]
        bias = relative_position_bias(attn.relative_position_bias_table.detach(), attn.window_size)[None]
        self.register_buffer("bias", bias.to(dtype).contiguous(), persistent=False)  # [1, H, N, N]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C] in the layers' precision."""
        B, W, N, C = x.shape
        q_t, out_t = self.temb(cond).to(self.dtype)[:, None, None].chunk(2, dim=-1)  # each [B, 1, 1, C]
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # Eq. 3-5: each [B, W, N, C]
        q, k, v = (y.view(B * W, N, self.num_heads, -1).transpose(1, 2) for y in (q + q_t, k, v))  # [B*W, H, N, D]
        out = self.attention(q, k, v, self.bias)  # Eq. 6: [B*W, H, N, D]
        return self.proj(out.transpose(1, 2).reshape(B, W, N, C)).add_(out_t)  # [B, W, N, C]


class FastBlock(nn.Module):
    """A DiffiT block whose weights no longer change.

    Args:
        block: whose parts it takes over.
        dtype: of the layers; the residual stream keeps its own.
    """

    def __init__(self, block: DiffiTBlock, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(block.attn, TMSA)
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = FastTMSA(block.attn, dtype)
        self.fc1 = FastLinear(block.mlp.fc1.weight, block.mlp.fc1.bias, dtype, gelu=True)
        self.fc2 = FastLinear(block.mlp.fc2.weight, block.mlp.fc2.bias, dtype)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C], which it overwrites; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        x = x.add_(self.attn(self.norm1(x), cond))  # Eq. 7
        return x.add_(self.fc2(self.fc1(self.norm2(x))))  # Eq. 8
