"""The parts of a block with fixed weights, for sampling.

Letters: B batch, W windows per image, w side of a window, N = w*w tokens of a window, C channels, E channels of the
conditioning token, H heads, D = C/H.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffit.nn.attention import TMSA, relative_position_bias
from diffit.nn.block import DiffiTBlock

# How softmax(Q K^T / sqrt(D) + B) V is computed: by PyTorch's fused attention, as the products that it is, or by
# FlexAttention, which reads B from its table and never spreads it to N x N.
Kernel = Literal["fused", "matmul", "flex"]
# Up to so many tokens a CPU is faster, in 16 bits, with the products themselves than with its fused attention.
_FEW_TOKENS = 64


def choose_kernel(device: torch.device, num_tokens: int, dtype: torch.dtype) -> Kernel:
    """The fastest measured for windows of N tokens; see docs/benchmarks.md."""
    few = device.type == "cpu" and num_tokens <= _FEW_TOKENS and dtype != torch.float32
    return "matmul" if few else "fused"


def _onednn_takes(weight: Tensor) -> bool:
    """Whether the CPU library that fuses layers is there, and works in this precision on this processor."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    supported = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    name = supported.get(str(weight.dtype).removeprefix("torch."))
    return name is None or getattr(torch.ops.mkldnn, name)()


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q, k, v: [B, H, N, D]; bias: [1, H, N, N]. Returns [B, H, N, D] (Eq. 6), as the other two do."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Eq. 6 as it is written. Softmax adds up in float32 inside, whatever the precision of its input."""
    scores = torch.add(bias, q @ k.transpose(-2, -1), alpha=q.shape[-1] ** -0.5)  # [B, H, N, N]
    return scores.softmax(dim=-1) @ v  # [B, H, N, D]


def flex_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Eq. 6 with B as a function of two positions. table: [(2w-1)^2, H]. Fast when compiled only."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    side = (round(table.shape[0] ** 0.5) + 1) // 2

    def add_bias(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = query // side - key // side, query % side - key % side
        return score + table[(rows + side - 1) * (2 * side - 1) + columns + side - 1, head]

    return flex(q, k, v, score_mod=add_bias)


KERNELS: dict[Kernel, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "fused": fused_attention,
    "matmul": matmul_attention,
    "flex": flex_attention,
}


def without_keys(rows: Tensor) -> Tensor:
    """A projection's rows [3C, ...] for queries, keys and values, with zeros for the keys.

    What all keys share, as they share their bias and the conditioning token's projection, adds the same number to all
    scores of a query, which softmax does not see: Eq. 6 stays what it is. Left out, scores are smaller, and rounding
    them to 16 bits costs less.
    """
    q, k, v = rows.chunk(3)
    return torch.cat([q, torch.zeros_like(k), v])


class FastLinear(nn.Module):
    """A linear layer whose weights no longer change, and perhaps the GELU after it.

    Args:
        layer: the nn.Linear whose weights it takes.
        dtype: of weights and output; its input may have any.
        gelu: apply GELU, in its tanh approximation, to the output.
    """

    def __init__(self, layer: Any, dtype: torch.dtype, gelu: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        self.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
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
        x = F.linear(x, self.weight, self.bias)
        return F.gelu(x, approximate="tanh") if self.gelu else x


class FastTMSA(nn.Module):
    """A TMSA whose weights no longer change: the bias is spread once, and the layers may be kept in 16 bits.

    Args:
        attn: the TMSA, whose weights it takes.
        kernel: see `Kernel`.
        dtype: of everything within but the projection of the conditioning token; inputs may have any.
    """

    bias: Tensor

    def __init__(self, attn: TMSA, kernel: Kernel, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.kernel, self.dtype = attn.num_heads, KERNELS[kernel], dtype
        self.qkv, self.qkv_temb, self.proj = FastLinear(attn.qkv, dtype), attn.qkv_temb, FastLinear(attn.proj, dtype)
        self.qkv.bias = nn.Parameter(without_keys(self.qkv.bias), requires_grad=False)
        bias = attn.relative_position_bias_table.detach()
        if kernel != "flex":
            bias = relative_position_bias(bias, attn.window_size)[None]  # [1, H, N, N]
        self.register_buffer("bias", bias.to(dtype).contiguous(), persistent=False)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C] in the layers' precision."""
        B, W, N, C = x.shape
        temb = self.qkv_temb(cond).to(self.dtype)  # [B, 3C]
        qkv = self.qkv(x).add_(temb[:, None, None])  # Eq. 3-5: [B, W, N, 3C]
        q, k, v = qkv.view(B * W, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B*W, H, N, D]
        out = self.kernel(q, k, v, self.bias)  # Eq. 6: [B*W, H, N, D]
        return self.proj(out.transpose(1, 2).reshape(B, W, N, C))  # [B, W, N, C]


class FastBlock(nn.Module):
    """A block whose weights no longer change.

    Args:
        block: whose parts it takes over.
        kernel: see `Kernel`.
        dtype: of the layers; the residual stream keeps its own.
    """

    def __init__(self, block: DiffiTBlock, kernel: Kernel, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = FastTMSA(block.attn, kernel, dtype)
        self.fc1 = FastLinear(block.mlp.fc1, dtype, gelu=True)
        self.fc2 = FastLinear(block.mlp.fc2, dtype)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C], which it overwrites; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        x = x.add_(self.attn(self.norm1(x), cond))  # Eq. 7
        return x.add_(self.fc2(self.fc1(self.norm2(x))))  # Eq. 8
