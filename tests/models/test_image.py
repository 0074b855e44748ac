"""The image-space network: its equations written out, its receptive field, its cost and its sizes."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffit import ImageDiffiT, create_model
from diffit.models.config import ZOO
from diffit.models.image import DiffiTResBlock
from diffit.nn.attention import TMSA
from diffit.nn.window import from_windows, to_windows
from tests.small_models import count_parameters

TINY = {"input_size": 16, "channels": (8, 16), "blocks": (1, 2), "window_size": 4, "head_dim": 4, "cond_dim": 12}


def random_model(**settings) -> ImageDiffiT:
    """A tiny network whose head is not zero."""
    torch.manual_seed(0)
    model = ImageDiffiT(**{**TINY, **settings})
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.eval()


def res_block(channels: int = 8, out_channels: int = 8) -> DiffiTResBlock:
    return DiffiTResBlock(channels, out_channels, 4, window_size=4, mlp_ratio=4.0, cond_dim=12, dropout=0.0)


@pytest.mark.parametrize("out_channels", [8, 12])
@torch.no_grad()
def test_res_block_equations(out_channels):
    """Eq. 9-10, with a 1x1 convolution as the skip only where the channels change; attention from the block itself."""
    torch.manual_seed(0)
    block = res_block(8, out_channels)
    x, cond = torch.randn(2, 8, 8, 8), torch.randn(2, 12)
    groups = x.view(2, 2, 4 * 64)
    deviation = (groups.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    normed = ((groups - groups.mean(2, keepdim=True)) / deviation).view_as(x)
    x_hat = F.conv2d(normed * normed.sigmoid(), block.conv.weight, block.conv.bias, padding=1)
    out = block(x, cond)
    if out_channels == 8:
        skip = x
    else:
        skip = torch.einsum("oc,bcij->boij", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None]
    for top in (0, 4):
        for left in (0, 4):
            crop = (..., slice(top, top + 4), slice(left, left + 4))
            tokens = x_hat[crop].flatten(2).mT[:, None]  # one window: [B, 1, N, C]
            window = block.block(tokens, cond)[:, 0].mT.unflatten(2, (4, 4))
            torch.testing.assert_close(out[crop], window + skip[crop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pixel", "windows"), [((5, 6), {(1, 1)}), ((4, 9), {(0, 2), (1, 2)}), ((8, 7), None)])
@torch.no_grad()
def test_receptive_field_of_a_res_block(pixel, windows):
    """One pixel reaches the windows that its 3x3 neighbourhood touches, and nothing else.

    Two channels of a group change places at that pixel, which leaves the group's mean and variance, over the whole
    image, as they are: any other change would reach everywhere through the GroupNorm.
    """
    torch.manual_seed(0)
    block = res_block().double()
    x, cond = torch.randn(1, 8, 16, 16, dtype=torch.float64), torch.randn(1, 12, dtype=torch.float64)
    i, j = pixel
    perturbed = x.clone()
    perturbed[0, [0, 1], i, j] = x[0, [1, 0], i, j]
    changed = (block(perturbed, cond) - block(x, cond)).abs().amax((0, 1)) > 1e-12
    if windows is None:  # a pixel whose neighbourhood touches four windows
        windows = {(1, 1), (1, 2), (2, 1), (2, 2)}
    expected = torch.zeros(16, 16, dtype=torch.bool)
    for row, column in windows:
        expected[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    assert torch.equal(changed, expected)


@torch.no_grad()
def test_network_written_out():
    """The U: which stage meets which skip, in which order, is spelt out once more."""
    model = random_model(input_size=32, channels=(8, 12, 16), blocks=(1, 1, 2))
    x, c_noise = torch.randn(2, 3, 32, 32), torch.tensor([-1.2, 0.7])
    cond = model.condition(c_noise, None, None, None)
    full = model.encoder[0][0](model.tokenizer(x), cond)
    half = model.encoder[1][0](F.conv2d(full, model.downs[0].weight, model.downs[0].bias, stride=2, padding=1), cond)
    quarter = F.conv2d(half, model.downs[1].weight, model.downs[1].bias, stride=2, padding=1)
    for block in model.encoder[2]:
        quarter = block(quarter, cond)
    doubled = quarter.repeat_interleave(2, 2).repeat_interleave(2, 3)
    up = F.conv2d(doubled, model.ups[0][1].weight, model.ups[0][1].bias, padding=1)
    half = model.decoder[0][0](torch.cat([up, half], 1), cond)
    doubled = half.repeat_interleave(2, 2).repeat_interleave(2, 3)
    up = F.conv2d(doubled, model.ups[1][1].weight, model.ups[1][1].bias, padding=1)
    full = model.decoder[1][0](torch.cat([up, full], 1), cond)
    torch.testing.assert_close(model(x, c_noise), model.head(model.norm(full)))


@torch.no_grad()
def test_plain_stages_written_out():
    """Table 4 C: in every stage the projected token is added to all tokens once, in front of attention and MLP."""
    model = random_model(encoder="plain", decoder="plain")
    x, c_noise = torch.randn(2, 3, 16, 16), torch.tensor([-1.2, 0.7])
    cond = model.condition(c_noise, None, None, None)

    def stage(x: torch.Tensor, stage: torch.nn.ModuleList) -> torch.Tensor:
        x = x + (cond @ stage[0].token.weight.T + stage[0].token.bias)[:, :, None, None]
        for block in (block.block for block in stage):
            tokens = to_windows(x, 4)
            qkv = block.attn.qkv(block.norm1(tokens))
            tokens = tokens + block.attn.proj(block.attn.attend(qkv, block.attn.position_bias()))
            x = from_windows(tokens + block.mlp(block.norm2(tokens)), *x.shape[2:])
        return x

    full = stage(model.tokenizer(x), model.encoder[0])
    half = stage(model.downs[0](full), model.encoder[1])
    joined = model.decoder[0][0].merge(torch.cat([model.ups[0](half), full], 1))
    expected = model.head(model.norm(stage(joined, model.decoder[0])))
    torch.testing.assert_close(model(x, c_noise), expected, rtol=1e-5, atol=1e-5)


def test_variants_of_encoder_and_decoder():
    """Table 4: E and D have the same encoder, D and C the same decoder."""

    def shapes(part: str, **settings: str) -> list[tuple[str, torch.Size]]:
        return [
            (key, value.shape) for key, value in getattr(ImageDiffiT(**TINY, **settings), part).state_dict().items()
        ]

    C, D = {"encoder": "plain", "decoder": "plain"}, {"decoder": "plain"}
    assert shapes("encoder", **D) == shapes("encoder")
    assert shapes("decoder", **D) == shapes("decoder", **C)
    assert shapes("decoder", **D) != shapes("decoder")
    assert shapes("encoder", **C) != shapes("encoder")


@pytest.mark.parametrize("window_size", [2, 4, 8])
@pytest.mark.parametrize(("cond_dim", "channels"), [(512, (256, 512, 512)), (256, (128, 256, 256))])
def test_settings_of_table_3_and_figure_8(window_size, cond_dim, channels):
    """Widths of time token and features, and the side of windows, are settings of their own."""
    with torch.device("meta"):
        model = create_model("ImageDiffit-CIFAR10", window_size=window_size, cond_dim=cond_dim, channels=channels)
        assert model(torch.empty(1, 3, 32, 32), torch.empty(1)).shape == (1, 3, 32, 32)
    for stage, width in zip(model.encoder, channels, strict=True):
        attn = stage[0].block.attn
        assert attn.qkv_temb.weight.shape == (3 * width, cond_dim)
        assert attn.relative_position_bias_table.shape == ((2 * window_size - 1) ** 2, width // 64)


@torch.no_grad()
def test_conditioning():
    """Noise level, class and augmentation reach the output; what is not given is null, or nothing done."""
    model = random_model(num_classes=3)
    x, c_noise, y = torch.randn(2, 3, 16, 16), torch.tensor([-1.2, 0.7]), torch.tensor([0, 2])
    told = torch.randn(2, 9)
    out = model(x, c_noise)
    assert torch.equal(out, model(x, c_noise, torch.tensor([3, 3]), torch.zeros(2, 9)))
    for other in (model(x, c_noise.flip(0)), model(x, c_noise, y), model(x, c_noise, None, told)):
        assert (other - out).abs().amax((1, 2, 3)).min() > 1e-6
    dropped = model(x, c_noise, y, told, torch.tensor([True, False]))
    torch.testing.assert_close(dropped[0], model(x, c_noise, None, told)[0])
    torch.testing.assert_close(dropped[1], model(x, c_noise, y, told)[1])


@torch.no_grad()
def test_augmentation_enters_the_noise_embedding():
    """The 9 numbers are added, by a linear map without bias, to the sinusoidal features in front of the MLP."""
    model = random_model()
    c_noise, told = torch.tensor([-1.2, 0.7]), torch.randn(2, 9)
    angles = c_noise[:, None] * 10_000.0 ** -(torch.arange(128) / 128)
    features = torch.cat([angles.cos(), angles.sin()], 1) + told @ model.augment_embedder.weight.T
    first, second = model.t_embedder.mlp[0], model.t_embedder.mlp[2]
    expected = second(F.silu(first(features))) + model.y_embedder.embedding_table.weight[0]
    torch.testing.assert_close(model.condition(c_noise, None, told, None), expected, rtol=1e-5, atol=1e-6)


def test_dropout_and_dropped_labels_in_training_only():
    model = random_model(dropout=0.5)
    x, c_noise = torch.randn(2, 3, 16, 16), torch.tensor([-1.2, 0.7])
    assert torch.equal(model(x, c_noise), model(x, c_noise))
    model.train()
    assert not torch.allclose(model(x, c_noise), model(x, c_noise))
    plain = random_model()
    assert torch.equal(plain(x, c_noise), plain.train()(x, c_noise))
    certain = random_model(num_classes=3, class_dropout_prob=1.0).train()
    assert torch.equal(certain(x, c_noise, torch.tensor([0, 1])), certain(x, c_noise))


def test_every_parameter_learns():
    """Also without labels and augmentation: distributed training refuses parameters that have no gradient."""
    model = random_model(num_classes=3)
    model(torch.randn(2, 3, 16, 16), torch.tensor([-1.2, 0.7])).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_initial_prediction_is_zero():
    model = ImageDiffiT(**TINY)
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([-1.2, 0.7])).abs().max() == 0


def flops(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # as products, which it counts
        model(*inputs)
    return counter.get_total_flops()


def test_attention_costs_in_proportion_to_pixels():
    """Twice the side is four times the work, in attention and overall; over the whole grid it would be sixteen."""
    attention = TMSA(8, num_heads=2, window_size=4)
    cond = torch.randn(1, 8)
    projected = 2 * 8 * 24  # of the conditioning token, once an image
    small, large = (flops(attention, to_windows(torch.randn(1, 8, side, side), 4), cond) for side in (32, 64))
    assert large - projected == 4 * (small - projected)
    model = random_model()
    small, large = (flops(model, torch.randn(1, 3, side, side), torch.tensor([0.5])) for side in (32, 64))
    assert 3.9 < large / small <= 4


@pytest.mark.slow
def test_training_step_takes_time_in_proportion_to_pixels():
    """The same by the clock: forward and backward of the attention, 32 -> 64 pixels, best of several."""
    attention = TMSA(64, num_heads=2, window_size=4)

    def seconds(side: int) -> float:
        windows, cond = to_windows(torch.randn(8, 64, side, side), 4), torch.randn(8, 64)
        times = []
        for _ in range(10):
            start = time.perf_counter()
            attention(windows, cond).sum().backward()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(64) / seconds(32) < 8


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ImageDiffit-CIFAR10", 15_888_803),
        ("ImageDiffit-FFHQ64", 23_807_023),
        ("ImageDiffit-CIFAR10-4", 28_700_611),
        ("ImageDiffit-FFHQ64-4", 44_807_395),
        ("ImageDiffit-Fashion", 3_776_033),
        ("ImageDiffit-Small", 945_385),
        ("ImageDiffit-Tiny", 64_411),
    ],
)
def test_zoo_sizes(name, parameters):
    with torch.device("meta"):
        model = create_model(name)
        assert count_parameters(model) == parameters
        config = ZOO[name]
        x = torch.empty(2, config.in_channels, config.input_size, config.input_size)
        assert model(x, torch.empty(2)).shape == x.shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_size": 36}, "multiple of 16"),
        ({"window_size": 16}, "multiple of 64"),
        ({"blocks": (2, 2)}, "every stage"),
        ({"blocks": (2, 0, 2)}, "blocks must be between 1 and 1000, not 0"),
        ({"window_size": 0}, "window_size must be between 1 and 8192, not 0"),
        ({"channels": (128, 250, 256)}, "250 channels"),
        ({"head_dim": 48}, "heads of 48"),
    ],
)
def test_unfitting_sizes_are_refused(settings, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        create_model("ImageDiffit-CIFAR10", **settings)


def test_unfitting_images_are_refused():
    with pytest.raises(ValueError, match="cannot be cut"):
        random_model()(torch.zeros(1, 3, 20, 20), torch.zeros(1))
