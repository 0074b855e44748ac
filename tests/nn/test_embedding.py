"""Features of time: the kinds of Table 8."""

import torch

from diffit import create_model
from diffit.checkpoint.weights import CheckpointConfig, load_weights, save_checkpoint
from diffit.models.config import model_config
from diffit.nn.embedding import FourierEmbedder, TimestepEmbedder, time_embedder
from tests.small_models import random_network


@torch.no_grad()
def test_fourier_features():
    """Cosines and sines of 2 pi f t, and the MLP that positional features go through."""
    embedder = time_embedder("fourier", 12, 8, t_range=1000)
    t = torch.tensor([3.0, 500.0])
    angles = 2 * torch.pi * torch.outer(t / 1000, embedder.frequencies)
    features = torch.cat([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(embedder.features(t), features)
    torch.testing.assert_close(embedder(t), embedder.mlp(features))
    torch.testing.assert_close(embedder(t, torch.ones(2, 8)), embedder.mlp(features + 1))


def test_frequencies_are_normal_with_deviation_16():
    torch.manual_seed(0)
    frequencies = FourierEmbedder(4, 20_000).frequencies
    assert abs(frequencies.std() - 16) < 0.5
    assert abs(frequencies.mean()) < 0.5


def test_frequencies_are_fixed_and_saved(tmp_path):
    network = model_config("ImageDiffit-Tiny", time_embedding="fourier")
    model = random_network(network)
    frequencies = model.t_embedder.frequencies
    assert "t_embedder.frequencies" not in dict(model.named_parameters())
    path = tmp_path / "fourier.safetensors"
    config = CheckpointConfig("ImageDiffit-Tiny", network, process="edm")
    save_checkpoint(path, model.state_dict(), config)
    again = load_weights(path, config)
    assert torch.equal(again.t_embedder.frequencies, frequencies)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([-1.2, 0.7])
    assert torch.equal(again(x, t), model(x, t))


def test_positional_is_the_default_and_has_no_buffer():
    model = create_model("ImageDiffit-Tiny")
    assert type(model.t_embedder) is TimestepEmbedder
    assert dict(model.named_buffers()) == {}
