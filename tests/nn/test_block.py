"""DiT's adaLN block beside TMSA's: the identity at first, and then the equations of adaLN-Zero."""

import pytest
import torch

from diffit import create_model
from diffit.models.config import model_config
from diffit.nn.block import BLOCKS, AdaLNBlock
from diffit.training.parallel import apply_activation_checkpointing, blocks
from tests.small_models import count_parameters, random_network

NAMES = ("Diffit-Fashion", "ImageDiffit-Tiny")


def random_adaln():
    torch.manual_seed(0)
    block = AdaLNBlock(12, num_heads=3, window_size=2, cond_dim=10).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block, torch.randn(2, 4, 4, 12), torch.randn(2, 10)


@torch.no_grad()
def test_it_modulates_and_gates():
    """Against the formula written out, sample by sample."""
    block, x, cond = random_adaln()
    norm = torch.nn.LayerNorm(12, eps=1e-6, elementwise_affine=False)
    for number in range(2):
        layer = block.modulation[1]
        six = layer.weight @ torch.nn.functional.silu(cond[number]) + layer.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = six.split(12)
        h = x[number : number + 1]
        h = h + gate1 * block.attend(norm(h) * (1 + scale1) + shift1)
        h = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
        torch.testing.assert_close(block(x, cond)[number], h[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_closed_gates_make_it_the_identity():
    block, x, cond = random_adaln()
    assert not torch.equal(block(x, cond), x)
    block.zero_gates()
    assert torch.equal(block(x, cond), x)


@pytest.mark.parametrize("name", NAMES)
def test_networks_begin_with_closed_gates(name):
    model = create_model(name, conditioning="adaln")
    found = [module for module in model.modules() if isinstance(module, AdaLNBlock)]
    assert len(found) > 1
    assert all(not parameter.any() for block in found for parameter in block.modulation.parameters())
    assert count_parameters(model) > count_parameters(create_model(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("conditioning", BLOCKS)
def test_time_reaches_the_output_and_gradients_all_parameters(name, conditioning):
    config = model_config(name, conditioning=conditioning)
    model = random_network(config)
    x = torch.randn(1, config.in_channels, config.input_size, config.input_size).expand(2, -1, -1, -1)
    y = torch.zeros(2, dtype=torch.int64)
    out = model(x, torch.tensor([0.3, 1.7]), y)
    assert (out[0] - out[1]).abs().max() > 1e-4
    if name == "ImageDiffit-Tiny":
        out = model(x, torch.tensor([0.3, 1.7]), y, augment_labels=torch.ones(2, 9))
    out.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_recomputes_every_adaln_block(name):
    config = model_config(name, conditioning="adaln")
    model, again = random_network(config), random_network(config)
    apply_activation_checkpointing(again)
    inside = [module for block in blocks(again) for module in block.modules() if isinstance(module, AdaLNBlock)]
    assert len(inside) == sum(isinstance(module, AdaLNBlock) for module in again.modules())
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    for each in (model, again):
        each(x, torch.tensor([0.1, 0.2]), torch.tensor([0, 0])).square().sum().backward()
    for (key, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert not one.requires_grad or torch.equal(one.grad, two.grad), key


def test_an_unknown_conditioning_is_refused():
    with pytest.raises(ValueError, match="unknown conditioning 'film': choose tmsa or adaln"):
        create_model("Diffit-Fashion", conditioning="film")
