"""Features of DINOv2 ViT-L/14, for FD-DINOv2 (Stein et al. 2023): `--features dinov2`.

The Fréchet distance in these features agrees better with what people see than Inception's, which sees classes of
ImageNet. As in EDM2's `calculate_metrics`: the whole image is resized to 224x224, bicubically and antialiased, in
floating point and without rounding (dgm-eval resizes by Pillow, which rounds to 8 bits); the feature is the class token
after the last norm. The position embedding is brought from 37x37 to 16x16 tokens as the authors' network does it, not
as timm does.

Letters: B images, D = 1024 features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_checkpoint
from torch import Tensor

NETWORK = "vit_large_patch14_dinov2.lvd142m"
_SIDE, _TOKENS = 224, 16  # of the image that the network sees, and of its grid of patches


def load_features(path: Path | None, device: torch.device) -> Callable[[Tensor], tuple[Tensor]]:
    """The network as `--features` asks for it: uint8 [B, H, W, 1 or 3] -> features [B, 1024], no probabilities.

    path: weights in timm's names or the authors'; None takes timm's from the Hub, 1.2 GB once.

    Raises:
        ValueError: if the weights cannot be had, or are of another network.
    """
    try:
        network = timm.create_model(NETWORK, pretrained=path is None, num_classes=0)
        if path is not None:
            load_checkpoint(network, str(path))
    except (OSError, RuntimeError, KeyError) as error:
        source = path or f"timm/{NETWORK} on the Hub"
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load DINOv2 from {source} ({reason}): give a copy, --features dinov2:FILE") from error
    return extractor(network, device)


def extractor(network: Any, device: torch.device) -> Callable[[Tensor], tuple[Tensor]]:
    """The features of a ViT of timm that was made for 518x518 pixels; any width and depth."""
    position = resize_position(network.pos_embed.detach())
    network.set_input_size(img_size=_SIDE)
    network.pos_embed.data = position
    network.eval().requires_grad_(False).to(device)
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def extract(images: Tensor) -> tuple[Tensor]:
        x = images.permute(0, 3, 1, 2).float().expand(-1, 3, -1, -1)  # [B, 3, H, W]
        x = F.interpolate(x, (_SIDE, _SIDE), mode="bicubic", antialias=True)
        return (network((x / 255 - mean) / std),)  # [B, D]

    return extract


def resize_position(embedding: Tensor) -> Tensor:
    """Position embedding [1, 1 + 37*37, D], class token first, for 16x16 patches: [1, 1 + 256, D].

    Bicubic without antialiasing, by a factor of (16 + 0.1) / 37 as the authors have it: their offset against rounding
    also moves the sampled points.
    """
    token, grid = embedding[:, :1], embedding[:, 1:]
    side = round(grid.shape[1] ** 0.5)
    image = grid.view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, scale_factor=(_TOKENS + 0.1) / side, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([token, image.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
