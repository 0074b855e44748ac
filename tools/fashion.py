"""Make what is bundled for Fashion-MNIST, each part of the one before: python tools/fashion.py PART

vae         train the VAE of Diffit-Fashion, a diffusers AutoencoderKL: grey 32x32 images -> latents 4x8x8
bundle      put a checkpoint of train.py into the package, in fp16; the loader computes in fp32 again
classifier  train the classifier that scores samples, on the real training set: it sees nothing generated
reference   make the reference, of the real images as the bundled classifier sees them

On a GPU 120 epochs of the VAE take minutes, on two CPU cores a day. A new classifier needs a new reference.
"""

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    import sys

    from diffit.cli.run import start

    sys.exit(start("fashion:main"))

import argparse
import io
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffit.checkpoint.resolve import BUNDLED
from diffit.checkpoint.weights import load_model, save_checkpoint
from diffit.cli.run import one_sentence
from diffit.data.datasets import fashion_mnist
from diffit.evaluation.fashion import CLASSIFIER, FEATURES, REFERENCE, FashionClassifier
from diffit.evaluation.features import create_backend
from diffit.evaluation.scores import Reference, both_radii, collect, score_images
from diffit.system.console import progress
from diffit.system.files import write_atomically

KL_WEIGHT = 1e-4  # per latent value, beside an L1 + MSE per pixel on [-1, 1]
REFERENCE_IMAGES, TEST_IMAGES = 10_000, 2_000


def load_data(train: bool, device: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 1, 32, 32], and labels [N]."""
    data = fashion_mnist(train=train)
    images = torch.from_numpy(data.images).permute(0, 3, 1, 2).contiguous()
    return images.to(device), torch.from_numpy(data.labels).to(device)


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def create_vae() -> AutoencoderKL:
    """0.83 M parameters, two halvings."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
    )


def vae_loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Reconstruction and a light KL of a batch [B, 1, 32, 32]."""
    mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    reconstruction = vae.decoder(vae.post_quant_conv(latents))
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return F.l1_loss(reconstruction, x) + F.mse_loss(reconstruction, x) + KL_WEIGHT * kl


def train_vae(args: argparse.Namespace, images: Tensor) -> AutoencoderKL:
    """Adam with a falling rate, bf16 autocast on a GPU; returns the EMA.

    Stops early, at a rate of zero, if `minutes` would be exceeded: the rate follows whichever clock is ahead.
    """
    vae = create_vae().to(args.device)
    steps = args.epochs * (len(images) // args.batch_size)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.Adam(vae.parameters(), lr=args.lr, fused=True)
    loss_fn = torch.compile(vae_loss, mode="reduce-overhead") if images.is_cuda else vae_loss
    start, bar = time.monotonic(), progress(range(steps))
    for step in bar:
        elapsed = max(step / steps, (time.monotonic() - start) / (60 * args.minutes))
        if elapsed >= 1:
            break
        optimizer.param_groups[0]["lr"] = args.lr * min(1, step / 500) * (1 - elapsed)
        batch = to_float(images[torch.randint(len(images), (args.batch_size,), device=images.device)])
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = loss_fn(vae, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update_parameters(vae)
        if step % 500 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    return ema.module.eval()


@torch.no_grad()
def make_vae(args: argparse.Namespace) -> None:
    """Train the VAE; its config carries mean and deviation of the latents, per channel."""
    images, test = (load_data(train, args.device)[0] for train in (True, False))
    with torch.enable_grad():
        vae = train_vae(args, images)
    latents = torch.cat([vae.encode(to_float(part)).latent_dist.sample() for part in images.split(1000)]).double()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    decoded = [vae.decode(vae.encode(to_float(part)).latent_dist.mean).sample for part in test.split(1000)]
    error = (torch.cat(decoded).clamp(-1, 1) - to_float(test)) / 2  # on [0, 1]
    psnr = -10 * error.square().mean().log10()
    print(json.dumps({"parameters": vae.num_parameters(), "l1": error.abs().mean().item(), "psnr": psnr.item()}))
    vae.half().save_pretrained(args.out)


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

    def add_part(name: str, make: object) -> argparse.ArgumentParser:
        part = parts.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        part.set_defaults(make=make)
        if name != "bundle":
            device = "cuda" if torch.cuda.is_available() else "cpu"
            part.add_argument("--device", default=device, help="cuda or cpu")
        if name in ("vae", "classifier"):
            part.add_argument("--seed", type=int, default=0, help="of initialisation and order")
        return part

    vae = add_part("vae", make_vae)
    vae.add_argument("--epochs", type=int, default=120, help="passes over the 60,000 images")
    vae.add_argument("--minutes", type=float, default=float("inf"), help="finish within this time")
    vae.add_argument("--batch_size", type=int, default=256, help="images per step")
    vae.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    vae.add_argument("--out", type=Path, required=True, help="folder for the trained VAE")
    bundle = add_part("bundle", make_bundle)
    bundle.add_argument("checkpoint", type=Path, help="an ema.safetensors that train.py wrote")
    classifier = add_part("classifier", make_classifier)
    classifier.add_argument("--epochs", type=int, default=16, help="passes over the real training set")
    classifier.add_argument("--out", type=Path, default=CLASSIFIER, help="where to write the weights")
    reference = add_part("reference", make_reference)
    reference.add_argument("--out", type=Path, default=REFERENCE, help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(getattr(args, "seed", 0))
    args.make(args)
