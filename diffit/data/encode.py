"""Encode images into a latent cache: python -m diffit.data.encode --data.path /data/imagenet --out /data/latents

Any number of ranks decode, crop, encode with the VAE and write shards. Every shard is encoded in the same batches by
whichever rank, and written whole with a note beside it. So the number of ranks does not change shards (that of threads
may, in the last bit), and a stopped command goes on where it was.

Letters: n images of a shard, B of a batch, F flips, S image side, C its channels, c latent channels, h = w latent side.
"""

from __future__ import annotations

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("diffit.cli.encode:main")())

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffit.codec import CodecConfig, VAECodec
from diffit.data.checked import decode_ahead
from diffit.data.config import EncodeConfig, ImagesConfig
from diffit.data.datasets import ImageDataset, Unreadable, UnreadableImagesError, listing, open_images
from diffit.data.latent_cache import LABELS, MANIFEST, CacheSettings, LatentCache, Shard, open_cache, shard_is_whole
from diffit.system import distributed
from diffit.system.console import progress, say, warn
from diffit.system.device import resolve_device, set_matmul_precision
from diffit.system.distributed import World
from diffit.system.files import check_apart, difference, exclusive, explained_write, npy_bytes, write_atomically

_SETTINGS = "settings.json"  # of a cache in the making
_BATCH_PIXELS = 1 << 21  # 32 images at 256 pixels: a batch that fits small GPUs


def encode(config: EncodeConfig) -> None:
    """Make, or go on making, the latent cache that a config describes, and print what it holds.

    Raises:
        ValueError, FileNotFoundError: in one sentence, for everything that a user can fix.
    """
    device, folder, data = resolve_device(config.device), Path(config.out).expanduser(), config.data
    set_matmul_precision("tf32")
    check_apart(folder, data.path, "--out")
    with distributed.joined(device) as world:
        if data.name == "folder" and data.path is None:
            cache = open_cache(folder)
        else:
            codec = VAECodec(CodecConfig(config.vae), device)
            side, channels = config.image_size, codec.image_channels
            images = distributed.on_main(world, lambda: open_images(data.name, data.path, side, channels))
            flip, shard_size = config.flip, config.shard_size
            cache = encode_images(images, codec, folder, data, flip=flip, world=world, shard_size=shard_size)
        if world.is_main:
            if config.verify:
                cache.verify()
            classes = f" in {len(cache.class_names)} classes" if cache.class_names else ""
            flips = "with mirror images" if cache.settings.flips == 2 else "without mirror images"
            size = len(cache) * cache.settings.flips * np.prod(cache.shape) * 2  # bytes
            say(f"{folder}: {len(cache)} images{classes}, {flips}, {size / 1e9:.3g} GB")


def encode_images(
    images: ImageDataset,
    codec: VAECodec,
    folder: Path,
    config: ImagesConfig,
    *,
    flip: bool,
    world: World,
    shard_size: int = EncodeConfig.shard_size,
) -> LatentCache:
    """Write what is missing of the latent cache of a data set, every rank its share, and open it.

    Args:
        images: the data set, as large and of as many channels as the VAE is to see.
        codec: the VAE.
        folder: of the cache; what it holds of the same settings is kept.
        config: how many workers decode, and whether unreadable images are left out or, once the rest is encoded, fatal.
        flip: store the moments of the mirror images too.
        world: the ranks that encode.
        shard_size: images of a shard.

    Raises:
        ValueError: if images are unreadable, the folder holds a cache of other settings, or cannot be written.
    """
    settings = CacheSettings(
        vae=codec.reference,
        weights=codec.weights_hash(),
        scaling_factor=codec.scaling_factor,
        image_size=images.size,
        channels=images.channels,
        crop="centre crop of ADM",
        flips=1 + flip,
        data=images.source.fingerprint(),
        num_images=len(images),
        shard_size=shard_size,
    )
    making = _Making(folder, images, settings)
    advice = "free some space, or choose another folder, and run the same command again; finished shards are kept"
    with explained_write(f"latents to {folder}", advice), distributed.main_only(world, exclusive(folder)):
        missing = distributed.on_main(world, lambda: making.prepare(config.skip_unreadable))
        if missing is not None:
            _write_shards(making, codec, missing[world.rank :: world.size], config.workers, show=world.is_main)
            distributed.barrier(world)
            distributed.on_main(world, lambda: making.finish(config.skip_unreadable))
    cache = distributed.on_main(world, lambda: open_cache(folder))
    if cache.unreadable and world.is_main:
        warn(f"left out {listing(cache.unreadable)}")
    return cache


