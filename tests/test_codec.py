"""The codec against its formulas, with a small VAE that diffusers made."""

import pytest
import torch

from diffit.codec import CodecConfig, PixelCodec, VAECodec, draw_latents, to_uint8
from tests.small_models import save_small_vae

CPU = torch.device("cpu")


def test_what_a_vae_decodes_is_truncated():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0 / 127.5 * 0.999, 0.9999, 1.0, 3.0]).view(1, 1, 1, -1)
    assert to_uint8(x, rounded=False).flatten().tolist() == [0, 0, 127, 191, 128, 254, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pixels_are_rounded_as_in_edm(dtype):
    """By EDM's formula: to the nearest level, up from a half; every level comes back from the network's side."""
    x = torch.linspace(-1.2, 1.2, 10_001, dtype=dtype).view(1, 1, 73, 137)
    decoded = PixelCodec().decode(x)
    assert torch.equal(decoded, (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    assert (decoded.double() - ((x.double() + 1) * 127.5).clip(0, 255).permute(0, 2, 3, 1)).abs().max() <= 0.5 + 1e-4
    halves = (torch.arange(255, dtype=torch.float64) + 0.5) / 127.5 - 1
    assert PixelCodec().decode(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)).flatten().tolist() == [0, 128, 255]
    up, down = (PixelCodec().decode((halves + step).view(1, 1, 1, -1)).flatten() for step in (1e-6, -1e-6))
    assert up.tolist() == list(range(1, 256))
    assert down.tolist() == list(range(255))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    assert torch.equal(PixelCodec().decode(PixelCodec().encode(levels)), levels)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"scaling_factor": 0.3},
        {"scaling_factor": 1.5, "shift_factor": 0.06},
        {"scaling_factor": 1.0, "latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]},
    ],
)
@torch.no_grad()
def test_scaling(tmp_path, config):
    """latents = (z - mean) / std * factor; Stable Diffusion's VAEs say nothing and mean 0.18215."""
    codec = VAECodec(CodecConfig(save_small_vae(tmp_path / "vae", **config), 2), CPU)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    moments = codec.encode_moments(images)
    assert moments.shape == (2, 8, 8, 8)
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    posterior = codec.vae.encode(x).latent_dist
    noise = torch.randn(2, 4, 8, 8)
    z = posterior.mean + posterior.std * noise
    mean = torch.tensor(config.get("latents_mean", [config.get("shift_factor", 0.0)] * 4)).view(1, 4, 1, 1)
    std = torch.tensor(config.get("latents_std", [1.0] * 4)).view(1, 4, 1, 1)
    latents = codec.latents(moments, noise)
    torch.testing.assert_close(latents, (z - mean) / std * config.get("scaling_factor", 0.18215))
    decoded = codec.decode(latents)
    assert (decoded.int() - to_uint8(codec.vae.decode(z).sample, rounded=False).int()).abs().max() <= 1
    assert decoded.shape == images.shape


def test_a_posterior_of_any_variance_is_drawn_from_as_diffusers_does():
    """Its log variance is kept within -30 and 20: beyond, a draw in half precision would be infinite."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    log_variance = torch.tensor([-1e4, -31, -30, -29, -1, 0, 2, 19, 20, 21, 22, 1e4])
    moments = torch.stack([torch.linspace(-1, 1, 12), log_variance]).view(1, 2, 3, 4)
    z = draw_latents(moments, torch.randn(1, 1, 3, 4, generator=torch.manual_seed(0)), torch.zeros(1), torch.ones(1))
    expected = DiagonalGaussianDistribution(moments).sample(torch.manual_seed(0))
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=0)
    centred = torch.cat([torch.zeros(1, 1, 3, 4), moments[:, 1:]], dim=1)
    spread = draw_latents(centred, torch.ones(1), torch.zeros(1), torch.ones(1)).flatten().log()
    torch.testing.assert_close(spread, torch.tensor([-15, -15, -15, -14.5, -0.5, 0, 1, 9.5, 10, 10, 10, 10]))


@torch.no_grad()
def test_a_vae_of_another_dtype_or_kind_decodes(tmp_path):
    from diffusers import AutoencoderTiny

    codec, latents = VAECodec(CodecConfig(save_small_vae(tmp_path / "vae"), 2), CPU), torch.randn(2, 4, 8, 8)
    expected = codec.decode(latents).int()
    for dtype in (torch.float64, torch.bfloat16):
        decoded = VAECodec(CodecConfig(factor=2), CPU, vae=codec.vae.to(dtype)).decode(latents)
        assert (decoded.int() - expected).abs().float().mean() < 2
    sides = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **sides)
    decoded = VAECodec(CodecConfig(factor=2), CPU, vae=tiny).decode(latents)
    assert torch.equal(decoded, to_uint8(tiny.decode(latents / tiny.config.scaling_factor).sample, rounded=False))


@torch.no_grad()
def test_decoding_in_slices(tmp_path, monkeypatch):
    """Two images at a time give what all at once give, and no more than two are in the decoder."""
    codec = VAECodec(CodecConfig(save_small_vae(tmp_path / "vae"), 2), CPU)
    latents = torch.randn(5, 4, 8, 8)
    sizes = []
    codec.vae.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    whole = codec.decode(latents)
    assert sizes == [5]
    sizes.clear()
    monkeypatch.setattr("diffit.codec._PIXELS_AT_ONCE", 2 * 16 * 16)
    sliced = codec.decode(latents)
    assert sizes == [2, 2, 1]
    assert (sliced.int() - whole.int()).abs().max() <= 1


def test_the_hash_does_not_see_how_weights_lie_in_memory(tmp_path):
    codec = VAECodec(CodecConfig(save_small_vae(tmp_path / "vae"), 2), CPU)
    assert codec.vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    before = codec.weights_hash()
    codec.vae.decoder.to(memory_format=torch.contiguous_format)
    assert codec.weights_hash() == before


def test_bundled_vae_reconstructs():
    """A drawn coat-like shape comes back within a few grey levels on average."""
    codec = VAECodec(CodecConfig("Diffit-Fashion-VAE", 4), CPU)
    image = torch.zeros(1, 32, 32, 1, dtype=torch.uint8)
    image[:, 4:28, 10:22] = 180
    image[:, 6:24, 6:10] = 140
    image[:, 6:24, 22:26] = 140
    with torch.no_grad():
        moments = codec.encode_moments(image)
        back = codec.decode(codec.latents(moments, torch.zeros(1, 4, 8, 8)))
    assert (back.float() - image.float()).abs().mean() < 6
    assert codec.image_channels == 1


@pytest.mark.parametrize("content", [None, "{}", "damaged"])
def test_missing_and_damaged_vaes(tmp_path, content):
    folder = tmp_path / "vae"
    if content == "damaged":
        save_small_vae(folder)
        weights = next(folder.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:1000])
    elif content:
        folder.mkdir()
        (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match="VAE") as caught:
        VAECodec(CodecConfig(str(folder), 2), CPU)
    assert "\n" not in str(caught.value)
