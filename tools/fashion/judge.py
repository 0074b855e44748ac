"""A judge for Fashion-MNIST: a small CNN trained on the real training set, which says what a picture shows.

    python tools/fashion/judge.py --out tools/fashion/judge.safetensors

Its penultimate features [B, 128] are the space in which Fréchet distances are measured. It sees nothing generated.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from diffit.data.datasets import fashion_mnist

WEIGHTS = Path(__file__).with_name("judge.safetensors")


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Judge(nn.Module):
    """Grey images [B, 1, 32, 32] in [-1, 1] -> logits [B, 10]; 0.29 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(1, 32),
            _convolution(32, 32),
            _convolution(32, 64, stride=2),
            _convolution(64, 64),
            _convolution(64, 128, stride=2),
            _convolution(128, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:
        """x: [B, 1, 32, 32] in [-1, 1]. Returns [B, 128]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 1, 32, 32] in [-1, 1]. Returns logits [B, 10]."""
        return self.head(self.features(x))


def load_judge(path: Path = WEIGHTS, device: str = "cpu") -> Judge:
    """The trained judge in eval mode."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval().to(device)


def load_features(path: Path | None, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What `evaluations` asks of a classifier: uint8 images [B, 32, 32, 1 or 3] -> features [B, 128], classes [B, 10].

    Raises:
        ValueError: (when called) if the images are of another size.
    """
    judge = load_judge(path or WEIGHTS, str(device))

    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1:3] != (32, 32):
            height, width = images.shape[1:3]
            raise ValueError(f"the judge of Fashion-MNIST sees 32x32 images, got {height}x{width}")
        features = judge.features(_batch(images.float().mean(dim=3)[:, None]))  # [B, 128]
        return features, judge.head(features).softmax(dim=1)

    return extract


def _batch(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def _augment(x: Tensor) -> Tensor:
    """Shifts of up to 2 pixels, and a random flip of the batch."""
    dy, dx = torch.randint(-2, 3, (2,)).tolist()
    x = torch.roll(x, (dy, dx), (2, 3))
    return x.flip(3) if torch.rand(()) < 0.5 else x


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 1, 32, 32] uint8 judged as their label."""
    judge.eval()
    right = sum(
        int((judge(_batch(x)).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(images)


def train_judge(epochs: int, device: str, seed: int) -> tuple[Judge, float]:
    """Returns the judge and its accuracy on the real test set."""
    torch.manual_seed(seed)

    def load(train: bool) -> tuple[Tensor, Tensor]:
        data = fashion_mnist(train=train)
        return torch.from_numpy(data.images).permute(0, 3, 1, 2).to(device), torch.from_numpy(data.labels).to(device)

    (images, labels), test = load(True), load(False)
    judge = Judge().to(device)
    batch_size = 128
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=1e-2)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for epoch in range(epochs):
        judge.train()
        order = torch.randperm(len(images))[: steps // epochs * batch_size].view(-1, batch_size)
        for index in tqdm(order, desc=f"epoch {epoch + 1}/{epochs}", leave=False):
            loss = F.cross_entropy(judge(_augment(_batch(images[index]))), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(json.dumps({"epoch": epoch + 1, "test_accuracy": accuracy(judge, *test)}), flush=True)
    return judge, accuracy(judge, *test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16, help="passes over the real training set (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where to write the weights")
    args = parser.parse_args()
    judge, test_accuracy = train_judge(args.epochs, args.device, args.seed)
    state = {name: value.cpu().contiguous() for name, value in judge.state_dict().items()}
    save_file(state, args.out, metadata={"test_accuracy": f"{test_accuracy:.4f}"})


if __name__ == "__main__":
    main()
