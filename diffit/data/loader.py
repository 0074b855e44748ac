"""From a data set to training batches, which worker processes make ahead of their step.

    files or latent cache -> data set: key -> (x_start, label) -> NoisyBatches: + t, noise, drop_label -> DataLoader

All that is random about an image depends on (seed, how many images were seen before it): not on the batch it is in, on
ranks, workers, or a resumed run. Letters: b images of this rank's share of a batch, c channels and h = w side of what
the network sees.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffit.checkpoint.resolve import EMA_FILE, complete_checkpoints, read_metadata
from diffit.codec import Codec, PixelCodec, VAECodec
from diffit.data.augment import augment, draw_augmentation
from diffit.data.checked import decoded_once, unreadable_images, worker_count
from diffit.data.config import DataConfig
from diffit.data.datasets import (
    ImageDataset,
    PixelDataset,
    Unreadable,
    UnreadableImagesError,
    fitting_labels,
    listing,
    open_images,
)
from diffit.data.encode import encode_images
from diffit.data.files import ImageFiles
from diffit.data.latent_cache import MANIFEST, LatentCache, LatentDataset, open_cache
from diffit.data.parquet import in_memory
from diffit.data.sampler import BatchSampler, Key
from diffit.diffusion import Process
from diffit.diffusion.noise import RandomStream, keyed_generator
from diffit.system import distributed
from diffit.system.console import say, warn
from diffit.system.distributed import World
from diffit.system.files import cache_folder, check_apart

TrainingSet = PixelDataset | LatentDataset


class Batch(NamedTuple):
    """What one rank sees in a step.

    x_start and noise [b, c, h, w]; t [b], see `Process.draw_t`; conditions: the network's further arguments by keyword,
    each [b] or [b, features]: y, drop_label (bool) and, of augmented images, augment_labels.
    """

    x_start: Tensor
    noise: Tensor
    t: Tensor
    conditions: dict[str, Tensor]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; from pinned memory the copy does not wait for it."""
        x_start, noise, t = (tensor.to(device, non_blocking=True) for tensor in (self.x_start, self.noise, self.t))
        conditions = {name: tensor.to(device, non_blocking=True) for name, tensor in self.conditions.items()}
        return Batch(x_start, noise, t, conditions)


@dataclass(frozen=True)
class NoisyBatches(Dataset[Batch | ValueError]):
    """What a worker makes of the keys of a batch.

    Args:
        dataset: key -> (x_start [c, h, w], label).
        num_classes: of the network; without classes every label is its null label, 0.
        process: the diffusion process, which draws t.
        seed: of all that is drawn.
        label_dropout: probability that a label becomes null.
        augment: probability of each transform of EDM's augmentation; 0 is no augmentation at all.
    """

    dataset: TrainingSet
    num_classes: int
    process: Process
    seed: int
    label_dropout: float
    augment: float = 0.0

    def __getitem__(self, keys: Sequence[Key]) -> Batch | ValueError:
        """The batch, or what is wrong with its images: a DataLoader would bury the sentence of a raised error."""
        items: list[tuple[Tensor, int]] = []
        unreadable: list[Unreadable] = []
        for key in keys:
            try:
                items.append(self.dataset[key])
            except UnreadableImagesError as error:
                unreadable += error.images
        if unreadable:
            return UnreadableImagesError(unreadable)
        x_start = torch.stack([x for x, _ in items])
        y = fitting_labels(np.array([label for _, label in items]), self.num_classes)
        draws = [keyed_generator(self.seed, key.seen, RandomStream.CORRUPTION) for key in keys]
        t = np.concatenate([self.process.draw_t(draw, 1) for draw in draws])
        drop = np.array([draw.random() < self.label_dropout for draw in draws])
        noise = np.stack([draw.standard_normal(x_start.shape[1:], np.float32) for draw in draws])
        conditions = {"y": torch.from_numpy(y), "drop_label": torch.from_numpy(drop)}
        if self.augment:
            done = draw_augmentation(draws, self.augment)
            x_start, conditions["augment_labels"] = augment(x_start, done), done.labels()
        return Batch(x_start, torch.from_numpy(noise), torch.from_numpy(t), conditions)


