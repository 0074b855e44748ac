"""Train the classifier of Fashion-MNIST that scores samples, on the real training set: it sees nothing generated.

    python tools/fashion/train_classifier.py --out diffit/bundled/fashion_classifier.safetensors

Its penultimate features [B, 128] are the space in which Fréchet distances are measured; the network is in
diffit/evaluation/fashion.py. A new classifier needs a new reference: tools/fashion/make_reference.py.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffit.data.datasets import fashion_mnist
from diffit.evaluation.fashion import CLASSIFIER, FashionClassifier


def _batch(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _augment(x: Tensor) -> Tensor:
    """Shifts of up to 2 pixels, and a random flip of the batch."""
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    x = torch.roll(x, (dy, dx), (2, 3))
    return x.flip(3) if torch.rand(()) < 0.5 else x


@torch.no_grad()
def accuracy(classifier: FashionClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 1, 32, 32] uint8 classified as their label."""
    classifier.eval()
    pairs = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((classifier(_batch(x)).argmax(1) == y).sum()) for x, y in pairs) / len(images)


def train(epochs: int, device: str, seed: int) -> tuple[FashionClassifier, float]:
    """Returns the classifier and its accuracy on the real test set."""
    torch.manual_seed(seed)

    def load(train: bool) -> tuple[Tensor, Tensor]:
        data = fashion_mnist(train=train)
        return torch.from_numpy(data.images).permute(0, 3, 1, 2).to(device), torch.from_numpy(data.labels).to(device)

    (images, labels), test = load(True), load(False)
    classifier = FashionClassifier().to(device)
    batch_size = 128
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        classifier.train()
        order = torch.randperm(len(images))[: steps // epochs * batch_size].view(-1, batch_size)
        for index in tqdm(order, desc=f"epoch {epoch + 1}/{epochs}", leave=False):
            loss = F.cross_entropy(classifier(_augment(_batch(images[index]))), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(json.dumps({"epoch": epoch + 1, "test_accuracy": accuracy(classifier, *test)}), flush=True)
    return classifier, accuracy(classifier, *test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16, help="passes over the real training set (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--out", type=Path, default=CLASSIFIER, help="where to write the weights")
    args = parser.parse_args()
    classifier, test_accuracy = train(args.epochs, args.device, args.seed)
    state = {name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}
    save_file(state, args.out, metadata={"test_accuracy": f"{test_accuracy:.4f}"})


if __name__ == "__main__":
    main()
