"""Time-dependent multi-head self-attention (TMSA), the idea of DiffiT.

Letters: B batch, W windows per image, w side of a window, N = w*w tokens of a window,
C channels, E channels of the conditioning token, H heads, D = C/H.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative_position_bias(table: Tensor, window_size: int) -> Tensor:
    """Spread the learned table over all pairs of positions of a window: the B of Eq. 6.

    table: [(2w-1)^2, H], one row per offset (row offset major). Returns [H, N, N], where entry (i, j) is the row of
    the offset position_i - position_j. It is a sliding window over the table laid out as an image, so no index
    tensor is needed: view[y_i, x_i, a, b] = grid[y_i + a, x_i + b], read at a = w-1 - y_j and b = w-1 - x_j.
    """
    w, heads = window_size, table.shape[1]
    grid = table.T.reshape(heads, 2 * w - 1, 2 * w - 1)  # [H, 2w-1, 2w-1]
    view = grid.unfold(1, w, 1).unfold(2, w, 1)  # [H, w, w, w, w]
    return view.flip(-2, -1).reshape(heads, w * w, w * w)  # [H, N, N]


def relative_position_index(window_size: int) -> Tensor:
    """The int64 [N, N] index that Swin-style files store: `table[index]` is what `relative_position_bias` spreads."""
    rows = torch.arange((2 * window_size - 1) ** 2)[:, None]  # [(2w-1)^2, 1]
    return relative_position_bias(rows, window_size)[0]  # [N, N]


# q, k, v: [B, H, N, D]; bias: [1, H, N, N]. Returns softmax(Q K^T / sqrt(D) + B) V (Eq. 6): [B, H, N, D].
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Eq. 6 as it is written. Softmax adds up in float32 inside, whatever the precision of its input."""
    scores = torch.add(bias, q @ k.transpose(-2, -1), alpha=q.shape[-1] ** -0.5)  # [B, H, N, N]
    return scores.softmax(dim=-1) @ v  # [B, H, N, D]


def fastest_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Eq. 6 by the products themselves where they were measured to be faster, else by PyTorch's fused attention.

    - On CUDA in TF32 from 1,024 tokens on: a guided call at 512 pixels took an H200 148.9 ms with products and 172.9
      without (batch 8, not compiled), but 2.6 instead of 0.8 GiB, for products hold the N x N matrix. At 256 tokens
      fused attention is faster: 48.3 ms, 49.8 with products (batch 16, 0.4 and 0.5 GiB).
    - On a CPU in 16 bits up to 64 tokens: products took 0.5 to 0.9 of the time at six of eight sizes of small networks,
      1.2 times at two (one thread of a busy machine with avx512_bf16).

    Neither was measured in training, where memory counts and the bias needs a gradient, nor in plain float32 on CUDA:
    there all is fused.
    """
    exact, tokens = q.dtype == torch.float32, q.shape[-2]
    if q.device.type == "cuda":
        products = exact and tokens >= 1024 and torch.backends.cuda.matmul.allow_tf32
    else:
        products = q.device.type == "cpu" and not exact and tokens <= 64
    if products and not torch.is_grad_enabled():
        return matmul_attention(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class WindowAttention(nn.Module):
    """Self-attention within windows, with a relative position bias and no condition (Eq. 6 alone).

    The latent model has one window, the whole grid (W = 1); the image-space model has many.

    Args:
        dim: channels C of the spatial tokens.
        num_heads: heads H; must divide C.
        window_size: side w of the (square) window.
        cond_dim: channels E of the conditioning token; C by default. Attention without a condition reads none of it.

    Raises:
        ValueError: if num_heads does not divide dim.

    The attribute `attention` is the function that computes Eq. 6; both of this file give the same but for rounding.
    """

    attention: Attention = staticmethod(fastest_attention)

    def __init__(self, dim: int, num_heads: int, window_size: int, cond_dim: int | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden size {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = nn.Linear(dim, 3 * dim)
        self.add_condition(dim, dim if cond_dim is None else cond_dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def add_condition(self, dim: int, cond_dim: int) -> None:
        """Make the layers that read the conditioning token; here none.

        Called between the others, because optimizer states and seeds know parameters by their order.
        """

    def attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Eq. 6 of all heads. qkv: [B, W, N, 3C]; bias: [1 or B*W, H, N, N]. Returns, unprojected, [B, W, N, C]."""
        B, W, N, _ = qkv.shape
        q, k, v = qkv.view(B * W, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B*W, H, N, D]
        out = self.attention(q, k, v, bias.to(q.dtype))  # [B*W, H, N, D]
        return out.transpose(1, 2).reshape(B, W, N, -1)  # [B, W, N, C]

    def position_bias(self) -> Tensor:
        """The B of Eq. 6: [1, H, N, N]."""
        return relative_position_bias(self.relative_position_bias_table, self.window_size)[None]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E], not read. Returns [B, W, N, C]."""
        return self.proj(self.attend(self.qkv(x), self.position_bias()))  # [B, W, N, C]


class TMSA(WindowAttention):
    """Attention whose queries, keys and values also depend on the conditioning token (Eq. 3-6)."""

    def add_condition(self, dim: int, cond_dim: int) -> None:
        self.qkv_temb = nn.Linear(cond_dim, 3 * dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        qkv = self.qkv(x) + self.qkv_temb(cond)[:, None, None]  # Eq. 3-5: [B, W, N, 3C]
        return self.proj(self.attend(qkv, self.position_bias()))  # Eq. 6: [B, W, N, C]
