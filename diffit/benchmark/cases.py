"""What is measured: the models of the zoo at their published settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffit.checkpoint import BUNDLED, CheckpointConfig, default_config, find_checkpoint, load_weights
from diffit.codec import Codec, CodecConfig, VAECodec, create_codec
from diffit.diffusion import resolve_schedule
from diffit.diffusion.config import GuidanceConfig, ProcessConfig, SamplingConfig
from diffit.models.config import ImageDiffiTConfig, build_model

# Name -> (model, side of its images or None for its own, images at once on a GPU, on a CPU).
CASES: dict[str, tuple[str, int | None, int, int]] = {
    "Diffit-256": ("Diffit", 256, 16, 1),
    "Diffit-512": ("Diffit", 512, 8, 1),
    "ImageDiffit-CIFAR10": ("ImageDiffit-CIFAR10", None, 128, 8),
    "ImageDiffit-FFHQ64": ("ImageDiffit-FFHQ64", None, 64, 2),
    "Diffit-Fashion": ("Diffit-Fashion", None, 256, 16),
}


@dataclass(frozen=True)
class Case:
    """A model, and how it is sampled and trained.

    Args:
        checkpoint: what its checkpoint says, or would say.
        batch_size: images at once, before guidance doubles them.
        trained: whether its weights are; others are random.
    """

    name: str
    checkpoint: CheckpointConfig
    batch_size: int
    trained: bool

    @property
    def process(self) -> ProcessConfig:
        return self.checkpoint.edm if self.is_image else self.checkpoint.diffusion

    @property
    def is_image(self) -> bool:
        return isinstance(self.checkpoint.network, ImageDiffiTConfig)

    @property
    def sampling(self) -> SamplingConfig:
        return self.checkpoint.sampling

    @property
    def guidance(self) -> GuidanceConfig:
        return self.checkpoint.guidance

    @property
    def num_classes(self) -> int:
        return self.checkpoint.network.num_classes

    @property
    def guided(self) -> bool:
        return self.num_classes > 0 and self.guidance.enabled and self.guidance.scale != 1

    @property
    def skips(self) -> bool:
        """Whether its guidance weight comes near 1 anywhere."""
        schedule = resolve_schedule(self.guidance.schedule, self.checkpoint.network.input_size)
        return self.guided and not self.is_image and schedule == "power_cosine"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of what the network sees."""
        network = self.checkpoint.network
        return network.in_channels, network.input_size, network.input_size


def create_case(name: str, device: torch.device, weights: str | None = None) -> tuple[Case, nn.Module]:
    """A case and its network in eval mode: with the weights of a file or the bundled ones, else with random ones.

    Raises:
        ValueError: if there is no such case, or the file holds another network.
    """
    if name not in CASES:
        raise ValueError(f"there is no case '{name}': choose one of {', '.join(CASES)}")
    model_name, image_size, *sizes = CASES[name]
    size = sizes[0] if device.type == "cuda" else sizes[1]
    if weights is None and model_name not in BUNDLED:
        checkpoint = default_config(model_name, image_size)
        model = random_network(build_model(checkpoint.network))
    else:
        source, checkpoint = find_checkpoint(model_name, weights, image_size)
        model = load_weights(source.fetch(), checkpoint)
    trained = weights is not None or model_name in BUNDLED
    return Case(name, checkpoint, size, trained), model.eval().to(device)


def random_network(model: Any) -> nn.Module:
    """Fresh weights, but for a head that does not start at zero: predictions of unit size."""
    head = model.head if hasattr(model, "head") else model.final_layer.linear
    nn.init.xavier_uniform_(head.weight.flatten(1))
    return model


def case_codecs(case: Case, folder: Path, device: torch.device, compiled: bool) -> tuple[Codec, Codec]:
    """The codec of a case, plain and as `--fast True` has it.

    Without trained weights it is a VAE of Stable Diffusion's size, which is as fast untrained.
    """
    config = case.checkpoint.codec
    if not case.trained and not case.is_image:
        save_large_vae(folder)
        config = CodecConfig(str(folder), config.factor)
    plain = create_codec(config, device)
    if isinstance(plain, VAECodec):
        plain.vae.decoder.to(memory_format=torch.contiguous_format)
    return plain, create_codec(config, device, compiled)


def save_large_vae(folder: Path) -> None:
    """An untrained AutoencoderKL of the sizes of Stable Diffusion's: 83.7 M parameters, factor 8."""
    _save_vae(folder, (128, 256, 512, 512), layers_per_block=2)


def save_small_vae(folder: Path, factor: int) -> None:
    """A tiny untrained AutoencoderKL of a factor, a power of 2: its moments have the shape of a real one's."""
    _save_vae(folder, (8,) * factor.bit_length(), layers_per_block=1, norm_num_groups=4)


def _save_vae(folder: Path, channels: tuple[int, ...], **settings: int) -> None:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        latent_channels=4,
        scaling_factor=0.18215,
        **settings,
    )
    vae.save_pretrained(folder)
