"""Small real things: a VAE that diffusers saved, a checkpoint, a data set in Fashion-MNIST's own files."""

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from diffit.checkpoint.weights import CheckpointConfig, save_checkpoint
from diffit.codec import CodecConfig
from diffit.diffusion.config import GuidanceConfig, SamplingConfig
from diffit.models.config import DiffiTConfig, NetworkConfig, build_model, model_config

NETWORK = DiffiTConfig(input_size=8, patch_size=2, hidden_size=32, depth=2, num_heads=4, num_classes=3)
CLASSES = ("Cat", "Dog", "Night owl")


def save_small_vae(folder: Path, channels: int = 3, **config) -> str:
    """A random AutoencoderKL, images [16, 16, channels] -> latents [4, 8, 8]."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        **config,
    )
    vae.save_pretrained(folder)
    return str(folder)


def random_network(config: NetworkConfig = NETWORK, seed: int = 0) -> torch.nn.Module:
    """A network whose every parameter is random, the head included."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save_small_checkpoint(folder: Path, vae: str, **changes) -> Path:
    """A checkpoint of the small network, with 3 recommended steps and guidance at 2."""
    config = CheckpointConfig(
        "Diffit-S",
        NETWORK,
        sampling=SamplingConfig(num_sampling_steps=3),
        guidance=GuidanceConfig(scale=2.0),
        codec=CodecConfig(vae, factor=2),
        class_names=CLASSES,
        **changes,
    )
    path = folder / "small.safetensors"
    save_checkpoint(path, random_network().state_dict(), config)
    return path


def save_small_image_checkpoint(folder: Path, **network) -> Path:
    """A checkpoint of a random ImageDiffit-Tiny, with 4 recommended Heun steps and guidance at 2 if it has classes."""
    network = model_config("ImageDiffit-Tiny", **network)
    classes = CLASSES[: network.num_classes]
    config = CheckpointConfig(
        "ImageDiffit-Tiny",
        network,
        process="edm",
        sampling=SamplingConfig("heun", num_sampling_steps=4),
        guidance=GuidanceConfig(scale=2.0 if classes else 1.0, channels="all"),
        codec=CodecConfig("pixels", factor=1),
        class_names=classes,
    )
    path = folder / f"image_{network.num_classes}.safetensors"
    save_checkpoint(path, random_network(network).state_dict(), config)
    return path


def write_cifar10_files(folder: Path, patch: pytest.MonkeyPatch, count: int = 12) -> Path:
    """Random images in the format and under the names of CIFAR-10; torchvision is told their checksums."""
    from torchvision.datasets import CIFAR10

    random = np.random.default_rng(0)
    (folder / CIFAR10.base_folder).mkdir(parents=True)

    def write(name: str, content: dict) -> str:
        data = pickle.dumps(content)
        (folder / CIFAR10.base_folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(name: str) -> list[str]:
        pixels = random.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8)
        return [name, write(name, {"data": pixels, "labels": random.integers(0, 10, count).tolist()})]

    names = [f"class {i}" for i in range(10)]
    patch.setattr(CIFAR10, "train_list", [batch(name) for name, _ in CIFAR10.train_list])
    patch.setattr(CIFAR10, "test_list", [batch(name) for name, _ in CIFAR10.test_list])
    meta = CIFAR10.meta["filename"]
    patch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": write(meta, {"label_names": names})})
    return folder


def write_fashion_files(folder: Path, count: int = 64, images: np.ndarray | None = None, stem: str = "train") -> Path:
    """Images, random ones if none are given, as Fashion-MNIST's files of training (train) or test (t10k)."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    if images is None:
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = random.integers(0, 10, len(images), dtype=np.uint8)
    for name, array in ((f"{stem}-images-idx3-ubyte.gz", images), (f"{stem}-labels-idx1-ubyte.gz", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        with gzip.open(folder / name, "wb") as file:
            file.write(header + array.tobytes())
    return folder


def count_parameters(model: torch.nn.Module) -> int:
    """Number of parameters, the fixed position embedding included."""
    return sum(p.numel() for p in model.parameters())
