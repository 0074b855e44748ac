"""The loss on images that training does not see, of the first EMA, always at the same times and noise.

Letters: N held-out images, b images of a batch, c channels and h = w side of what the network sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from diffit.codec import VAECodec
from diffit.data.datasets import ImageDataset, fitting_labels, listing, open_images
from diffit.data.loader import Batch
from diffit.diffusion import create_process
from diffit.diffusion.noise import RandomStream, keyed_generator
from diffit.sampling.images import ImageSampler
from diffit.system import distributed
from diffit.system.ranks import World
from diffit.training.config import TrainConfig

_SEED = 0  # not that of training: runs of several seeds are compared at the same times and noise
_BATCH = 32  # the same for any number of ranks, so that no loss depends on who computes it
_ENCODED_AT_ONCE = 8
_BINS = 8


def create_validation(pictures: ImageSampler, config: TrainConfig, world: World) -> Callable[[], dict[str, float]]:
    """A function that gives the validation loss; every rank calls it and gets the same.

    `val_loss` is the mean of the training loss over the images, `val_loss_1` to `val_loss_8` that over the eighth of
    them with the least noise, ..., with the most. Image n is seen at the t, with the noise and, of latents, with the
    draw from the VAE's posterior that belong to n.

    Args:
        pictures: holds the network, its process and its codec.
        config: of the run.
        world: ranks that share the images.

    Raises:
        ValueError, FileNotFoundError: in one sentence, for what is wrong with the images.
    """
    images, labels = distributed.main_first(world, lambda: _held_out(pictures, config))
    count = min(config.validation.images, len(images))
    numbers = (np.arange(count) * len(images) // count).tolist()  # over all classes, which folders have in turn
    parts = [numbers[first : first + _BATCH] for first in range(0, count, _BATCH)]
    last = len(parts) - 1
    # Each rank takes every size-th part and as many as the others, as they compute a sharded network together.
    own = range(world.rank, -(-len(parts) // world.size) * world.size, world.size)
    batches = [_noisy(pictures, images, labels, parts[min(part, last)]) for part in own]
    process, device = create_process(pictures.config.process_config), pictures.codec.device

    @torch.no_grad()
    def own_losses() -> Tensor:
        """Loss and t of the images of this rank's parts, 0 for the others: [2, count]."""
        losses = torch.zeros(2, count, dtype=torch.float64)
        for part, batch in zip(own, batches, strict=True):
            x_start, noise, t, conditions = batch.to(device)

            def predict(x: Tensor, t: Tensor, conditions: dict[str, Tensor] = conditions) -> Tensor:
                return pictures.network(x, t, **conditions)

            loss = process.training_losses(predict, x_start, t, noise).loss
            if part <= last:
                losses[:, part * _BATCH : part * _BATCH + len(t)] = torch.stack([loss.double(), t.double()]).cpu()
        return losses

    def validate() -> dict[str, float]:
        found = distributed.on_all(world, own_losses)
        if world.size > 1:
            dist.all_reduce(found, group=world.patient)
        bins = np.array_split(found[0][found[1].argsort(stable=True)].numpy(), _BINS)
        eighths = {f"val_loss_{number}": float(each.mean()) for number, each in enumerate(bins, 1) if len(each)}
        return {"val_loss": found[0].mean().item()} | eighths

    return validate


def _held_out(pictures: ImageSampler, config: TrainConfig) -> tuple[ImageDataset, np.ndarray]:
    """The images, and their labels as the network has its classes: int64 [N]."""
    known, data, path = pictures.config, config.data, config.validation.path
    size = known.network.input_size * known.codec.factor
    channels = getattr(pictures.codec, "image_channels", known.network.in_channels)
    name = "folder" if path else data.name
    images = open_images(name, path or data.path, size, channels, train=False)
    if not known.network.num_classes or images.class_names == known.class_names:
        return images, fitting_labels(images.labels, known.network.num_classes)
    unknown = [each for each in images.class_names if each not in known.class_names]
    if unknown or not images.class_names:
        what = f"a class '{unknown[0]}', which those of --data.path lack" if unknown else "no classes"
        raise ValueError(f"the images of --validation.path have {what}: lay them out as those of --data.path")
    return images, np.array([known.class_names.index(each) for each in images.class_names])[images.labels]


@torch.no_grad()
def _noisy(pictures: ImageSampler, images: ImageDataset, labels: np.ndarray, numbers: Sequence[int]) -> Batch:
    """The images of these numbers, with their times and noise, on the CPU."""
    pixels, unreadable = images.readable(numbers)
    if unreadable:
        raise ValueError(f"--validation.path: cannot read {listing(unreadable)}: fix or remove them")
    process, network = create_process(pictures.config.process_config), pictures.config.network
    draws = [keyed_generator(_SEED, number, RandomStream.VALIDATION) for number in numbers]
    t = np.concatenate([process.draw_t(draw, 1) for draw in draws])
    shape = (network.in_channels, network.input_size, network.input_size)
    noise, posterior = (
        torch.from_numpy(np.stack([draw.standard_normal(shape, np.float32) for draw in draws])) for _ in range(2)
    )  # each [b, c, h, w]
    codec = pictures.codec
    if isinstance(codec, VAECodec):
        moments = torch.cat([codec.encode_moments(part) for part in pixels.split(_ENCODED_AT_ONCE)])
        x_start = codec.latents(moments, posterior.to(codec.device)).cpu()
    else:
        x_start = codec.encode(pixels)
    return Batch(x_start, noise, torch.from_numpy(t), {"y": torch.from_numpy(labels[list(numbers)])})