def training_batches(
    batches: NoisyBatches, sampler: BatchSampler, workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    """The batches of the sampler's steps, on the device. Its workers end with it: close it, also after an error.

    Raises:
        UnreadableImagesError: at the step whose images cannot be decoded.
    """
    loader = DataLoader(
        batches,
        batch_size=None,  # the data set makes whole batches itself
        sampler=sampler,
        num_workers=worker_count(workers),
        worker_init_fn=_ignore_signals,
        pin_memory=device.type == "cuda",
    )
    iterator: Any = iter(loader)
    try:
        for batch in iterator:
            if isinstance(batch, ValueError):
                raise batch
            yield batch.to(device)
    except (OSError, EOFError) as error:  # as while a batch is taken over from a worker that is killed
        lost = [worker.pid for worker in getattr(iterator, "_workers", ()) if not worker.is_alive()]
        if lost:
            raise RuntimeError(f"DataLoader worker (pid {lost[0]}) is killed") from error
        raise
    finally:
        # An error's traceback keeps the iterator alive, and Python would wait for ever for workers that ignore the
        # SIGTERM by which it ends them.
        if loader.num_workers:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()


def _ignore_signals(worker: int) -> None:
    """A scheduler signals all processes of a job: the rank decides, and its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def open_training_set(
    config: DataConfig, codec: Codec, image_size: int, channels: int, *, seed: int, run_dir: Path, world: World
) -> TrainingSet:
    """The data set as the network sees it; a latent model's is encoded first, unless its cache is finished.

    Args:
        config: which images.
        codec: between images and the network.
        image_size: side of the images.
        channels: of the network's input.
        seed: of the draws from the VAE's posterior.
        run_dir: folder of the run, and of the latent cache if the config names none.
        world: all ranks call this.

    Raises:
        ValueError, FileNotFoundError: in one sentence, for what is wrong with data or cache.
    """
    check_apart(run_dir, config.path, "--run_dir")
    if isinstance(codec, PixelCodec):
        images = distributed.on_main(world, lambda: open_images(config.name, config.path, image_size, channels))
        if isinstance(images.source, ImageFiles):
            images = replace(images, source=in_memory(images.source))
        memory = cache_folder() / "checked_images"
        unreadable = unreadable_images(images, config.workers, memory, world)
        if unreadable and (not config.skip_unreadable or len(unreadable) == len(images)):
            raise UnreadableImagesError(unreadable)
        if unreadable and world.is_main:
            warn(f"left out {listing(unreadable)}")
        left_out = [image.index for image in unreadable]
        return _in_class_order(PixelDataset(decoded_once(images, memory, world), left_out), run_dir)
    folder = Path(config.cache).expanduser() if config.cache else run_dir / "cache"
    latents = _latents(config, codec, image_size, folder, world)
    latents.check(codec, image_size, config.flip)
    return _in_class_order(LatentDataset(latents, codec, seed), run_dir)


def _in_class_order(data: TrainingSet, run_dir: Path) -> TrainingSet:
    """The data set with its classes numbered as in the run's newest checkpoint, which may be older than this order."""
    for folder in reversed(complete_checkpoints(run_dir / "checkpoints")):
        try:
            config = read_metadata(folder / EMA_FILE)
        except ValueError:  # damaged: resuming passes it over too
            continue
        order = config.class_names if config else ()
        if order and sorted(order) == sorted(data.class_names):
            data.labels = np.array([order.index(name) for name in data.class_names])[data.labels]
            data.class_names = order
        break
    return data


def _latents(config: DataConfig, codec: VAECodec, image_size: int, folder: Path, world: World) -> LatentCache:
    """A finished cache, if it is of the data set that the config names or if that is not there; else one is made."""

    def find() -> LatentCache | ImageDataset:
        """What rank 0 finds for all: the cache, or else the images to make it of."""
        there = config.name != "folder" or (config.path is not None and Path(config.path).expanduser().exists())
        cache = open_cache(folder) if (folder / MANIFEST).exists() else None
        if cache and not there:
            if config.path:  # of a recipe, say: a finished cache needs no images
                say(f"there are no images at {config.path}: the latents in {folder} are taken as theirs")
            return cache
        images = open_images(config.name, config.path, image_size, codec.image_channels)
        if cache and images.source.fingerprint() != cache.settings.data:
            raise ValueError(f"the latents in {folder} are of other images: choose another --data.cache or --run_dir")
        return cache or images

    found = distributed.on_main(world, find)
    if isinstance(found, LatentCache):
        return found
    return encode_images(found, codec, folder, config, flip=config.flip, world=world)
