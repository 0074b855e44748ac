"""Networks made ready for sampling against themselves before, and against golden numbers."""

import copy

import pytest
import torch

from diffit import load_model
from diffit.benchmark.plain import twin, with_plain_attention
from diffit.device import autocast
from diffit.models.config import model_config
from diffit.models.fast import FastConv, fix_weights, prepare_for_sampling, tabulate_conditions
from diffit.nn.fast import FastTMSA
from tests.golden_models import NAMES, golden_network, golden_tensors, relative_error
from tests.small_models import random_network

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_latent_prediction(golden_latent, name):
    """The reference implementation's output, at other times too than those asked for."""
    model = golden_network(golden_latent, name)
    x, t, y, out = golden_tensors(golden_latent, name, "x", "t", "y", "out")
    fast = prepare_for_sampling(model, [*range(0, 1000, 7), *t.tolist()])
    assert relative_error(fast(x, t, y), out) < 1e-5


@pytest.mark.parametrize("change", [prepare_for_sampling, tabulate_conditions])
@pytest.mark.parametrize("num_classes", [0, 3])
@torch.no_grad()
def test_image_prediction(change, num_classes):
    model = random_network(model_config("ImageDiffit-Tiny", num_classes=num_classes))
    times = [-1.5, 0.25, 1.0]
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([num_classes, 0, num_classes])
    expected = model(x, torch.tensor(times), y)
    torch.testing.assert_close(change(model, times)(x, torch.tensor(times), y), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_time_that_was_not_asked_for_does_not_pass_unnoticed():
    model = prepare_for_sampling(random_network(), [3, 500])
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([500, 499]), torch.tensor([0, 0]))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@torch.no_grad()
def test_unconditional_image_prediction_without_labels():
    model = random_network(model_config("ImageDiffit-Tiny"))
    x, c_noise = torch.randn(2, 3, 32, 32), torch.tensor([0.5, 0.5])
    expected = model(x, c_noise)
    torch.testing.assert_close(prepare_for_sampling(model, [0.5])(x, c_noise), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_of_a_trunk_is_cast():
    model = fix_weights(random_network(model_config("ImageDiffit-Tiny")), torch.bfloat16)
    exact = {id(p) for part in (model.tokenizer, model.head, model.t_embedder) for p in part.parameters()}
    convolutions = [module for module in model.modules() if isinstance(module, FastConv)]
    assert len(convolutions) == 6  # of three ResBlocks, of the last one's skip, one on the way down, one on the way up
    assert all(conv.conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    biases = [module.bias for module in model.modules() if isinstance(module, FastTMSA)]
    assert len(biases) == 3
    assert all(bias.is_contiguous() for bias in biases)  # fused attention takes no other
    kinds = {p.dtype for p in model.parameters() if id(p) in exact}
    assert kinds == {torch.float32}
    for block in (model.encoder[0][0].block, model.decoder[0][0].block):
        layers = (block.attn.qkv, block.attn.proj, block.fc1, block.fc2)
        assert {p.dtype for layer in layers for p in layer.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_16_bit_weights_cost_less_than_autocast():
    """Of the bundled model: RMS and largest error of the prediction, over times and noises."""
    model, _ = load_model("Diffit-Fashion")
    model.requires_grad_(False)
    plain = with_plain_attention(twin(model))
    ways = {
        "autocast": autocast(model, CPU, "bf16"),
        "fast": prepare_for_sampling(twin(model), range(1000), torch.bfloat16),
    }
    errors: dict[str, list[torch.Tensor]] = {name: [] for name in ways}
    y = torch.arange(16) % 11
    for time in (999, 700, 400, 100):
        x, t = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(time)), torch.full((16,), time)
        exact = plain(x, t, y)
        for name, way in ways.items():
            errors[name].append(way(x, t, y).float() - exact)
    rms = {name: torch.stack(found).square().mean().sqrt() for name, found in errors.items()}
    largest = {name: torch.stack([e.abs().max() for e in found]).mean() for name, found in errors.items()}
    assert 0 < rms["fast"] < rms["autocast"]
    assert largest["fast"] < largest["autocast"]


@torch.no_grad()
def test_a_twin_keeps_its_own_parts():
    """Casting and replacing the layers of one leaves the other bit for bit the same."""
    model = random_network()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 3])
    before, state = model(x, t, y), copy.deepcopy(model.state_dict())
    other = twin(model)
    assert other.final_layer.linear.weight.data_ptr() == model.final_layer.linear.weight.data_ptr()
    prepare_for_sampling(other, [3], torch.bfloat16)(x, t, y)
    assert torch.equal(model(x, t, y), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
