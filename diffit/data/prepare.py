"""From the data node of a config to what a network learns from: pixels, or latents, which are cached first."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from diffit import distributed
from diffit.codec import Codec, PixelCodec, VAECodec
from diffit.data.batches import Clean, Latents, Pixels
from diffit.data.config import DataConfig
from diffit.data.datasets import Images, UnreadableImagesError, listing, open_images
from diffit.data.encoding import encode_images
from diffit.data.latents import MANIFEST, LatentCache, latent_stream, open_cache
from diffit.data.order import Plan
from diffit.data.streams import find_unreadable, image_stream
from diffit.distributed import World


class TrainingData(Protocol):
    """A data set, ready to be learnt from."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N]"""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty without classes."""

    @property
    def flip(self) -> bool:
        """Whether images are mirrored at random."""

    def clean(self, plan: Plan) -> Clean:
        """What a process sees of it."""


@dataclass(frozen=True)
class PixelData:
    """Images that a network sees as they are."""

    images: Images
    codec: PixelCodec
    config: DataConfig
    device: torch.device

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.images.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    @property
    def flip(self) -> bool:
        return self.config.flip and not self.config.augment  # which mirrors, and tells the network so

    def clean(self, plan: Plan) -> Clean:
        size = self.images.size
        stream = image_stream(self.images, plan, self.config.workers, self.device)
        return Pixels(stream, (size, size, self.images.channels), self.codec, plan, self.config.augment)


@dataclass(frozen=True)
class LatentData:
    """Images that a network sees through a VAE."""

    cache: LatentCache
    codec: VAECodec
    config: DataConfig
    device: torch.device

    @property
    def labels(self) -> NDArray[np.int64]:
        return self.cache.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.cache.class_names

    @property
    def flip(self) -> bool:
        return self.config.flip

    def clean(self, plan: Plan) -> Clean:
        stream = latent_stream(self.cache, plan, self.config.workers, self.device)
        return Latents(stream, self.cache.shape, self.codec, plan)


def prepare_data(
    config: DataConfig, codec: Codec, image_size: int, channels: int, cache: Path, world: World, device: torch.device
) -> TrainingData:
    """Open a data set; a latent model's is encoded first, unless its cache is finished.

    Args:
        config: which.
        codec: between images and the network.
        image_size: side of the images.
        channels: of the network's input.
        cache: where latents are cached if the config does not say.
        world: all processes call this.
        device: where batches go.

    Raises:
        ValueError, FileNotFoundError: in one sentence, for what is wrong with data or cache.
    """
    if isinstance(codec, PixelCodec):
        images = open_images(config.name, config.path, image_size, channels)
        if config.skip_unreadable:
            images = _readable(images, config.workers, world)
        return PixelData(images, codec, config, device)
    folder = Path(config.cache).expanduser() if config.cache else cache
    latents = _latents(config, codec, image_size, folder, world)
    latents.check(codec, image_size, config.flip)
    return LatentData(latents, codec, config, device)


def _latents(config: DataConfig, codec: VAECodec, image_size: int, folder: Path, world: World) -> LatentCache:
    """A finished cache, if it is of the data set that the config names or if it names none; else one is made."""
    finished = distributed.on_main(world, (folder / MANIFEST).exists)
    if finished and config.name == "folder" and config.path is None:
        return open_cache(folder)
    images = open_images(config.name, config.path, image_size, codec.image_channels)
    if finished:
        cache = open_cache(folder)
        if cache.settings.data != images.source.fingerprint():
            raise ValueError(f"the latents in {folder} are of other images: choose another --data.cache or --run_dir")
        return cache
    return encode_images(
        images,
        codec,
        folder,
        flip=config.flip,
        workers=config.workers,
        world=world,
        skip_unreadable=config.skip_unreadable,
    )


def _readable(images: Images, workers: int, world: World) -> Images:
    """The images less those that cannot be read, which are named."""
    unreadable = distributed.on_main(world, lambda: find_unreadable(images, workers))
    if len(unreadable) == len(images):
        raise UnreadableImagesError(unreadable)
    if unreadable and world.is_main:
        print(f"left out {listing(unreadable)}", file=sys.stderr)
    return images.keep(np.delete(np.arange(len(images)), [image.index for image in unreadable]))
