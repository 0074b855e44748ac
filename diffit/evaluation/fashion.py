"""How good samples of Fashion-MNIST are, offline: a bundled classifier, and the real data as it sees them.

Inception has never seen small grey pictures. So the features are those of a small CNN that was trained on the real
training set alone (`tools/fashion.py classifier`), and the reference holds what it makes of the real images
(`tools/fashion.py reference`); the scores are computed as ADM computes them, but compare with no others.

Letters: B images of a batch, M reference images, T test images, D = 128 features, K = 10 classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from diffit.checkpoint.resolve import BUNDLED
from diffit.data.datasets import FASHION_CLASSES
from diffit.evaluation.features import CLASSIFIER, Backend
from diffit.evaluation.scores import Reference, Scores, score_images, share

REFERENCE = CLASSIFIER.with_name("fashion_reference.npz")
FEATURES = "fashion"  # as --features names it


class FashionClassifier(nn.Module):
    """Grey images [B, 1, 32, 32] in [-1, 1] -> logits [B, 10]; 0.29 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((1, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))  # channels and stride
        blocks = [Conv2dNormActivation(inputs, outputs, 3, stride) for inputs, outputs, stride in shapes]
        self.body = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 1, 32, 32] in [-1, 1]. Returns logits [B, 10]."""
        return self.head(self.body(x))


def load_classifier(path: Path = CLASSIFIER, device: str | torch.device = "cpu") -> FashionClassifier:
    """The trained classifier in eval mode."""
    classifier = FashionClassifier()
    classifier.load_state_dict(load_file(path))
    return classifier.eval().to(device)


def load_features(path: Path | None, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What `--features` asks of a classifier: uint8 [B, 32, 32, 1 or 3] -> features [B, 128], probabilities [B, 10].

    Raises:
        ValueError: (when called) if the images are of another size.
    """
    classifier = load_classifier(path or CLASSIFIER, device)

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:3] != (32, 32):
            height, width = images.shape[1:3]
            raise ValueError(f"the classifier of Fashion-MNIST sees 32x32 images, got {height}x{width}")
        features = classifier.body(images.float().mean(dim=3)[:, None] / 127.5 - 1)  # [B, 128]
        return features, classifier.head(features).softmax(dim=1)

    return extract


def drawn_by_fashion_model(samples: Path) -> bool:
    """Whether the manifest.json beside samples names a model of Fashion-MNIST, by its classes or as a bundled one."""
    try:
        manifest = json.loads(samples.with_name("manifest.json").read_text())
        names, model = manifest.get("checkpoint", {}).get("class_names"), manifest["settings"]["model"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return tuple(names) == FASHION_CLASSES if names else model in BUNDLED


def bundled_reference(backend: Backend) -> Reference:
    """Moments of the 60,000 training images, and features of 10,000 of them.

    Raises:
        ValueError: if they are not of the backend's features.
    """
    with np.load(REFERENCE) as file:
        if str(file["features"]) != backend.name:
            raise ValueError(
                f"{REFERENCE} holds features of {file['features']}, not of {backend.name}: install diffit again, or "
                "run tools/fashion.py reference"
            )
        mean, covariance = file["mu"].astype(float), file["sigma"].astype(float)
        pool, radii = file["pool"].astype(np.float32), file["radii"]
    origin = (
        "FID: statistics of the 60000 training images of Fashion-MNIST",
        f"Precision, Recall: {len(pool)} of these training images",
    )
    return Reference(mean, covariance, None, pool, radii, origin)


def score_test_images(count: int, reference: Reference, backend: Backend, manifold: bool = True) -> Scores:
    """Scores of as many images of the real test set: what `count` samples that are as good as real ones would get.

    The features of T = 2000 of them are bundled; beyond that, the scores of all 10,000 are returned. All ranks call it.
    """
    with np.load(REFERENCE) as file:
        test, labels, all_scores = file["test"].astype(np.float32), file["test_labels"], str(file["test_scores"])
    if count > len(test):
        return Scores(**json.loads(all_scores))
    head = load_classifier(device=backend.device).head
    stored = Backend(backend.name, backend.device, lambda features: (features, head(features).softmax(dim=1)))
    start, stop = share(count)
    batches = [test[start:stop]] if stop > start else []
    return score_images(batches, reference, stored, manifold, labels=labels[:count])
