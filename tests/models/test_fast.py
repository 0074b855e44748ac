"""Networks made ready for sampling against themselves before, and against golden numbers."""

import copy

import pytest
import torch

from diffit import create_model, load_model
from diffit.benchmark import copy_of
from diffit.models.config import model_config
from diffit.models.fast import (
    FastConv,
    FastLinear,
    FastTMSA,
    compiled,
    fast_precision,
    prepare_for_sampling,
)
from diffit.nn import attention
from diffit.nn.attention import TMSA, fastest_attention, matmul_attention
from diffit.nn.block import DiffiTBlock
from diffit.system.device import autocast, product_dtype, set_matmul_precision
from tests.golden_models import NAMES, golden_network, golden_tensors, relative_error
from tests.nn.test_attention import naive_tmsa
from tests.small_models import random_network

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_block(side: int = 3) -> DiffiTBlock:
    """A block whose every parameter matters, biases included."""
    torch.manual_seed(0)
    block = DiffiTBlock(16, num_heads=2, window_size=side, cond_dim=10).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_latent_prediction(golden_latent, name):
    """The reference implementation's output."""
    model = golden_network(golden_latent, name)
    x, t, y, out = golden_tensors(golden_latent, name, "x", "t", "y", "out")
    assert relative_error(prepare_for_sampling(model)(x, t, y), out) < 1e-5


