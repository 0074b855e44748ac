"""The networks as diffusers and PyTorch's tools take them: dtypes, checkpointing, export, tracing."""

import copy

import pytest
import torch

from diffit.components import as_component
from diffit.models.config import model_config
from diffit.nn.attention import WindowAttention, matmul_attention
from tests.small_models import NETWORK, random_network

NETWORKS = {
    "latent": NETWORK,
    "image": model_config("ImageDiffit-Tiny", num_classes=3),
    "fourier": model_config("ImageDiffit-Tiny", num_classes=3, time_embedding="fourier"),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    return as_component(random_network(NETWORKS[request.param]), NETWORKS[request.param])


def inputs(network, batch=2):
    torch.manual_seed(0)
    sizes = network.config
    x = torch.randn(batch, sizes.in_channels, sizes.input_size, sizes.input_size)
    return x, torch.linspace(0.5, 3, batch), torch.arange(batch) % 3


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.1), ("float64", 1e-5)])
def test_a_network_computes_in_the_dtype_of_its_weights(network, dtype, tolerance):
    x, t, y = inputs(network)
    expected = network(x, t, y)
    dtype = getattr(torch, dtype)
    out = copy.deepcopy(network).to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < tolerance * expected.abs().max()


def test_gradient_checkpointing_recomputes_each_block_and_changes_nothing(network):
    def gradients():
        network.zero_grad()
        network(*inputs(network)).square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    expected, calls = gradients(), []
    blocks = network.blocks_in_order()
    for block in blocks:
        inside = next(part for part in block.modules() if isinstance(part, torch.nn.Linear))
        inside.register_forward_pre_hook(lambda *_: calls.append(1))
    for switch, times in ((network.enable_gradient_checkpointing, 2), (network.disable_gradient_checkpointing, 1)):
        switch()
        assert network.is_gradient_checkpointing == (times == 2)
        calls.clear()
        assert all(torch.equal(one, two) for one, two in zip(gradients(), expected, strict=True))
        assert len(calls) == times * len(blocks)
    own: list[int] = []
    network.enable_gradient_checkpointing(lambda forward, *arguments: own.append(1) or forward(*arguments))
    gradients()
    assert len(own) == len(blocks)


@pytest.mark.filterwarnings("ignore")
def test_export_with_a_dynamic_batch_and_tracing(network):
    batch, example = torch.export.Dim("batch", min=1, max=64), inputs(network)
    program = torch.export.export(network, example, dynamic_shapes=3 * ({0: batch},)).module()
    traced = torch.jit.trace(network, example)
    for count in (1, 5):
        for other in (program, traced):
            torch.testing.assert_close(other(*inputs(network, count)), network(*inputs(network, count)))


def test_forward_mode_differentiation_with_the_equations_as_written(network):
    """As mean flows are trained: d/dt of the network along (x, t), and the gradient of that."""
    for module in network.modules():
        if isinstance(module, WindowAttention):
            module.attention = matmul_attention
    network = network.double()
    x, t, y = inputs(network)
    x, t, step = x.double(), t.double(), 2e-4
    v, one = torch.randn_like(x), torch.ones_like(t)
    _, tangent = torch.func.jvp(lambda x, t: network(x, t, y), (x, t), (v, one))
    ahead, behind = (network(x + sign * step * v, t + sign * step, y) for sign in (1, -1))
    error = (tangent - (ahead - behind) / (2 * step)).abs().max()
    assert error < 0.01 * tangent.abs().max()  # the features of time are float32
    tangent.square().mean().backward()
    assert network.t_embedder.mlp[0].weight.grad.abs().max() > 0


def test_lora_is_trained_saved_loaded_and_merged(network, tmp_path):
    peft = pytest.importorskip("peft")
    start, again, names = network(*inputs(network)), copy.deepcopy(network), network.state_dict().keys()
    network.requires_grad_(False)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["qkv", "attn.proj", "qkv_temb"]))
    trained = [p for p in network.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 * len(network.blocks_in_order())
    optimizer = torch.optim.SGD(trained, 0.1)
    for _ in range(3):
        network(*inputs(network)).square().mean().backward()
        optimizer.step()
    out = network(*inputs(network))
    assert (out - start).abs().max() > 1e-3
    network.save_lora_adapter(tmp_path)
    again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(again(*inputs(again)), out)
    again.fuse_lora()
    again.unload_lora()
    assert again.state_dict().keys() == names
    torch.testing.assert_close(again(*inputs(again)), out)


def test_parts_come_before_words_of_the_config(network):
    assert all(isinstance(part, torch.nn.Module) for part in network.children())
    for name, value in network.config.items():
        if name in dict(network.named_children()):
            assert getattr(network, name) is network.get_submodule(name)
        elif not name.startswith("_") and name not in vars(network):
            with pytest.warns(FutureWarning):
                assert getattr(network, name) == value
