"""Measure samples of Diffit-Fashion with the classifier: share classified as asked for, Fréchet distance to real data.

    python tools/fashion/measure.py logs/guided/samples_1000x32x32x1.npz logs/unguided/samples_10000x32x32x1.npz

The distance is that between Gaussians fitted to the classifier's features of the samples and of the real training set.
The same numbers of the real test set and of the VAE's reconstructions of it stand beside it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffit.codec import CodecConfig, VAECodec
from diffit.data.datasets import fashion_mnist
from diffit.evaluation.fashion import FashionClassifier, load_classifier
from diffit.evaluation.statistics import frechet_distance


def _batches(images: NDArray[np.uint8], size: int = 500) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


@torch.inference_mode()
def classified(
    classifier: FashionClassifier, images: NDArray[np.uint8], device: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Features [N, 128] and predicted classes [N] of uint8 images [N, 32, 32, 1]."""
    features, classes = [], []
    for batch in _batches(images):
        x = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        feature = classifier.features(x)
        features.append(feature.double().cpu().numpy())
        classes.append(classifier.head(feature).argmax(1).cpu().numpy())
    return np.concatenate(features), np.concatenate(classes)


@torch.inference_mode()
def reconstructions(images: NDArray[np.uint8], device: str) -> NDArray[np.uint8]:
    """What the bundled VAE makes of images, through the means of its posterior."""
    codec = VAECodec(CodecConfig("Diffit-Fashion-VAE", factor=4), torch.device(device))
    parts = []
    for batch in _batches(images):
        moments = codec.encode_moments(torch.from_numpy(batch))
        noise = torch.zeros_like(moments[:, : codec.latent_channels])
        parts.append(codec.decode(codec.latents(moments, noise)).cpu().numpy())
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, nargs="*", help=".npz files that sample.py wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args()
    classifier = load_classifier(device=args.device)
    real = classified(classifier, fashion_mnist(train=True).images, args.device)[0]
    moments = real.mean(0), np.cov(real, rowvar=False)

    def report(name: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        features, classes = classified(classifier, images, args.device)
        distance = frechet_distance(features.mean(0), np.cov(features, rowvar=False), *moments)
        numbers = {"images": len(images), "classified_right": float((classes == labels).mean())}
        print(json.dumps({"name": name} | numbers | {"frechet": float(distance)}), flush=True)

    test = fashion_mnist(train=False)
    report("real test set", test.images, test.labels)
    report("VAE reconstructions of it", reconstructions(test.images, args.device), test.labels)
    for path in args.samples:
        with np.load(path) as samples:
            report(str(path), samples["arr_0"], samples["arr_1"])


if __name__ == "__main__":
    main()
