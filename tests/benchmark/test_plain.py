"""The benchmark's oracle against the equations."""

import torch

from diffit.benchmark.plain import PlainTMSA, with_plain_attention
from diffit.nn.attention import TMSA
from tests.nn.test_attention import naive_tmsa
from tests.small_models import random_network


@torch.no_grad()
def test_plain_attention():
    torch.manual_seed(0)
    module = with_plain_attention(torch.nn.Sequential(TMSA(12, num_heads=3, window_size=2, cond_dim=10)))[0]
    torch.nn.init.normal_(module.relative_position_bias_table)
    x, cond = torch.randn(2, 4, 4, 12), torch.randn(2, 10)
    torch.testing.assert_close(module(x, cond), naive_tmsa(module, x, cond), rtol=1e-5, atol=1e-5)


def test_every_attention_is_replaced():
    model = with_plain_attention(random_network())
    assert sum(type(module) is PlainTMSA for module in model.modules()) == len(model.blocks)
    assert not any(type(module) is TMSA for module in model.modules())
