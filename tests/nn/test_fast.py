"""The parts that sampling uses against the plain ones."""

import pytest
import torch

from diffit.nn.attention import TMSA
from diffit.nn.block import DiffiTBlock
from diffit.nn.fast import KERNELS, FastLinear, FastTMSA, flex_attention, matmul_attention, without_keys
from tests.nn.test_attention import naive_tmsa


def random_block(side: int = 3) -> DiffiTBlock:
    """A block whose every parameter matters, biases included."""
    torch.manual_seed(0)
    block = DiffiTBlock(16, num_heads=2, window_size=side, cond_dim=10).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_kernels_compute_the_equations(kernel):
    attn: TMSA = random_block().attn
    x, cond = torch.randn(2, 4, 9, 16), torch.randn(2, 10)
    expected = naive_tmsa(attn, x, cond)
    torch.testing.assert_close(FastTMSA(attn, kernel, torch.float32)(x, cond), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_reads_the_table_as_the_spread_bias_has_it():
    """A bias that dominates: each query must find the one key that its table row names."""
    table = torch.zeros(25, 1)  # windows of 3 x 3
    table[2 * 5 + 1] = 50.0  # the same row, one column to the left of the key: offset (0, -1)
    q = torch.zeros(1, 1, 9, 4)
    v = torch.eye(9)[None, None]
    found = flex_attention(q, q, v, table)[0, 0].argmax(dim=1)
    assert [int(found[i]) for i in (0, 1, 3, 4, 6, 7)] == [1, 2, 4, 5, 7, 8]


@torch.no_grad()
def test_what_all_keys_share_cancels():
    q, k, v = torch.randn(3, 2, 2, 6, 4).unbind()
    bias = torch.randn(1, 2, 6, 6)
    moved = matmul_attention(q, k + 3 * torch.randn(2, 2, 1, 4), v, bias)
    torch.testing.assert_close(moved, matmul_attention(q, k, v, bias), rtol=1e-4, atol=1e-5)
    assert without_keys(torch.ones(6, 2)).tolist() == [[1, 1]] * 2 + [[0, 0]] * 2 + [[1, 1]] * 2


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_layers_of_the_mlp(packed):
    mlp, x = random_block().mlp, torch.randn(2, 4, 9, 16)
    fc1, fc2 = FastLinear(mlp.fc1, torch.float32, gelu=True), FastLinear(mlp.fc2, torch.float32)
    for layer in (fc1, fc2):
        layer.packed = layer.packed if packed else None
    torch.testing.assert_close(fc2(fc1(x)), mlp(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_16_bits_come_out_where_32_go_in():
    block = random_block()
    x, cond = torch.randn(2, 1, 9, 16), torch.randn(2, 10)
    attended, transformed = block.attn(x, cond), block.mlp(x)
    for fast, expected in (
        (FastTMSA(block.attn, "fused", torch.bfloat16)(x, cond), attended),
        (FastLinear(block.mlp.fc2, torch.bfloat16)(block.mlp.act(block.mlp.fc1(x))), transformed),
    ):
        assert fast.dtype == torch.bfloat16
        assert 0 < (fast - expected).norm() / expected.norm() < 0.02
