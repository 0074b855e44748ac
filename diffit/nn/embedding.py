"""Embeddings of time, class and position. Letters: B batch, N tokens, C channels, F sinusoidal features."""

import math

import torch
from torch import Tensor, nn


def sincos_position_embedding(dim: int, side: int) -> Tensor:
    """Fixed 2-D position embedding [side*side, dim] in the MAE layout.

    The first half of the channels encodes the column, the second half the row, each as sines then cosines.
    Computed in float64 and rounded once, as the released weights were.

    Raises:
        ValueError: if dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sin-cos position embedding needs a multiple of 4 channels, not {dim}")
    omega = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # [C/4]
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # [side, C/4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, C/2]
    columns = axis[None, :, :].expand(side, side, -1)
    rows = axis[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).float()  # [N, C]


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep through a two-layer SiLU MLP."""

    def __init__(self, dim: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def features(self, t: Tensor) -> Tensor:
        """t: [B], any real timesteps. Returns [B, F] in float32: cosines, then sines, at falling frequencies."""
        half = self.num_features // 2
        frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
        angles = t[:, None].float() * frequencies  # [B, F/2]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, F]

    def forward(self, t: Tensor, offset: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """t: [B] timesteps on the original scale; offset: [B, F], added to the features. Returns [B, C].

        dtype: that of the network's input, in which the MLP computes where autocast does not choose another.
        """
        features = self.features(t)  # [B, F]
        return self.mlp((features if offset is None else features + offset).to(dtype))  # [B, C]


class FourierEmbedder(TimestepEmbedder):
    """Cosines and sines at random, fixed frequencies in place of the sinusoidal features (Table 8).

    The frequencies are normal with deviation 16, as in score SDEs and EDM (Song et al. 2021, Karras et al. 2022), in
    turns over `t_range`; they are drawn once and saved with the weights.
    """

    frequencies: Tensor

    def __init__(self, dim: int, num_features: int = 256, t_range: float = 1.0) -> None:
        super().__init__(dim, num_features)
        self.t_range = t_range
        self.register_buffer("frequencies", 16 * torch.randn(num_features // 2))

    def features(self, t: Tensor) -> Tensor:
        """t: [B]. Returns [B, F] in float32."""
        angles = 2 * math.pi * (t[:, None].float() / self.t_range) * self.frequencies.float()  # [B, F/2]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, F]


def time_embedder(kind: str, dim: int, num_features: int = 256, t_range: float = 1.0) -> TimestepEmbedder:
    """The embedder of a kind, positional or fourier; t_range: by how much the network's times differ, about.

    Raises:
        ValueError: if there is no such kind.
    """
    if kind == "positional":
        return TimestepEmbedder(dim, num_features)
    if kind == "fourier":
        return FourierEmbedder(dim, num_features, t_range)
    raise ValueError(f"unknown time embedding '{kind}': choose positional or fourier")


class LabelEmbedder(nn.Module):
    """Class embedding with one extra row, the null class, at index num_classes.

    In training mode each label becomes null with probability `dropout_prob`; the caller can say which instead, so that
    the choice does not depend on how a batch is split over ranks.
    """

    def __init__(self, num_classes: int, dim: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """y: labels [B] in 0..num_classes; drop: bool [B], which labels become null. Returns [B, C]."""
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)  # [B, C]
