"""Cached latents: the VAE's posterior moments of a whole data set, computed once and kept in a file.

Letters: N images of the set, B of a batch, c latent channels, h = w latent side.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from diffit.codec import VAECodec
from diffit.data.datasets import ImageArrays


def cached_moments(data: ImageArrays, codec: VAECodec, folder: Path, batch_size: int = 250) -> Tensor:
    """Mean and log variance of every image's posterior, float32 [N, 2c, h, w]; read from `folder` if already there.

    The file's name holds a fingerprint of the images and of the VAE's weights: a cache cannot be mistaken for another.
    """
    path = folder / f"moments-{_fingerprint(data, codec)}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        save_file({"moments": _encode(data, codec, batch_size)}, temporary)
        temporary.replace(path)
    return load_file(path)["moments"]


@torch.inference_mode()
def _encode(data: ImageArrays, codec: VAECodec, batch_size: int) -> Tensor:
    images = torch.from_numpy(data.images)
    batches = tqdm(images.split(batch_size), desc="encoding images", unit="batch")
    return torch.cat([codec.encode_moments(batch).float().cpu() for batch in batches]).contiguous()


def _fingerprint(data: ImageArrays, codec: VAECodec) -> str:
    digest = hashlib.sha256(json.dumps(data.images.shape).encode())
    digest.update(data.images.data)
    for name, value in sorted(codec.vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
