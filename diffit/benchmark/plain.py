"""The plain path, the oracle of every faster one: attention as its products, softmax(Q K^T / sqrt(D) + B) V."""

import copy
from typing import TypeVar

from torch import Tensor, nn

from diffit.nn.attention import TMSA, relative_position_bias

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class PlainTMSA(TMSA):
    """TMSA that makes the N x N attention matrix, and spreads its bias anew at every call."""

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """x: tokens [B, W, N, C]; cond: conditioning token [B, E]. Returns [B, W, N, C]."""
        B, W, N, C = x.shape
        qkv = self.qkv(x) + self.qkv_temb(cond)[:, None, None]  # Eq. 3-5: [B, W, N, 3C]
        q, k, v = qkv.view(B * W, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B*W, H, N, D]
        bias = relative_position_bias(self.relative_position_bias_table, self.window_size)  # [H, N, N]
        scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5 + bias.to(q.dtype)  # [B*W, H, N, N]
        out = scores.softmax(dim=-1) @ v  # Eq. 6: [B*W, H, N, D]
        return self.proj(out.transpose(1, 2).reshape(B, W, N, C))  # [B, W, N, C]


def with_plain_attention(model: AnyModule) -> AnyModule:
    """The network with its attention as products, in place."""
    for module in model.modules():
        if type(module) is TMSA:
            module.__class__ = PlainTMSA
    return model


def twin(model: AnyModule) -> AnyModule:
    """A network of the same weights in the same memory; to replace or cast a layer of one does not touch the other."""
    own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, own)
