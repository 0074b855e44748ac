"""Attention maps: the weights of Eq. 6, where they belong in the picture, from networks that stay what they were."""

import math

import numpy as np
import pytest
import torch

from diffit.models.config import model_config
from diffit.sampling.attention import average, watch
from tests.small_models import NETWORK, random_network


@torch.no_grad()
def test_the_row_of_a_token():
    """Token (1, 2) of 4 x 4, against Eq. 3-6 by hand on what the first block was given."""
    model = random_network(NETWORK)
    given = []
    model.blocks[0].attn.register_forward_pre_hook(lambda module, inputs: given.append(inputs))
    x, t, y = torch.randn(4, 4, 8, 8), torch.full((4,), 7.0), torch.tensor([0, 1, 3, 3])
    expected = model(x, t, y)
    with watch(model, (0.25, 0.5)) as maps:
        torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=0)
    assert list(maps) == ["block 0", "block 1"]
    seen = maps["block 0"]
    model(x + 1, t, y)  # watched no more
    assert maps["block 0"] is seen
    attn = model.blocks[0].attn
    tokens, cond = given[0]
    q, k, _ = (attn.qkv(tokens) + attn.qkv_temb(cond)[:, None, None])[:, 0].view(4, 16, 3, 4, 8).unbind(2)
    scores = torch.einsum("bhd,bnhd->bhn", q[:, 6], k) / math.sqrt(8) + attn.position_bias()[0, :, 6]
    by_hand = 16 * scores.softmax(-1).mean(1).unflatten(-1, (4, 4))
    np.testing.assert_allclose(seen, by_hand.numpy(), rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"conditioning": "adaln"}, {"encoder": "plain", "decoder": "plain"}])
@torch.no_grad()
def test_windows(settings):
    """Of networks with and without time in their attention: all weights are in the token's window, and sum to 1."""
    model = random_network(model_config("ImageDiffit-Tiny", **settings))
    with watch(model, (0.5, 0.3)) as maps:
        model(torch.randn(1, 3, 32, 32), torch.tensor([0.3]))
    assert len(maps) == 3
    for seen in maps.values():
        side = seen.shape[-1]
        inside = np.zeros((side, side), bool)
        top, left = (int(part * side) // 4 * 4 for part in (0.5, 0.3))
        inside[top : top + 4, left : left + 4] = True
        np.testing.assert_array_equal(~np.isnan(seen[0]), inside)
        assert np.nanmean(seen) == pytest.approx(1, rel=1e-5)


def test_average_over_sides():
    coarse, fine = np.array([[[1.0, np.nan], [3.0, np.nan]]]), np.full((1, 4, 4), np.nan)
    fine[0, :2, :2] = 2
    expected = np.full((1, 4, 4), np.nan)
    expected[0, :2, :2], expected[0, 2:, :2] = 1.5, 3
    np.testing.assert_array_equal(average([coarse, fine]), expected)
