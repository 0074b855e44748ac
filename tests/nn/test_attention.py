"""TMSA against the equations written out, one query at a time."""

import math

import pytest
import torch

from diffit.nn import attention
from diffit.nn.attention import TMSA, fastest_attention, relative_position_bias


def naive_tmsa(module: TMSA, x: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """Eq. 3-6 as loops over images, windows, heads and queries."""
    B, W, N, C = x.shape
    heads, side = module.num_heads, module.window_size
    D = C // heads
    out = torch.empty_like(x)
    for b in range(B):
        for w in range(W):
            qkv = module.qkv(x[b, w]) + module.qkv_temb(cond[b])
            q, k, v = qkv.split(C, dim=-1)
            for h in range(heads):
                part = slice(h * D, (h + 1) * D)
                for i in range(N):
                    logits = torch.empty(N, dtype=x.dtype)
                    for j in range(N):
                        rows, columns = i // side - j // side, i % side - j % side
                        offset = (rows + side - 1) * (2 * side - 1) + columns + side - 1
                        bias = module.relative_position_bias_table[offset, h]
                        logits[j] = q[i, part] @ k[j, part] / math.sqrt(D) + bias
                    out[b, w, i, part] = logits.softmax(0) @ v[:, part]
    return module.proj(out)


@pytest.mark.parametrize(("windows", "side", "cond_dim"), [(1, 3, None), (4, 2, 10)])
@torch.no_grad()
def test_equations(windows, side, cond_dim):
    torch.manual_seed(0)
    module = TMSA(12, num_heads=3, window_size=side, cond_dim=cond_dim)
    torch.nn.init.normal_(module.relative_position_bias_table)
    x, cond = torch.randn(2, windows, side * side, 12), torch.randn(2, cond_dim or 12)
    torch.testing.assert_close(module(x, cond), naive_tmsa(module, x, cond), rtol=1e-5, atol=1e-5)


def test_bias_gradient_counts_the_pairs():
    """d sum(B) / d table[offset] is the number of pairs of positions with that offset."""
    side = 4
    table = torch.zeros((2 * side - 1) ** 2, 1, requires_grad=True)
    relative_position_bias(table, side).sum().backward()
    per_axis = side - torch.arange(-(side - 1), side).abs().float()
    torch.testing.assert_close(table.grad[:, 0], torch.outer(per_axis, per_axis).flatten())


@pytest.mark.parametrize(
    ("dtype", "tokens", "gradients", "products"),
    [
        (torch.bfloat16, 64, False, True),
        (torch.bfloat16, 65, False, False),
        (torch.bfloat16, 64, True, False),
        (torch.float32, 64, False, False),
        (torch.float32, 64, True, False),
    ],
)
def test_the_products_themselves_where_they_were_faster_on_a_cpu(monkeypatch, dtype, tokens, gradients, products):
    calls, matmul = [], attention.matmul_attention
    monkeypatch.setattr(attention, "matmul_attention", lambda *inputs: calls.append(1) or matmul(*inputs))
    q, k, v = torch.randn(3, 1, 2, tokens, 4).to(dtype)
    bias = torch.randn(1, 2, tokens, tokens).to(dtype)
    with torch.set_grad_enabled(gradients):
        out = fastest_attention(q, k, v, bias)
    assert len(calls) == products
    torch.testing.assert_close(out, matmul(q, k, v, bias), rtol=0.05, atol=0.05)
