"""The variants of a block beside TMSA's: their equations, what time and gradients reach, what handles them."""

import math

import pytest
import torch
import torch.distributed as dist

from diffit import create_model
from diffit.benchmark import copy_of
from diffit.models.config import model_config
from diffit.models.fast import prepare_for_sampling
from diffit.nn.attention import TMSA
from diffit.nn.variants import (
    BLOCKS,
    AdaLNBlock,
    SeparateAttention,
    TimeBiasAttention,
    TimeMLPBlock,
    block_class,
)
from diffit.system.distributed import World
from diffit.training.parallel import apply_activation_checkpointing, blocks, shard
from tests.small_models import count_parameters, random_network

NAMES = ("Diffit-Fashion", "ImageDiffit-Tiny")
# Of every variant, the layers that read the conditioning token.
TIME_LAYERS = {
    "tmsa": "attn.qkv_temb",
    "separate": "attn.value_temb",
    "bias": "attn.bias_temb",
    "mlp": "hidden_temb",
    "adaln": "modulation.1",
}
# What the networks are made of beside the conditioning: settings of Tables 4 and 8.
SETTINGS = [
    *({"conditioning": kind} for kind in BLOCKS),
    {"time_embedding": "fourier"},
    {"encoder": "plain", "decoder": "plain"},
    {"decoder": "plain"},
]
CASES = [(name, s) for name in NAMES for s in SETTINGS if name == "ImageDiffit-Tiny" or "decoder" not in s]
IDS = [f"{name}-{'-'.join(settings.values())}" for name, settings in CASES]


def random_block(conditioning: str):
    """A block whose every parameter matters, tokens [2, 4, 4, 12] and conditioning tokens [2, 10]."""
    torch.manual_seed(0)
    block = block_class(conditioning)(12, 3, 2, 4.0, 10).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block, torch.randn(2, 4, 4, 12), torch.randn(2, 10)


def network_inputs(config, count: int = 2):
    """The same image under different times, all with the null class."""
    x = torch.randn(1, config.in_channels, config.input_size, config.input_size).expand(count, -1, -1, -1)
    t = torch.linspace(0.3, 1.7, count) if hasattr(config, "channels") else torch.linspace(100, 900, count)
    return x, t, torch.full((count,), config.num_classes)


