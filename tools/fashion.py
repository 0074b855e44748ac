"""Make what is bundled for Fashion-MNIST, each part of the one before: python tools/fashion.py PART

bundle      put a checkpoint of train.py into the package, in fp16; the loader computes in fp32 again
classifier  train the classifier that scores samples, on the real training set: it sees nothing generated
reference   make the reference, of the real images as the bundled classifier sees them

`python tools/vae.py train` trains the VAE. A new classifier needs a new reference.
"""

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("fashion:main")())

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from diffit.checkpoint.resolve import BUNDLED
from diffit.checkpoint.weights import load_model, save_checkpoint
from diffit.cli.run import one_sentence
from diffit.data.datasets import fashion_mnist
from diffit.evaluation.fashion import CLASSIFIER, FEATURES, REFERENCE, FashionClassifier
from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import Reference, both_radii, collect, score_images
from diffit.system.console import progress
from diffit.system.files import write_atomically

REFERENCE_IMAGES, TEST_IMAGES = 10_000, 2_000


def load_data(train: bool, device: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 1, 32, 32], and labels [N]."""
    data = fashion_mnist(train=train)
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous()
    return images.to(device), torch.from_numpy(data.labels).to(device)


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def make_bundle(args: argparse.Namespace) -> None:
    model, config = load_model(args.checkpoint)
    save_checkpoint(BUNDLED[config.model], model.half().state_dict(), config)
    print(BUNDLED[config.model], BUNDLED[config.model].stat().st_size)


def augment(x: Tensor) -> Tensor:
    """Shifts of up to 2 pixels, and a random flip of the batch."""
    x = torch.roll(x, torch.randint(-2, 3, (2,)).tolist(), (2, 3))
    return x.flip(3) if torch.rand(()) < 0.5 else x


@torch.no_grad()
def accuracy(classifier: FashionClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images, uint8 [N, 1, 32, 32], classified as their label."""
    classifier.eval()
    predicted = torch.cat([classifier(to_float(part)).argmax(1) for part in images.split(500)])
    return (predicted == labels).float().mean().item()


def make_classifier(args: argparse.Namespace) -> None:
    (images, labels), test = load_data(True, args.device), load_data(False, args.device)
    classifier, batch_size = FashionClassifier().to(args.device), 128
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.epochs * steps)
    for epoch in range(args.epochs):
        classifier.train()
        order = torch.randperm(len(images))[: steps * batch_size].view(-1, batch_size)
        for index in progress(order, f"epoch {epoch + 1}/{args.epochs}", leave=False):
            x = augment(to_float(images[index]))
            F.cross_entropy(classifier(x), labels[index], label_smoothing=0.05).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        found = accuracy(classifier, *test)
        print(json.dumps({"epoch": epoch + 1, "test_accuracy": found}), flush=True)
    state = {name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}
    write_atomically(args.out, save(state, metadata={"test_accuracy": f"{found:.4f}"}))


def make_reference(args: argparse.Namespace) -> None:
    """Moments of the 60,000 training images, features of 10,000 of them with their radii, features and labels of 2,000
    test images, and the scores of all 10,000; features in float16, images drawn with seed 0."""
    backend = create_backend(features=FEATURES, device=args.device)

    def batches(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        yield from np.array_split(images, len(images) // 500)

    real, held_out = fashion_mnist(train=True).images, fashion_mnist(train=False)
    order = np.random.default_rng(0).permutation(len(held_out))
    train = collect(batches(real), backend, len(real), "training images")
    test, labels = held_out.images[order], held_out.labels[order]
    features = np.concatenate([backend(batch).pool for batch in batches(test[:TEST_IMAGES])])
    pool = np.random.default_rng(0).permutation(train.pool)[:REFERENCE_IMAGES].astype(np.float16)
    mean, covariance = train.moments.mean.astype(np.float32), train.moments.covariance().astype(np.float32)
    points = pool.astype(np.float32)
    radii = both_radii(points, backend.device, progress=True)
    reference = Reference(mean.astype(float), covariance.astype(float), None, points, radii, ())
    scores = score_images(batches(test), reference, backend, total=len(test), labels=labels)
    content = io.BytesIO()
    np.savez_compressed(
        content,
        features=np.array(backend.name),
        mu=mean,
        sigma=covariance,
        pool=pool,
        radii=radii,
        test=features.astype(np.float16),
        test_labels=labels[:TEST_IMAGES].astype(np.uint8),
        test_scores=np.array(json.dumps(asdict(scores))),
    )
    write_atomically(args.out, content.getvalue())
    print(f"{args.out}: {args.out.stat().st_size} bytes, of {backend.name}; all test images: {scores}")


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(metavar="PART", required=True)
    bundle, classifier, reference = map(parts.add_parser, ("bundle", "classifier", "reference"))
    bundle.set_defaults(make=make_bundle)
    bundle.add_argument("checkpoint", type=Path, help="an ema.safetensors that train.py wrote")
    classifier.set_defaults(make=make_classifier)
    classifier.add_argument("--epochs", type=int, default=16, help="passes over the real training set, 16 by default")
    classifier.add_argument("--seed", type=int, default=0, help="of initialisation and order")
    classifier.add_argument("--out", type=Path, default=CLASSIFIER, help="where to write the weights")
    reference.set_defaults(make=make_reference)
    reference.add_argument("--out", type=Path, default=REFERENCE, help="the file to write")
    for part in (classifier, reference):
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    args = parser.parse_args()
    torch.manual_seed(getattr(args, "seed", 0))
    args.make(args)
