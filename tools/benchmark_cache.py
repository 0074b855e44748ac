"""What caching latents saves: training steps with and without a cache, in turns, as a ratio of images/s.

    python tools/benchmark_cache.py --case fashion      Diffit-Fashion on Fashion-MNIST, with its own VAE
    python tools/benchmark_cache.py --case imagenet     Diffit-S on random pictures of 256x256, with a VAE of Stable
                                                        Diffusion's size (untrained: that changes no speed)

Without a cache, the VAE encodes the images of every step anew. With one, moments come from memory or, by a worker, from
disk.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from diffit import create_model
from diffit.benchmark.cases import save_large_vae
from diffit.codec import CodecConfig, VAECodec
from diffit.data.batches import Batches, Latents
from diffit.data.datasets import ImageArrays, Images, fashion_mnist
from diffit.data.encoding import encode_images
from diffit.data.order import Plan
from diffit.data.streams import MemoryStream, Stream, WorkerStream
from diffit.device import resolve_device
from diffit.diffusion import create_diffusion
from diffit.diffusion.config import DiffusionConfig
from diffit.distributed import World


@dataclass(frozen=True)
class EncodingStream:
    """The plain way: the VAE encodes what a step sees."""

    images: Stream
    codec: VAECodec

    @torch.inference_mode()
    def __getitem__(self, step: int) -> Tensor:
        return self.codec.encode_moments(self.images[step])


def fashion(device: torch.device, folder: Path) -> tuple[Images, VAECodec, str]:
    """The first 256 images, Fashion's VAE and model."""
    data = fashion_mnist()
    part = ImageArrays(data.images[:256], data.labels[:256], data.class_names)
    return Images(part, 32, 1), VAECodec(CodecConfig("Diffit-Fashion-VAE", 4), device), "Diffit-Fashion"


def imagenet(device: torch.device, folder: Path) -> tuple[Images, VAECodec, str]:
    """Random pictures, an untrained VAE of 83.7 M parameters, and Diffit-S."""
    save_large_vae(folder / "vae")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), dtype=np.uint8)
    images = Images(ImageArrays(pixels, np.zeros(4, np.int64), ()), 256, 3)
    return images, VAECodec(CodecConfig(str(folder / "vae"), 8), device), "Diffit-S"


CASES = {"fashion": (fashion, 16), "imagenet": (imagenet, 2)}


def stepper(model_name: str, batches: Batches, device: torch.device) -> Callable[[int], None]:
    """A function that takes one training step in float32."""
    torch.manual_seed(0)
    model = create_model(model_name).to(device)
    diffusion = create_diffusion()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step(number: int) -> None:
        batch = batches[number]
        losses = diffusion.training_losses(
            lambda x, t: model(x, t, **batch.conditions), batch.x_start, batch.t, batch.noise
        )
        optimizer.zero_grad()
        losses.loss.mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="fashion")
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is measured (default: 5)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a measurement (default: 4)")
    parser.add_argument("--batch_size", type=int, help="images of a step (default: 16 or 2, what a CPU can do)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    args = parser.parse_args()
    device = resolve_device(args.device)
    make, size = CASES[args.case]
    size = args.batch_size or size
    with tempfile.TemporaryDirectory() as folder:
        images, codec, model = make(device, Path(folder))
        cache = encode_images(images, codec, Path(folder) / "cache", flip=False, workers=0, world=World())
        plan = Plan(0, len(images), size, slice(None), flip=False)
        pixels = MemoryStream(torch.from_numpy(images.in_memory()[:, None]).to(device), plan)
        streams: dict[str, Stream] = {
            "no cache": EncodingStream(pixels, codec),
            "cache in memory": MemoryStream(cache.load(device), plan),
            "cache on disk": WorkerStream(cache, plan, 1, device),
        }
        labels = torch.from_numpy(images.labels).to(device)
        steppers = {}
        for name, stream in streams.items():
            clean = Latents(stream, cache.shape, codec, plan)
            steppers[name] = stepper(model, Batches(clean, labels, plan, DiffusionConfig(), 0.1), device)
        speeds = measure(steppers, args.rounds, args.steps, size, device)
    print(json.dumps({"case": args.case, "device": str(device), "threads": torch.get_num_threads(), "batch": size}))
    for name, speed in speeds.items():
        ratio = speed / speeds["no cache"]
        print(json.dumps({"way": name, "images_per_s": float(f"{speed:.3g}"), "ratio": round(ratio, 2)}))


def measure(
    steppers: dict[str, Callable[[int], None]], rounds: int, steps: int, size: int, device: torch.device
) -> dict[str, float]:
    """Median images/s of each way; the ways take turns, after one round that is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(rounds + 1):
        for name, step in steppers.items():
            start = time.perf_counter()
            for number in range(turn * steps, (turn + 1) * steps):
                step(number)
            if device.type == "cuda":
                torch.cuda.synchronize()
            speeds[name].append(steps * size / (time.perf_counter() - start))
    return {name: median(values[1:]) for name, values in speeds.items()}


if __name__ == "__main__":
    main()
