"""Windows: the round trip, the order of pixels, and the windowed attention against the latent form of it."""

import pytest
import torch

from diffit.nn.attention import TMSA
from diffit.nn.window import from_windows, to_windows


@pytest.mark.parametrize(("height", "width", "side"), [(8, 8, 4), (6, 12, 3), (5, 5, 5), (4, 6, 1)])
def test_round_trip(height, width, side):
    x = torch.randn(2, 3, height, width)
    assert torch.equal(from_windows(to_windows(x, side), height, width), x)


def test_windows_are_crops():
    x = torch.randn(2, 5, 6, 9)
    windows = to_windows(x, 3)
    for i in range(2):
        for j in range(3):
            crop = x[:, :, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            assert torch.equal(windows[:, 3 * i + j], crop.flatten(2).mT)


def test_unfitting_windows_are_refused():
    with pytest.raises(ValueError, match="6x8 cannot be cut into windows of 4x4"):
        to_windows(torch.zeros(1, 2, 6, 8), 4)


@torch.no_grad()
def test_windowed_attention_is_latent_attention_of_each_window():
    """The latent model attends over one window, its grid: the same module, given each window alone, must agree."""
    torch.manual_seed(0)
    module = TMSA(12, num_heads=3, window_size=4, cond_dim=10)
    torch.nn.init.normal_(module.relative_position_bias_table)
    x, cond = torch.randn(2, 12, 8, 12), torch.randn(2, 10)
    together = from_windows(module(to_windows(x, 4), cond), 8, 12)
    for top in (0, 4):
        for left in (0, 4, 8):
            grid = x[:, :, top : top + 4, left : left + 4].flatten(2).mT  # tokens of the crop: [B, N, C]
            alone = module(grid[:, None], cond)[:, 0].mT.unflatten(2, (4, 4))
            torch.testing.assert_close(together[:, :, top : top + 4, left : left + 4], alone)
