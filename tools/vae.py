"""A VAE of one's own, and how good any VAE is for one's images: python tools/vae.py train | score

train   train a small AutoencoderKL of diffusers on grey or tiny images: latents of 4 channels and a quarter of the side
score   reconstruct images: PSNR, Frechet distance of features (rFID), and a picture of pairs, original beside it

Without --data.path the images are those of Fashion-MNIST, seen by its bundled classifier. On a GPU 120 epochs of its
60,000 images take minutes, on two CPU cores a day. docs/own_images.md says when a VAE of one's own pays.
"""

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("vae:main")())

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffit.cli.run import one_sentence
from diffit.codec import VAECodec, vae_config
from diffit.config import CodecConfig
from diffit.data.datasets import ImageDataset, fashion_mnist, open_images
from diffit.data.files import find_pictures
from diffit.evaluation.fashion import FEATURES, bundled_reference
from diffit.evaluation.features import create_backend
from diffit.evaluation.statistics import Moments, frechet_distance
from diffit.sampling.folder import draw_grid, save_png
from diffit.system.console import progress

BATCH_SIZE, LR = 256, 2e-3
KL_WEIGHT = 1e-4  # per latent value, beside an L1 + MSE per pixel on [-1, 1]


def open_data(args: argparse.Namespace, size: int, channels: int) -> ImageDataset:
    """The images at --data.path, or those of Fashion-MNIST: to train on, or to test with."""
    if args.path:
        return open_images("folder", args.path, size, channels)
    return ImageDataset(fashion_mnist(train=args.make is make_vae), size, channels)


def create_vae(channels: int, size: int) -> AutoencoderKL:
    """0.83 M parameters, two halvings."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (32, 48, 64), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    return AutoencoderKL(channels, channels, **blocks, **sizes, sample_size=size, scaling_factor=1.0)


def vae_loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Reconstruction and a light KL of a batch [B, C, S, S]."""
    mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    reconstruction = vae.decoder(vae.post_quant_conv(latents))
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return F.l1_loss(reconstruction, x) + F.mse_loss(reconstruction, x) + KL_WEIGHT * kl


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def train_vae(args: argparse.Namespace, images: Tensor) -> AutoencoderKL:
    """Adam with a falling rate, bf16 autocast on a GPU; returns the EMA.

    Stops early, at a rate of zero, if `minutes` would be exceeded: the rate follows whichever clock is ahead.
    """
    vae = create_vae(images.shape[1], images.shape[2]).to(args.device)
    steps = args.epochs * -(-len(images) // BATCH_SIZE)
    ema = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.Adam(vae.parameters(), lr=LR, fused=True)
    loss_fn = torch.compile(vae_loss, mode="reduce-overhead") if images.is_cuda else vae_loss
    start, bar = time.monotonic(), progress(range(steps))
    for step in bar:
        elapsed = max(step / steps, (time.monotonic() - start) / (60 * args.minutes))
        if elapsed >= 1:
            break
        optimizer.param_groups[0]["lr"] = LR * min(1, step / 500) * (1 - elapsed)
        batch = to_float(images[torch.randint(len(images), (BATCH_SIZE,), device=images.device)])
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


def make_vae(args: argparse.Namespace) -> None:
    """Train the VAE; its config carries mean and deviation of the latents, per channel."""
    torch.manual_seed(0)
    data = open_data(args, args.image_size or 32, find_pictures(args.path).channels() if args.path else 1)
    images = np.stack([data[index][0] for index in range(len(data))])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(args.device)  # uint8 [N, C, S, S]
    vae = train_vae(args, pixels)
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_float(part)).latent_dist.sample() for part in pixels.split(1000)]).double()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.half().save_pretrained(args.out)
    print(f"{args.out}: {vae.num_parameters():,} parameters")


@torch.no_grad()
def score_vae(args: argparse.Namespace) -> None:
    """Print the scores of reconstructions from the posterior's mean, and write a picture of eight pairs."""
    codec, bundled = VAECodec(CodecConfig(args.vae), torch.device(args.device)), not (args.path or args.features)
    data = open_data(args, args.image_size or vae_config(args.vae)["sample_size"], codec.image_channels)
    backend = create_backend(features=FEATURES if bundled else args.features, device=args.device)
    seen, originals, squares, pairs, right = Moments(), Moments(), list[float](), list[NDArray[np.uint8]](), 0
    for part in progress(np.array_split(np.arange(len(data)), -(-len(data) // 100))):
        images = np.stack([data[index][0] for index in part.tolist()])
        moments = codec.encode_moments(torch.from_numpy(images)).float()
        results = codec.decode(codec.latents(moments, torch.zeros(()))).cpu().numpy()
        squares += ((images / 255.0 - results / 255.0) ** 2).mean((1, 2, 3)).tolist()
        pairs += [image for pair in zip(images, results, strict=True) for image in pair][: 16 - len(pairs)]
        features = backend(results)
        seen.update(features.pool)
        if bundled and features.probabilities is not None:
            right += int((features.probabilities.argmax(1) == data.labels[part]).sum())
        else:
            originals.update(backend(images).pool)
    save_png(args.out, draw_grid(pairs, ["original", "reconstructed"] * (len(pairs) // 2)))
    real = bundled_reference(backend) if bundled else None
    mean, covariance = (real.mean, real.covariance) if real else (originals.mean, originals.covariance())
    scores = {"images": len(data), "psnr": -10 * float(np.log10(max(np.mean(squares), 1e-10)))}
    scores["frechet"] = frechet_distance(mean, covariance, seen.mean, seen.covariance())
    print(args.out, json.dumps(scores | ({"classified": right / len(data)} if bundled else {})))


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(metavar="train | score", required=True)
    style = argparse.ArgumentDefaultsHelpFormatter
    train, score = (parts.add_parser(name, formatter_class=style) for name in ("train", "score"))
    for part, make in ((train, make_vae), (score, score_vae)):
        part.set_defaults(make=make)
        part.add_argument("--data.path", dest="path", help="folder, ZIP or Parquet of images; without it Fashion-MNIST")
        part.add_argument("--image_size", type=int, help="side in pixels; by default 32, or that of the VAE")
        part.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    train.add_argument("--epochs", type=int, default=120, help="passes over the images")
    train.add_argument("--minutes", type=float, default=float("inf"), help="finish within this time")
    train.add_argument("--out", type=Path, required=True, help="folder for the trained VAE")
    score.add_argument("--codec.vae", dest="vae", required=True, help="a bundled name, a folder, or a Hub id")
    score.add_argument("--features", help="module:path of a classifier, in place of Inception")
    score.add_argument("--out", type=Path, default=Path("pairs.png"), help="the picture to write")
    args = parser.parse_args()
    args.make(args)
