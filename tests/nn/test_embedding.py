"""Features of time: the kinds of Table 8."""

import math

import torch

from diffit import create_model
from diffit.checkpoint.weights import CheckpointConfig, load_weights, save_checkpoint
from diffit.models.config import model_config
from diffit.nn.embedding import FourierEmbedder, TimestepEmbedder, sincos_position_embedding, time_embedder
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


def test_position_embedding():
    """Column, then row, each as sines, then cosines of position / 10000^(k / (C/4))."""
    dim, side = 12, 3
    embedding = sincos_position_embedding(dim, side)
    assert embedding.dtype == torch.float32
    for number, vector in enumerate(embedding):
        row, column = divmod(number, side)
        angles = [[position / 10_000 ** (k / 3) for k in range(3)] for position in (column, row)]
        expected = [function(angle) for axis in angles for function in (math.sin, math.cos) for angle in axis]
        torch.testing.assert_close(vector, torch.tensor(expected), rtol=0, atol=1e-7)


def test_positional_features():
    """Cosines, then sines of t / 10000^(k / (F/2))."""
    features = TimestepEmbedder(4, 6).features(torch.tensor([0, 7.5]))
    angles = torch.tensor([[t / 10_000 ** (k / 3) for k in range(3)] for t in (0, 7.5)])
    torch.testing.assert_close(features, torch.cat([angles.cos(), angles.sin()], 1))
