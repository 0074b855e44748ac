"""Where time enters a block, other than by TMSA: the variants of the paper's Tables 6 and 7, and DiT's of Fig. 7b.

All have the relative position bias, norms and MLP of `DiffiTBlock`, its arguments and its call (tokens, conditioning
token) -> tokens, so that they differ in the conditioning alone. A new variant is a class here and an entry in `BLOCKS`.

Letters: B batch, W windows, N tokens of a window, w side of a window, R = (2w-1)^2 offsets, C channels, E channels of
the conditioning token, M width of the MLP's hidden layer, H heads.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from diffit.nn.attention import WindowAttention, relative_position_bias
from diffit.nn.block import DiffiTBlock


class SeparateAttention(WindowAttention):
    """Attention over the spatial tokens and attention over the time token, apart (Table 7).

    Attention over a single token has weight 1 everywhere: what it gives is that token's value. TMSA gives the same
    value to every token, for its weights sum to 1; what it has beyond this variant is the time in its queries.
    """

    def add_condition(self, dim: int, cond_dim: int) -> None:
        self.value_temb = nn.Linear(cond_dim, dim)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        spatial = self.attend(self.qkv(x), self.position_bias())  # [B, W, N, C]
        return self.proj(spatial + self.value_temb(cond)[:, None, None])  # [B, W, N, C]


class TimeBiasAttention(WindowAttention):
    """Attention in which time is only added to the relative position bias (Table 6 F): a table for every time.

    The number added depends on offset and head: one per head alone would cancel in softmax.
    """

    def add_condition(self, dim: int, cond_dim: int) -> None:
        self.bias_temb = nn.Linear(cond_dim, (2 * self.window_size - 1) ** 2 * self.num_heads)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        B, W, N, _ = x.shape
        table = self.relative_position_bias_table  # [R, H]
        tables = table + self.bias_temb(cond).view(B, *table.shape)  # [B, R, H]
        bias = relative_position_bias(tables.transpose(0, 1).flatten(1), self.window_size)  # [B*H, N, N]
        bias = bias.view(B, -1, N, N).repeat_interleave(W, dim=0)  # [B*W, H, N, N]
        return self.proj(self.attend(self.qkv(x), bias))  # [B, W, N, C]


class TimeMLPBlock(DiffiTBlock):
    """Time only in the MLP (Table 6 G): its hidden layer is a projection of both tokens, as TMSA's q, k, v are."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        mlp_ratio: float = 4.0,
        cond_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, window_size, mlp_ratio, cond_dim, dropout, WindowAttention)
        self.hidden_temb = nn.Linear(dim if cond_dim is None else cond_dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        x = x + self.attn(self.norm1(x), cond)
        hidden = self.mlp.fc1(self.norm2(x)) + self.hidden_temb(cond)[:, None, None]  # [B, W, N, M]
        return x + self.mlp.fc2(self.mlp.drop1(self.mlp.act(hidden)))  # [B, W, N, C]


class AdaLNBlock(DiffiTBlock):
    """DiT's adaLN-Zero block (Peebles & Xie 2023): the condition shifts, scales and gates; attention sees none of it.

    Six projections of the conditioning token, against TMSA's three.
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
        super().__init__(dim, num_heads, window_size, mlp_ratio, cond_dim, dropout, WindowAttention)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim if cond_dim is None else cond_dim, 6 * dim))

    def zero_gates(self) -> None:
        """Make the block the identity, as it is at initialisation."""
        for parameter in self.modulation.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        modulation = self.modulation(cond)[:, None, None].chunk(6, dim=-1)  # six of [B, 1, 1, C]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cond)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


# (dim, num_heads, window_size, mlp_ratio, cond_dim, dropout) -> block
BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "tmsa": DiffiTBlock,
    "separate": partial(DiffiTBlock, attention=SeparateAttention),
    "bias": partial(DiffiTBlock, attention=TimeBiasAttention),
    "mlp": TimeMLPBlock,
    "adaln": AdaLNBlock,
}


def block_class(conditioning: str) -> Callable[..., nn.Module]:
    """What makes the blocks of a kind of conditioning.

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