@torch.no_grad()
def test_separate_attention_is_two_attentions():
    """The second, over the time token alone, is written out with its softmax, whose weights are all 1."""
    block, x, cond = random_block("separate")
    attn: SeparateAttention = block.attn
    time_key, time_value = torch.randn(2, 1, 1, 12), attn.value_temb(cond)[:, None, None]
    q, k, v = (part.view(2, 4, 4, 3, 4).transpose(2, 3) for part in attn.qkv(x).split(12, -1))  # [B, W, H, N, D]
    spatial = (q @ k.mT / math.sqrt(4) + attn.position_bias()).softmax(-1) @ v
    heads = time_key.view(2, 1, 3, 1, 4), time_value.view(2, 1, 3, 1, 4)
    temporal = (q @ heads[0].mT / math.sqrt(4)).softmax(-1) @ heads[1]
    expected = attn.proj((spatial + temporal).transpose(2, 3).flatten(3))
    torch.testing.assert_close(attn(x, cond), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_separate_attention_is_tmsa_without_time_in_its_queries():
    block, x, cond = random_block("tmsa")
    separate = SeparateAttention(12, 3, 2, 10)
    mixed: TMSA = block.attn
    state = mixed.state_dict()
    separate.load_state_dict(
        {key: state[key] for key in separate.state_dict() if key in state}
        | {f"value_temb.{key}": state[f"qkv_temb.{key}"][24:] for key in ("weight", "bias")}
    )
    assert not torch.allclose(mixed(x, cond), separate(x, cond), atol=1e-2)
    mixed.qkv_temb.weight[:12] = 0
    mixed.qkv_temb.bias[:12] = 0
    torch.testing.assert_close(mixed(x, cond), separate(x, cond), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_time_in_the_position_bias_makes_a_table_for_every_image():
    """Image by image, the attention without condition whose table is that of its time."""
    block, x, cond = random_block("bias")
    attn: TimeBiasAttention = block.attn
    plain = block_class("adaln")(12, 3, 2, 4.0, 10).attn
    state = {key: value for key, value in attn.state_dict().items() if not key.startswith("bias_temb")}
    for number in range(2):
        table = attn.relative_position_bias_table + attn.bias_temb(cond[number]).view(9, 3)
        plain.load_state_dict(state | {"relative_position_bias_table": table})
        one = slice(number, number + 1)
        torch.testing.assert_close(attn(x, cond)[one], plain(x[one], cond[one]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_hidden_layer_projects_both_tokens():
    """As one layer of the two tokens side by side."""
    block, x, cond = random_block("mlp")
    assert isinstance(block, TimeMLPBlock)
    attended = x + block.attn(block.norm1(x), cond)
    both = torch.cat([block.norm2(attended), cond[:, None, None].expand(-1, 4, 4, -1)], dim=-1)
    weight = torch.cat([block.mlp.fc1.weight, block.hidden_temb.weight], dim=1)
    hidden = torch.nn.functional.linear(both, weight, block.mlp.fc1.bias + block.hidden_temb.bias)
    expected = attended + block.mlp.fc2(torch.nn.functional.gelu(hidden, approximate="tanh"))
    torch.testing.assert_close(block(x, cond), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_adaln_modulates_and_gates():
    """Against the formula written out, sample by sample."""
    block, x, cond = random_block("adaln")
    norm = torch.nn.LayerNorm(12, eps=1e-6, elementwise_affine=False)
    for number in range(2):
        layer = block.modulation[1]
        six = layer.weight @ torch.nn.functional.silu(cond[number]) + layer.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = six.split(12)
        h = x[number : number + 1]
        h = h + gate1 * block.attn(norm(h) * (1 + scale1) + shift1, cond)
        h = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
        torch.testing.assert_close(block(x, cond)[number], h[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_closed_gates_make_it_the_identity():
    block, x, cond = random_block("adaln")
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


@pytest.mark.parametrize("conditioning", BLOCKS)
@torch.no_grad()
def test_time_enters_by_its_layer_alone(conditioning):
    """Without its weights, the output is that of the same block without a condition, and the same at all times."""
    block, x, cond = random_block(conditioning)
    assert not torch.allclose(block(x, cond), block(x, cond.flip(0)), atol=1e-3)
    layer = block.get_submodule(TIME_LAYERS[conditioning])
    assert layer.in_features == 10
    for parameter in layer.parameters():
        parameter.zero_()
    assert torch.equal(block(x, cond), block(x, cond.flip(0)))
    if conditioning != "adaln":  # whose gates are then closed
        attn = block.attn
        h = x + attn.proj(attn.attend(attn.qkv(block.norm1(x)), attn.position_bias()))
        torch.testing.assert_close(block(x, cond), h + block.mlp(block.norm2(h)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_time_reaches_the_output_and_gradients_all_parameters(name, settings):
    config = model_config(name, **settings)
    model = random_network(config)
    x, t, y = network_inputs(config)
    out = model(x, t, y)
    assert out.shape[2:] == x.shape[2:]
    assert (out[0] - out[1]).abs().max() > 1e-4
    if name == "ImageDiffit-Tiny":
        out = model(x, t, y, augment_labels=torch.ones(2, 9))
    out.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
def test_checkpointing_recomputes_every_block(name, settings):
    config = model_config(name, **settings)
    model, again = random_network(config), random_network(config)
    apply_activation_checkpointing(again)
    inside = {id(module) for block in blocks(again) for module in block.modules()}
    attentions = [module for module in again.modules() if hasattr(module, "relative_position_bias_table")]
    assert len(attentions) == len(blocks(again))
    assert all(id(module) in inside for module in attentions)
    inputs = network_inputs(config)
    for each in (model, again):
        each(*inputs).square().sum().backward()
    for (key, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert not one.requires_grad or torch.equal(one.grad, two.grad), key


@pytest.mark.parametrize(("name", "settings"), CASES, ids=IDS)
@torch.no_grad()
def test_the_fast_path_computes_the_same_or_refuses(name, settings):
    model = random_network(model_config(name, **settings))
    x, t, y = network_inputs(model_config(name, **settings))
    expected = model(x, t, y)
    named = {
        "separate": "SeparateAttention",
        "bias": "TimeBiasAttention",
        "mlp": "TimeMLPBlock",
        "adaln": "AdaLNBlock",
    }.get(settings.get("conditioning", ""), "PlainBlock" if "decoder" in settings else None)
    if named is None:
        result = prepare_for_sampling(copy_of(model))(x, t, y)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ValueError, match=f"--fast does not know how to compute a {named}: leave --fast out"):
            prepare_for_sampling(model)
        assert torch.equal(model(x, t, y), expected)


def test_the_layers_of_time_are_all_that_differs():
    """Parameters, counted by hand for C channels, E of the condition, w = 4 and two heads."""
    C, E, heads = 16, 32, 2
    own = {"tmsa": 3 * C, "separate": C, "bias": 7 * 7 * heads, "mlp": 4 * C, "adaln": 6 * C}
    plain = count_parameters(block_class("tmsa")(C, heads, 4, cond_dim=E)) - 3 * C * (E + 1)
    counts = {kind: count_parameters(block_class(kind)(C, heads, 4, cond_dim=E)) for kind in BLOCKS}
    assert counts == {kind: plain + outputs * (E + 1) for kind, outputs in own.items()}


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="'film': choose tmsa or separate or bias or mlp or adaln"):
        create_model("Diffit-Fashion", conditioning="film")
    with pytest.raises(ValueError, match="unknown time embedding 'learned': choose positional or fourier"):
        create_model("ImageDiffit-Tiny", time_embedding="learned")
    with pytest.raises(ValueError, match="unknown decoder 'unet': choose diffit or plain"):
        create_model("ImageDiffit-Tiny", decoder="unet")
    with pytest.raises(ValueError, match="plain stages have no conditioning 'adaln' in their blocks"):
        create_model("ImageDiffit-Tiny", encoder="plain", decoder="plain", conditioning="adaln")


def shard_all(rank: int, store: str) -> None:
    """On each of two ranks: every network, sharded, predicts what it does whole, and all its parameters learn."""
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    for name, settings in CASES:
        config = model_config(name, **settings)
        whole, sharded = random_network(config), random_network(config)
        shard(sharded, World(rank, 2), torch.device("cpu"))
        torch.manual_seed(1)
        inputs = network_inputs(config)
        out = sharded(*inputs)
        torch.testing.assert_close(out, whole(*inputs), rtol=1e-5, atol=1e-5)
        out.square().sum().backward()
        assert all(p.grad is not None for p in sharded.parameters() if p.requires_grad)
    dist.destroy_process_group()


@pytest.mark.slow
def test_fsdp_computes_the_same(tmp_path):
    torch.multiprocessing.spawn(shard_all, (str(tmp_path / "store"),), nprocs=2)
