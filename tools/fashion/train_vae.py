"""Train the small VAE of Diffit-Fashion: grey 32x32 images -> latents 4x8x8, by reconstruction and a light KL.

    python tools/fashion/train_vae.py --epochs 120 --out runs/fashion_vae

Writes a diffusers AutoencoderKL (fp16) whose config carries the latents' mean and deviation. On a GPU 120 epochs take
minutes, on two CPU cores a day.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from diffit.data.datasets import fashion_mnist

KL_WEIGHT = 1e-4  # per latent value, beside an L1 + MSE per pixel on [-1, 1]


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


def to_float(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def load_images(train: bool, device: str) -> Tensor:
    """uint8 [N, 1, 32, 32]."""
    return torch.from_numpy(fashion_mnist(train=train).images).permute(0, 3, 1, 2).contiguous().to(device)


def vae_loss(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, mean absolute error) of a batch [B, 1, 32, 32]."""
    mean, log_variance = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    reconstruction = vae.decoder(vae.post_quant_conv(latents))
    l1 = F.l1_loss(reconstruction, x)
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return l1 + F.mse_loss(reconstruction, x) + KL_WEIGHT * kl, l1


def train(vae: AutoencoderKL, images: Tensor, epochs: int, batch_size: int, lr: float, minutes: float) -> AutoencoderKL:
    """Adam with a one-cycle rate, bf16 autocast on a GPU; returns the exponential moving average.

    Stops early, with the cycle completed, if `minutes` would be exceeded: the rate follows whichever clock is ahead.
    """
    steps = epochs * (len(images) // batch_size)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    optimizer = torch.optim.Adam(vae.parameters(), lr=lr, fused=True)
    loss_fn = torch.compile(vae_loss, mode="reduce-overhead") if images.is_cuda else vae_loss
    start, bar = time.monotonic(), tqdm(total=steps)
    for step in range(steps):
        progress = max(step / steps, (time.monotonic() - start) / (60 * minutes))
        if progress >= 1:
            break
        rate = lr * min(1, step / 500) * (1 - progress)
        optimizer.param_groups[0]["lr"] = rate
        batch = to_float(images[torch.randint(len(images), (batch_size,), device=images.device)])
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss, l1 = loss_fn(vae, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update_parameters(vae)
        bar.update()
        if step % 500 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", l1=f"{l1.item():.4f}")
    return average.module


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKL, images: Tensor) -> None:
    """Store mean and deviation of the latents, per channel, in the VAE's config."""
    chunks = [vae.encode(to_float(batch)).latent_dist.sample() for batch in images.split(1000)]
    latents = torch.cat(chunks).double()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """Mean absolute error and PSNR on [0, 1] of the decoded posterior means."""
    squared = absolute = 0.0
    for batch in images.split(1000):
        x = to_float(batch)
        error = (vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x) / 2
        squared += float(error.square().mean()) * len(batch) / len(images)
        absolute += float(error.abs().mean()) * len(batch) / len(images)
    return {"l1": absolute, "psnr": -10 * torch.tensor(squared).log10().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=120, help="passes over the 60,000 images (default: 120)")
    parser.add_argument("--minutes", type=float, default=1e9, help="finish within this time (default: no limit)")
    parser.add_argument("--batch_size", type=int, default=256, help="images per step (default: 256)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and order (default: 0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained VAE")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    images = load_images(True, args.device)
    vae = create_vae().to(args.device)
    vae = train(vae, images, args.epochs, args.batch_size, args.lr, args.minutes).eval()
    set_latent_statistics(vae, images)
    report = reconstruction_error(vae, load_images(False, args.device))
    print(json.dumps({"parameters": vae.num_parameters(), "test": report}))
    vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
