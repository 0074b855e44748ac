"""Inception features in PyTorch: torch-fidelity's port of the network of 2015, with ADM's weights and sFID's features.

Letters: B images of a batch, H x W their size.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from diffit.evaluation.backends import INCEPTION, Features
from diffit.evaluation.inception_weights import load_state
from diffit.evaluation.reader import Images, to_rgb

_SPATIAL_CHANNELS = 7


class _Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's extractor, which also keeps the features of sFID."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        buffer = io.BytesIO()  # the extractor reads its weights from a file
        torch.save(state, buffer)
        buffer.seek(0)
        super().__init__(INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer)
        self.spatial = torch.empty(0)
        self.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: object, inputs: object, output: Tensor) -> None:
        self.spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # [B, 17*17*7]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images: uint8 [B, 3, H, W]. Returns features [B, 2048], probabilities [B, 1008], spatial [B, 2023]."""
        pool, logits = self(images)
        return pool, logits.softmax(dim=1), self.spatial


class TorchInception:
    """The default backend.

    Args:
        weights: the frozen graph (.pb), or torch-fidelity's converted file (.pth).
        device: where it runs.

    Raises:
        ValueError: if the file does not hold the weights of this network.
    """

    name = INCEPTION

    def __init__(self, weights: Path, device: torch.device) -> None:
        try:
            self.network = _Inception(load_state(weights)).to(device)
        except (RuntimeError, AttributeError, TypeError) as error:
            raise ValueError(f"{weights} does not hold the weights of the Inception network of 2015") from error
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Images) -> Features:
        batch = torch.from_numpy(to_rgb(images).copy()).to(self.device).permute(0, 3, 1, 2)  # [B, 3, H, W]
        with _full_float32():
            pool, probabilities, spatial = self.network.features(batch)
        return Features(pool.cpu().numpy(), probabilities.cpu().numpy(), spatial.cpu().numpy())


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 in here, whatever the training around it has chosen: it would move FID in the third digit."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
