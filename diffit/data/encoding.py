"""Making a latent cache: decode, crop, encode with the VAE, write shards. By any number of processes.

Every shard is encoded in the same batches by whichever process, and written whole with a note beside it. So the number
of processes does not change shards (that of threads may, in the last bit), and a stopped command goes on where it was.

Letters: n images of a shard, B of a batch, F flips, S image side, C its channels, c latent channels, h = w latent side.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffit import distributed
from diffit.codec import VAECodec
from diffit.data.datasets import Images, Unreadable, UnreadableImagesError, listing
from diffit.data.latents import (
    MANIFEST,
    CacheSettings,
    LatentCache,
    Shard,
    npy_bytes,
    open_cache,
    shard_is_whole,
    write_manifest,
)
from diffit.data.streams import worker_count
from diffit.distributed import World
from diffit.files import difference, write_atomically

SHARD_SIZE = 1024
_SETTINGS = "settings.json"  # of a cache in the making
_BATCH_PIXELS = 1 << 21  # 32 images at 256 pixels: a batch that fits small GPUs


def encode_images(
    images: Images,
    codec: VAECodec,
    folder: Path,
    *,
    flip: bool,
    workers: int,
    world: World,
    skip_unreadable: bool = False,
    shard_size: int = SHARD_SIZE,
) -> LatentCache:
    """Write what is missing of the latent cache of a data set, every process its share, and open it.

    Args:
        images: the data set, as large and of as many channels as the VAE is to see.
        codec: the VAE.
        folder: of the cache; what it holds of the same settings is kept.
        flip: store the moments of the mirror images too.
        workers: processes that decode, per process.
        world: the processes that encode.
        skip_unreadable: leave unreadable images out, rather than stop once the rest is encoded.
        shard_size: images of a shard.

    Raises:
        ValueError: if images are unreadable, the folder holds a cache of other settings, or cannot be written.
    """
    settings = CacheSettings.of(images, codec, flip, shard_size)
    encoder = _Encoder(images, codec, folder, settings, workers)
    missing = distributed.on_main(world, lambda: encoder.prepare(skip_unreadable))
    encoder.run(missing[world.rank :: world.size], show=world.is_main)
    distributed.barrier(world)
    distributed.on_main(world, lambda: encoder.finish(skip_unreadable))
    cache = open_cache(folder)
    if cache.unreadable and world.is_main:
        print(f"left out {listing(cache.unreadable)}", file=sys.stderr)
    return cache


@dataclass(frozen=True)
class _Encoder:
    images: Images
    codec: VAECodec
    folder: Path
    settings: CacheSettings
    workers: int

    @property
    def num_shards(self) -> int:
        return -(-len(self.images) // self.settings.shard_size)

    def prepare(self, skip_unreadable: bool) -> list[int]:
        """Make the folder ready; returns the numbers of the shards to be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_settings()
            for leftover in self.folder.glob("*.part"):
                leftover.unlink()
            if self._is_finished():
                return []
            notes = [self._note(number) for number in range(self.num_shards)]
        except OSError as error:
            raise self._cannot_write(error) from error
        return [
            number
            for number, note in enumerate(notes)
            if note is None or not shard_is_whole(self.folder, note) or (note.unreadable and not skip_unreadable)
        ]

    def _check_settings(self) -> None:
        wanted = asdict(self.settings)
        for name in (MANIFEST, _SETTINGS):
            path = self.folder / name
            if path.exists():
                try:
                    found = json.loads(path.read_text())["settings"]
                except (ValueError, KeyError) as error:
                    raise ValueError(f"{path} is damaged: delete {self.folder} and encode again") from error
                if {**found, "vae": ""} != {**wanted, "vae": ""}:  # its weights say which VAE it is
                    raise ValueError(
                        f"{self.folder} holds latents made with other settings ({difference(found, wanted)}): choose "
                        "another folder, or delete that one"
                    )
                return
        write_atomically(self.folder / _SETTINGS, json.dumps({"settings": wanted}, indent=2).encode())

    def _is_finished(self) -> bool:
        """Whether the cache is complete; one whose files are missing or damaged is in the making again."""
        path = self.folder / MANIFEST
        if not path.exists():
            return False
        try:
            open_cache(self.folder)
        except ValueError:
            tree = json.loads(path.read_text())
            write_atomically(self.folder / _SETTINGS, json.dumps({"settings": tree["settings"]}, indent=2).encode())
            for number, shard in enumerate(tree["shards"]):
                write_atomically(self._note_path(number), json.dumps(shard).encode())
            path.unlink()
            return False
        self._tidy()
        return True

    def _tidy(self) -> None:
        """Remove what only a cache in the making needs."""
        for number in range(self.num_shards):
            self._note_path(number).unlink(missing_ok=True)
        (self.folder / _SETTINGS).unlink(missing_ok=True)

    def _note_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.json"

    def _note(self, number: int) -> Shard | None:
        """What is known of a shard that was made."""
        path = self._note_path(number)
        return Shard.from_tree(json.loads(path.read_text())) if path.exists() else None

    def run(self, numbers: list[int], show: bool) -> None:
        """Make these shards. Memory holds one of them."""
        share = sum(len(self._range(number)) for number in numbers)
        with tqdm(total=share, desc="encoding images", unit="img", disable=not show) as bar:
            parts: list[Tensor] = []
            unreadable: list[Unreadable] = []
            for batch in self._decoded(numbers):
                parts.append(self._moments(batch.images))
                unreadable += batch.unreadable
                bar.update(len(batch.indices))
                if batch.ends_shard:
                    self._write(batch.shard, torch.cat(parts).numpy(), unreadable)
                    parts, unreadable = [], []

    def _range(self, number: int) -> range:
        """The images of a shard."""
        size = self.settings.shard_size
        return range(number * size, min((number + 1) * size, len(self.images)))

    def _decoded(self, numbers: list[int]) -> Iterator[_Decoded]:
        """The images of these shards in batches, decoded ahead by worker processes."""
        count = max(1, _BATCH_PIXELS // self.images.size**2)
        jobs = []
        for number in numbers:
            indices = self._range(number)
            starts = range(0, len(indices), count)
            jobs += [_Job(number, indices[start : start + count], start == starts[-1]) for start in starts]
        workers = 0 if self.images.in_memory() is not None else worker_count(self.workers)
        return iter(DataLoader(_Decoder(self.images, jobs), batch_size=None, num_workers=workers))

    @torch.inference_mode()
    def _moments(self, images: Tensor) -> Tensor:
        """uint8 [B, S, S, C] -> float16 [B, F, 2c, h, w] on the CPU."""
        if not len(images):
            return torch.empty(0, dtype=torch.float16)
        flips = [images, images.flip(2)][: self.settings.flips]
        moments = torch.stack([self.codec.encode_moments(flip) for flip in flips], dim=1).half()
        if not moments.isfinite().all():
            raise ValueError(
                f"the VAE {self.codec.reference} gives moments beyond float16: it does not fit these images"
            )
        return moments.cpu()

    def _write(self, number: int, moments: NDArray[np.float16], unreadable: list[Unreadable]) -> None:
        """A shard, and then the note that says that it is there."""
        content = npy_bytes(moments)
        file = f"shard-{number:05d}.npy"
        checksum = hashlib.sha256(content).hexdigest()
        shard = Shard(file, len(moments), checksum, len(content), tuple(unreadable))
        try:
            write_atomically(self.folder / file, content)
            write_atomically(self._note_path(number), json.dumps(asdict(shard)).encode())
        except OSError as error:
            raise self._cannot_write(error) from error

    def finish(self, skip_unreadable: bool) -> None:
        """Write the labels and, last, the manifest; the notes are in it.

        Raises:
            UnreadableImagesError: if there are any and they are not to be skipped.
            ValueError: if no image is left, or the disk is full.
        """
        if (self.folder / MANIFEST).exists():
            return
        shards = [Shard.from_tree(json.loads(self._note_path(n).read_text())) for n in range(self.num_shards)]
        unreadable = [image for shard in shards for image in shard.unreadable]
        if unreadable and (not skip_unreadable or len(unreadable) == len(self.images)):
            raise UnreadableImagesError(unreadable)
        labels = np.delete(self.images.labels, [image.index for image in unreadable])
        full = next(shard for shard in shards if shard.count)
        channels, height, width = np.load(self.folder / full.file, mmap_mode="r").shape[2:]
        cache = LatentCache(
            self.folder, self.settings, (channels, height, width), self.images.class_names, labels, tuple(shards)
        )
        try:
            write_manifest(cache)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._tidy()

    def _cannot_write(self, error: OSError) -> ValueError:
        return ValueError(
            f"cannot write latents to {self.folder} ({error.strerror}): free some space, or choose another folder, and "
            "run the same command again; finished shards are kept"
        )


@dataclass(frozen=True)
class _Job:
    """Images to decode: those of one batch of a shard."""

    shard: int
    indices: range
    ends_shard: bool


@dataclass(frozen=True)
class _Decoded(_Job):
    """The same, decoded: uint8 [B, S, S, C] without the unreadable ones."""

    images: Tensor
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class _Decoder(Dataset[_Decoded]):
    """What a worker runs."""

    images: Images
    jobs: list[_Job]

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> _Decoded:
        job = self.jobs[index]
        images, unreadable = self.images.readable(job.indices)
        return _Decoded(job.shard, job.indices, job.ends_shard, torch.from_numpy(images), unreadable)