@torch.inference_mode()
def _write_shards(making: _Making, codec: VAECodec, numbers: list[int], workers: int, show: bool) -> None:
    """Make these shards. Memory holds one of them, in float16 [n, F, 2c, h, w]."""
    images, flips, shards = making.images, making.settings.flips, making.shards
    size = max(1, _BATCH_PIXELS // images.size**2)
    batches = [(n, indices) for n in numbers for indices in _pieces(shards[n], size)]
    decoded = decode_ahead(images, [indices for _, indices in batches], workers)
    parts: list[Tensor] = []
    unreadable: list[Unreadable] = []
    total = sum(len(indices) for _, indices in batches)
    with progress(title="encoding images", show=show, total=total, unit="img") as bar:
        for (number, indices), (pixels, damaged) in zip(batches, decoded, strict=True):
            unreadable += damaged
            if len(pixels):
                views = [pixels, pixels.flip(2)][:flips]
                parts.append(torch.stack([codec.encode_moments(view) for view in views], dim=1).half().cpu())
                if not parts[-1].isfinite().all():
                    raise ValueError(
                        f"the VAE {codec.reference} gives moments beyond float16: it does not fit these images"
                    )
            bar.update(len(indices))
            if indices[-1] == shards[number][-1]:
                making.write(number, torch.cat(parts) if parts else torch.empty(0, dtype=torch.float16), unreadable)
                parts, unreadable = [], []


def _pieces(indices: range, size: int) -> list[range]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@dataclass(frozen=True)
class _Making:
    """The folder of a cache in the making: settings.json, shards, and a note beside each shard that is whole."""

    folder: Path
    images: ImageDataset
    settings: CacheSettings

    @property
    def shards(self) -> list[range]:
        """The images of each shard."""
        return _pieces(range(len(self.images)), self.settings.shard_size)

    @property
    def notes(self) -> list[Path]:
        """The file that describes each shard once it is written."""
        return [self.folder / f"shard-{number:05d}.json" for number in range(len(self.shards))]

    def prepare(self, skip_unreadable: bool) -> list[int] | None:
        """The numbers of the shards to be made; None if the cache is finished and whole."""
        self._check_settings()
        with contextlib.suppress(ValueError):
            open_cache(self.folder)
            self._tidy()
            return None
        return [
            number
            for number, shard in enumerate(self._made())
            if shard is None or not shard_is_whole(self.folder, shard) or (shard.unreadable and not skip_unreadable)
        ]

    def _made(self) -> list[Shard | None]:
        """What is known of each shard, by its note, or by the manifest of a cache that is damaged now."""
        manifest = self.folder / MANIFEST
        trees = json.loads(manifest.read_text())["shards"] if manifest.exists() else [None] * len(self.notes)
        noted = [json.loads(note.read_text()) if note.exists() else None for note in self.notes]
        return [Shard.from_tree(new or old) if new or old else None for new, old in zip(noted, trees, strict=True)]

    def _check_settings(self) -> None:
        settings = asdict(self.settings)
        for path in (self.folder / MANIFEST, self.folder / _SETTINGS):
            if path.exists():
                try:
                    stored = json.loads(path.read_text())["settings"]
                except (ValueError, KeyError) as error:
                    raise ValueError(f"{path} is damaged: delete {self.folder} and encode again") from error
                changes = difference(stored, settings)
                if {**stored, "vae": ""} != {**settings, "vae": ""}:  # its weights say which VAE it is
                    advice = "choose another folder, or delete that one"
                    raise ValueError(f"{self.folder} holds latents made with other settings ({changes}): {advice}")
                return
        write_atomically(self.folder / _SETTINGS, json.dumps({"settings": settings}).encode())

    def write(self, number: int, moments: Tensor, unreadable: list[Unreadable]) -> None:
        """A shard, and then the note that says that it is there."""
        content, note = npy_bytes(moments.numpy()), self.notes[number]
        checksum = hashlib.sha256(content).hexdigest()
        shard = Shard(f"{note.stem}.npy", len(moments), checksum, len(content), tuple(unreadable))
        write_atomically(self.folder / shard.file, content)
        write_atomically(note, json.dumps(asdict(shard)).encode())

    def finish(self, skip_unreadable: bool) -> None:
        """Write the labels and, last, the manifest; the notes are in it."""
        shards = [shard for shard in self._made() if shard is not None]  # now all
        unreadable = [image for shard in shards for image in shard.unreadable]
        if unreadable and (not skip_unreadable or len(unreadable) == len(self.images)):
            raise UnreadableImagesError(unreadable)
        labels = np.delete(self.images.labels, [image.index for image in unreadable])
        label_file = npy_bytes(labels)
        full = next(shard for shard in shards if shard.count)
        tree = {
            "settings": asdict(self.settings),
            "images": len(labels),
            "shape": np.load(self.folder / full.file, mmap_mode="r").shape[2:],
            "class_names": self.images.class_names,
            "labels_sha256": hashlib.sha256(label_file).hexdigest(),
            "shards": [asdict(shard) for shard in shards],
        }
        write_atomically(self.folder / LABELS, label_file)
        write_atomically(self.folder / MANIFEST, json.dumps(tree, indent=1).encode())
        self._tidy()

    def _tidy(self) -> None:
        """Remove what only a cache in the making needs."""
        for path in (*self.notes, self.folder / _SETTINGS):
            path.unlink(missing_ok=True)