@pytest.mark.parametrize("num_classes", [0, 3])
@torch.no_grad()
def test_image_prediction(num_classes):
    model = random_network(model_config("ImageDiffit-Tiny", num_classes=num_classes))
    t, x, y = torch.tensor([-1.5, 0.25, 1.0]), torch.randn(3, 3, 32, 32), torch.tensor([num_classes, 0, num_classes])
    expected = model(x, t, y)
    torch.testing.assert_close(prepare_for_sampling(model)(x, t, y), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unconditional_image_prediction_without_labels():
    model = random_network(model_config("ImageDiffit-Tiny"))
    x, c_noise = torch.randn(2, 3, 32, 32), torch.tensor([0.5, 0.5])
    expected = model(x, c_noise)
    torch.testing.assert_close(prepare_for_sampling(model)(x, c_noise), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_all_of_a_trunk_is_cast():
    model = prepare_for_sampling(random_network(model_config("ImageDiffit-Tiny")), torch.bfloat16)
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


@pytest.mark.skipif(fast_precision(CPU) != "bf16", reason="this processor does not multiply bf16: --fast stays in fp32")
@torch.no_grad()
def test_16_bit_weights_cost_less_than_autocast():
    """Of the bundled model: RMS and largest error of the prediction, over times and noises."""
    model, _ = load_model("Diffit-Fashion")
    model.requires_grad_(False)
    baseline = copy_of(model, matmul_attention)
    variants = {
        "autocast": autocast(model, CPU, "bf16"),
        "fast": prepare_for_sampling(copy_of(model), torch.bfloat16),
    }
    errors: dict[str, list[torch.Tensor]] = {name: [] for name in variants}
    y = torch.arange(16) % 11
    for time in (999, 700, 400, 100):
        x, t = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(time)), torch.full((16,), time)
        exact = baseline(x, t, y)
        for name, call in variants.items():
            errors[name].append(call(x, t, y).float() - exact)
    rms = {name: torch.stack(found).square().mean().sqrt() for name, found in errors.items()}
    largest = {name: torch.stack([e.abs().max() for e in found]).mean() for name, found in errors.items()}
    assert 0 < rms["fast"] < rms["autocast"]
    assert largest["fast"] < largest["autocast"]


@torch.no_grad()
def test_a_copy_keeps_its_own_parts():
    """Casting and replacing the layers of one leaves the other bit for bit the same."""
    model = random_network()
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 3]), torch.tensor([0, 3])
    before, state = model(x, t, y), copy.deepcopy(model.state_dict())
    other = copy_of(model)
    assert other.final_layer.linear.weight.data_ptr() == model.final_layer.linear.weight.data_ptr()
    prepare_for_sampling(other, torch.bfloat16)(x, t, y)
    assert torch.equal(model(x, t, y), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("function", [fastest_attention, matmul_attention])
@torch.no_grad()
def test_attention_functions_compute_the_equations(function):
    attn: TMSA = random_block().attn
    x, cond = torch.randn(2, 4, 9, 16), torch.randn(2, 10)
    expected = naive_tmsa(attn, x, cond)
    attn.attention = function
    torch.testing.assert_close(attn(x, cond), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(FastTMSA(attn, torch.float32)(x, cond), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "precision", "tokens", "products"),
    [
        ("cpu", "bf16", 64, True),
        ("cpu", "bf16", 65, False),
        ("cpu", "fp32", 64, False),
        pytest.param("cuda", "tf32", 1024, True, marks=needs_gpu),
        pytest.param("cuda", "tf32", 1023, False, marks=needs_gpu),
        pytest.param("cuda", "fp32", 1024, False, marks=needs_gpu),
        pytest.param("cuda", "bf16", 1024, False, marks=needs_gpu),
    ],
)
def test_attention_is_chosen_by_device_precision_and_tokens(device, precision, tokens, products, monkeypatch):
    """And is fused wherever gradients are."""
    set_matmul_precision(precision)
    dtype = product_dtype(precision)
    q, k, v = (torch.randn(1, 1, tokens, 8, device=device, dtype=dtype) for _ in range(3))
    bias, calls = torch.randn(1, 1, tokens, tokens, device=device, dtype=dtype), []
    monkeypatch.setattr(attention, "matmul_attention", lambda *args: calls.append(1) or matmul_attention(*args))
    for gradients, expected in ((True, False), (False, products)):
        with torch.set_grad_enabled(gradients):
            fastest_attention(q, k, v, bias)
        assert bool(calls) == expected
    set_matmul_precision("fp32")


def test_a_copy_computes_every_attention_as_it_is_named():
    model = random_network()
    copied = copy_of(model, matmul_attention)
    assert [block.attn.attention for block in copied.blocks] == [matmul_attention] * len(model.blocks)
    prepared = prepare_for_sampling(copied)
    assert [block.attn.attention for block in prepared.blocks] == [matmul_attention] * len(model.blocks)
    assert model.blocks[0].attn.attention is fastest_attention


@pytest.mark.parametrize("scale", [1, 30])
@torch.no_grad()
def test_large_time_terms(scale):
    """What time adds to keys and values is left out, and added after the projection: Eq. 6 stays what it is."""
    attn: TMSA = random_block().attn
    for parameter in attn.qkv_temb.parameters():
        parameter.mul_(scale)
    x, cond = torch.randn(2, 4, 9, 16, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    exact = naive_tmsa(copy.deepcopy(attn).double(), x, cond).float()
    plain, fast = attn(x.float(), cond.float()), FastTMSA(attn, torch.float32)(x.float(), cond.float())
    assert relative_error(fast, exact) < 1e-5
    assert relative_error(fast, exact) < 2 * relative_error(plain, exact)


@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_layers_of_the_mlp(packed):
    mlp, x = random_block().mlp, torch.randn(2, 4, 9, 16)
    fc1 = FastLinear(mlp.fc1.weight, mlp.fc1.bias, torch.float32, gelu=True)
    fc2 = FastLinear(mlp.fc2.weight, mlp.fc2.bias, torch.float32)
    for layer in (fc1, fc2):
        layer.packed = layer.packed if packed else None
    torch.testing.assert_close(fc2(fc1(x)), mlp(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_16_bits_come_out_where_32_go_in():
    block = random_block()
    x, cond = torch.randn(2, 1, 9, 16), torch.randn(2, 10)
    attended, transformed = block.attn(x, cond), block.mlp(x)
    for fast, expected in (
        (FastTMSA(block.attn, torch.bfloat16)(x, cond), attended),
        (
            FastLinear(block.mlp.fc2.weight, block.mlp.fc2.bias, torch.bfloat16)(block.mlp.act(block.mlp.fc1(x))),
            transformed,
        ),
    ):
        assert fast.dtype == torch.bfloat16
        assert 0 < (fast - expected).norm() / expected.norm() < 0.02


class DoubledBlock(DiffiTBlock):
    """A user's block, which computes something else than its parent."""

    def forward(self, x, cond):
        return 2 * super().forward(x, cond)


class DoubledTMSA(TMSA):
    """A user's attention."""

    def forward(self, x, cond):
        return 2 * super().forward(x, cond)


@pytest.mark.parametrize("name", ["Diffit-Fashion", "ImageDiffit-Tiny"])
@pytest.mark.parametrize("what", ["block", "attention", "network", "adaln"])
def test_what_is_not_known_is_refused_and_left_alone(name, what):
    model = create_model(name, conditioning="adaln" if what == "adaln" else "tmsa")
    blocks = [module for module in model.modules() if isinstance(module, DiffiTBlock)]
    if what == "block":
        blocks[-1].__class__ = DoubledBlock
    elif what == "attention":
        blocks[-1].attn.__class__ = DoubledTMSA
    elif what == "network":
        model.__class__ = type("Mine", (type(model),), {})
    named = {"block": "DoubledBlock", "attention": "DoubledTMSA", "network": "Mine", "adaln": "AdaLNBlock"}[what]
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"--fast does not know how to compute a {named}: leave --fast out"):
        prepare_for_sampling(model)
    assert [type(module) for module in model.modules()] == before


@needs_gpu
@torch.no_grad()
def test_gelu_in_the_product_on_a_gpu():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(64, 128).cuda(), torch.randn(3, 5, 64, device="cuda")
    expected = torch.nn.functional.gelu(layer(x), approximate="tanh")
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 1e-2)):
        found = FastLinear(layer.weight, layer.bias, dtype, gelu=True)(x)
        assert found.shape == expected.shape
        assert 0 < relative_error(found.float().cpu(), expected.cpu()) < tolerance


@needs_gpu
@torch.no_grad()
def test_full_width_on_a_gpu():
    """Two blocks of the network at 256 pixels: compiled in TF32, and in 16 bits no further off than autocast is."""
    device = torch.device("cuda")
    model = random_network(model_config("Diffit", depth=2)).to(device)
    for name, parameter in model.named_parameters():
        parameter.mul_(1 if "qkv_temb" in name else 0.2)  # time counts for more than the tokens
    x, t, y = torch.randn(4, 4, 32, 32, device=device), torch.tensor([999, 500, 20, 0], device=device), torch.arange(4)
    set_matmul_precision("fp32")
    exact = model(x, t, y.to(device))
    set_matmul_precision("tf32")
    variants = {
        "compiled": compiled(copy_of(model)),
        "autocast": autocast(model, device, "bf16"),
        "fast": compiled(prepare_for_sampling(copy_of(model), torch.bfloat16)),
    }
    errors = {name: relative_error(call(x, t, y.to(device)).float(), exact) for name, call in variants.items()}
    set_matmul_precision("fp32")
    assert 0 < errors["compiled"] < 3e-3
    assert 0 < errors["fast"] < min(1.2 * errors["autocast"], 3e-2), errors
