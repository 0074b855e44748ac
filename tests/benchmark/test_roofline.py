"""Counted work against sums by hand."""

import pytest
import torch

from diffit.benchmark.roofline import count_work, measure_device, products_alone
from diffit.models.config import DiffiTConfig, model_config
from diffit.models.fast import fix_weights
from tests.small_models import NETWORK, random_network


@pytest.mark.parametrize(("side", "gmac"), [(32, 118.4), (64, 524.3)])
def test_operations_of_the_published_models(side, gmac):
    """Patches, blocks, head: 118.4 and 524.3 GMAC an image, and 0.1 for the conditioning token."""
    work = count_work(model_config("Diffit", input_size=side), 1)
    assert work.flops / 2e9 == pytest.approx(gmac + 0.11, abs=0.05)


def test_values_moved():
    """Of a network of one block: each product's input, weights, bias and output, and attention's five operands."""
    C, N, H, batch = 8, 4, 2, 3
    network = DiffiTConfig(input_size=4, patch_size=2, hidden_size=C, depth=1, num_heads=H, num_classes=1)

    def linear(rows, inputs, outputs):
        return rows * (inputs + outputs) + inputs * outputs + outputs

    tokens = batch * N
    expected = batch * 4 * 16 + tokens * C + C * 16 + C  # patches
    expected += linear(batch, 256, C) + linear(batch, C, C)  # time
    expected += linear(tokens, C, 3 * C) + linear(batch, C, 3 * C) + linear(tokens, C, C)
    expected += 4 * tokens * C + 9 * H  # attention
    expected += linear(tokens, C, 4 * C) + linear(tokens, 4 * C, C) + linear(tokens, C, 32)
    assert count_work(network, batch).values == expected


@torch.no_grad()
def test_products_alone_are_those_of_the_network():
    """As many operations as are counted in the forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    model = fix_weights(random_network(), kernel="matmul")
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 3])
    products = products_alone(model, inputs)
    with FlopCounterMode(display=False) as alone:
        products()
    assert alone.get_total_flops() == count_work(NETWORK, 2).flops


def test_a_device_is_measured():
    found = measure_device(torch.device("cpu"), torch.float32)
    assert found.flops > 1e9
    assert found.bandwidth > 1e8
