"""Transformer blocks: DiffiT's, and DiT's to compare with. Each is called as (tokens, conditioning token) -> tokens.

Letters: B batch, W windows, N tokens of a window, C channels, E channels of the condition, H heads, D = C/H.
"""

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from diffit.nn.attention import TMSA, fused_attention, relative_position_bias


class TanhGELU(nn.GELU):
    """GELU in its tanh approximation, constructible as timm's Mlp constructs its activation."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")


class DiffiTBlock(nn.Module):
    """TMSA, then an MLP, each behind a LayerNorm without affine parameters and with a residual (Eq. 7-8).

    There is no adaLN: time and class enter through the attention alone. Dropout acts where the residual branches of
    convolutional U-Nets have theirs: once a block, after the nonlinearity and before the last linear map.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float = 4.0,
        cond_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = TMSA(dim, num_heads, window_size, cond_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=TanhGELU, drop=(dropout, 0.0))  # hidden layer, output

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        x = x + self.attn(self.norm1(x), cond)  # Eq. 7
        return x + self.mlp(self.norm2(x))  # Eq. 8


class AdaLNBlock(nn.Module):
    """DiT's adaLN-Zero block (Peebles & Xie 2023): the condition shifts, scales and gates; attention sees none of it.

    Six projections of the conditioning token, against TMSA's three. Attention has the relative position bias of TMSA,
    so that the two blocks differ in the conditioning alone. Arguments are those of `DiffiTBlock`.

    Raises:
        ValueError: if num_heads does not divide dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float = 4.0,
        cond_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"hidden size {dim} is not divisible by {num_heads} heads")
        self.num_heads, self.window_size = num_heads, window_size
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=TanhGELU, drop=(dropout, 0.0))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim if cond_dim is None else cond_dim, 6 * dim))

    def zero_gates(self) -> None:
        """Make the block the identity, as it is at initialisation."""
        for parameter in self.modulation.parameters():
            nn.init.zeros_(parameter)

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention within windows. x: [B, W, N, C]. Returns [B, W, N, C]."""
        B, W, N, C = x.shape
        q, k, v = self.qkv(x).view(B * W, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B*W, H, N, D]
        bias = relative_position_bias(self.relative_position_bias_table, self.window_size)  # [H, N, N]
        out = fused_attention(q, k, v, bias.to(q.dtype)[None])  # [B*W, H, N, D]
        return self.proj(out.transpose(1, 2).reshape(B, W, N, C))  # [B, W, N, C]

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        modulation = self.modulation(cond)[:, None, None].chunk(6, dim=-1)  # six of [B, 1, 1, C]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


BLOCKS: dict[str, type[nn.Module]] = {"tmsa": DiffiTBlock, "adaln": AdaLNBlock}


def block_class(conditioning: str) -> type[nn.Module]:
    """The block of a kind of conditioning.

    Raises:
        ValueError: if there is no such kind.
    """
    if conditioning not in BLOCKS:
        raise ValueError(f"unknown conditioning '{conditioning}': choose {' or '.join(BLOCKS)}")
    return BLOCKS[conditioning]


def zero_gates(network: nn.Module) -> None:
    """Make every block that has gates the identity; called at the end of a network's initialisation."""
    for module in network.modules():
        if isinstance(module, AdaLNBlock):
            module.zero_gates()
