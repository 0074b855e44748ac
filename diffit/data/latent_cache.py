"""Cached latents: the VAE's posterior moments of a data set, in a folder of shards that says what it is.

    manifest.json      how they were made, class names, and every shard with its count and checksum; written last
    labels.npy         int64 [N]
    shard-00000.npy    float16 [n, F, 2c, h, w]: mean and log variance, of the image and of its mirror image

Moments, not draws, so that training draws anew each time. They are float16: its 10 bits of mantissa are those of TF32,
in which the published models' latents were computed; the rounding, at most 2^-11 of a mean, drowns in the least noise
that training adds (a deviation of 0.01 to latents of unit deviation). It halves disk and traffic: 32 KiB an image at
256 pixels with both flips, 42 GB for ImageNet (at 512: 168 GB).

Letters: N images of the set, n of a shard, F flips (1 or 2), c latent channels, h = w latent side.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from diffit.codec import VAECodec, draw_latents
from diffit.data.datasets import Unreadable
from diffit.data.sampler import Key
from diffit.diffusion.noise import RandomStream, keyed_generator
from diffit.system.console import progress
from diffit.system.files import first_few, sha256

MANIFEST, LABELS = "manifest.json", "labels.npy"


@dataclass(frozen=True)
class CacheSettings:
    """Everything that the moments depend on."""

    vae: str
    weights: str  # SHA-256 of the VAE's
    scaling_factor: float
    image_size: int
    channels: int
    crop: str
    flips: int  # F
    data: str  # fingerprint of the data set
    num_images: int  # of the data set, with those that turn out unreadable
    shard_size: int
    format: int = 1


@dataclass(frozen=True)
class Shard:
    """A file of a cache, whose images are those of the data set in order, less the unreadable ones."""

    file: str
    count: int  # n
    sha256: str
    bytes: int
    unreadable: tuple[Unreadable, ...] = ()

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Shard:
        """The inverse of asdict. Raises KeyError or TypeError if the tree is of another version."""
        return cls(**{**tree, "unreadable": tuple(Unreadable(**image) for image in tree["unreadable"])})


@dataclass(frozen=True)
class LatentCache:
    """A finished cache. Reading takes nothing into memory but what is read.

    Args:
        folder: where it is.
        settings: how it was made.
        shape: (2c, h, w).
        class_names: of the data set.
        labels: int64 [N].
        shards: in order.
    """

    folder: Path
    settings: CacheSettings
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Images of the data set that were left out."""
        return tuple(image for shard in self.shards for image in shard.unreadable)

    def moments(self, index: int, flip: bool = False) -> Tensor:
        """Of an image, or of its mirror image: float16 [2c, h, w]; only they are read.

        The file is not mapped: a map that PyTorch makes counts as the process's own memory, and one of NumPy's keeps
        the file open, while there may be more shards than a process may open files.
        """
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard, values = self.shards[number], np.empty(self.shape, np.float16)
        row = (index - int(self._ends[number])) * self.settings.flips + int(flip)  # counted from the end, so below 0
        with open(self.folder / shard.file, "rb", buffering=0) as file:
            file.seek(shard.bytes + row * values.nbytes)
            file.readinto(values.data)
        return torch.from_numpy(values)

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """The number of the image that follows each shard."""
        return np.cumsum([shard.count for shard in self.shards])

    def verify(self) -> None:
        """Read every shard and compare its checksum.

        Raises:
            ValueError: naming the damaged ones.
        """
        shards = progress(self.shards, "checking shards", unit="shard")
        damaged = [shard.file for shard in shards if sha256(self.folder / shard.file) != shard.sha256]
        if damaged:
            what = f"{len(damaged)} of {len(self.shards)} shards in {self.folder} are damaged"
            raise ValueError(f"{what} ({first_few(damaged)}): delete them and encode again, only they are made anew")

    def check(self, codec: VAECodec, image_size: int, flip: bool) -> None:
        """Make sure that a run can learn from this cache.

        Raises:
            ValueError: in one sentence, if it was made with another VAE, image size, or without mirror images.
        """
        made, weights = self.settings, codec.weights_hash()
        if made.weights != weights:
            wrong = (
                f"were made with the VAE {made.vae} (weights {made.weights[:12]}), not {codec.reference} "
                f"({weights[:12]}): set --codec.vae to that one, or"
            )
        elif made.image_size != image_size:
            side = made.image_size
            wrong = f"are of images of {side}x{side}, but the network wants {image_size}x{image_size}:"
        elif flip and made.flips == 1:
            wrong = "hold no mirror images: add --data.flip False, or"
        else:
            return
        raise ValueError(f"the latents in {self.folder} {wrong} choose another --data.cache")


class LatentDataset(Dataset[tuple[Tensor, int]]):
    """What a latent network learns from: key -> (x_start float32 [c, h, w], label).

    x_start is a draw from the VAE's posterior, a new one each time that the image is seen.

    Args:
        cache: the posteriors' moments.
        codec: the VAE, whose normalisation latents have.
        seed: of the draws.
    """

    def __init__(self, cache: LatentCache, codec: VAECodec, seed: int) -> None:
        self.cache, self.seed = cache, seed
        self.labels, self.class_names = cache.labels, cache.class_names
        self.shape = (codec.latent_channels, *cache.shape[1:])
        self.normalisation = codec.normalisation  # on the CPU: workers never touch a GPU

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        moments = self.cache.moments(key.image, key.flip)[None].float()
        draw = keyed_generator(self.seed, key.seen, RandomStream.POSTERIOR)
        noise = torch.from_numpy(draw.standard_normal((1, *self.shape), np.float32))
        return draw_latents(moments, noise, *self.normalisation)[0], int(self.labels[key.image])


def open_cache(folder: Path) -> LatentCache:
    """A finished cache; the sizes of all files are compared with the manifest, and the labels' checksum.

    Raises:
        ValueError: if there is none, or a file is missing, cut off or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(f"{folder} holds no finished latent cache: make one with python -m diffit.data.encode")
    try:
        tree = json.loads(path.read_text())
        settings = CacheSettings(**tree["settings"])
        shards = tuple(Shard.from_tree(shard) for shard in tree["shards"])
        channels, height, width = tree["shape"]
        class_names, labels_hash = tuple(tree["class_names"]), tree["labels_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version ({error!r}): encode again elsewhere") from error
    wrong = [shard.file for shard in shards if not shard_is_whole(folder, shard)]
    if not (folder / LABELS).exists() or sha256(folder / LABELS) != labels_hash:
        wrong.append(LABELS)
    if wrong:
        what = f"{len(wrong)} files of the latent cache {folder} are missing or damaged"
        raise ValueError(f"{what} ({first_few(wrong)}): encode again, only they are made anew")
    labels = np.load(folder / LABELS)
    return LatentCache(folder, settings, (channels, height, width), class_names, labels, shards)


def shard_is_whole(folder: Path, shard: Shard) -> bool:
    """Whether its file is there with all of its bytes."""
    path = folder / shard.file
    return path.exists() and path.stat().st_size == shard.bytes
