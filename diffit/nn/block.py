"""The transformer block of DiffiT; what the paper compares it with is in variants.py.

Letters: B batch, W windows, N tokens of a window, C channels, E channels of the condition.
"""

from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from diffit.nn.attention import TMSA, WindowAttention


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
        attention: type[WindowAttention] = TMSA,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = attention(dim, num_heads, window_size, cond_dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=GELUTanh, drop=(dropout, 0.0))  # hidden layer, output

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        x = x + self.attn(self.norm1(x), cond)  # Eq. 7
        return x + self.mlp(self.norm2(x))  # Eq. 8
