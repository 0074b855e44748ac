"""From noise to images: the one place where samples are drawn.

sample.py, the pictures and scores of training, and the benchmark all call `sample_batch`; `sample_images` is the same
for users of Python. Letters: N samples, B samples of a batch, c channels and h = w side of what the network sees,
H x W x C of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffit.checkpoint.config import CheckpointConfig
from diffit.codec import Codec, create_codec
from diffit.diffusion import SampleNoise, create_sampler, guided_model
from diffit.diffusion.config import check_process
from diffit.diffusion.samplers import Sampler
from diffit.sampling.labels import class_names, resolve_labels
from diffit.system.device import to_device

Callback = Callable[[int, int, Tensor], Any]


def sample_images(
    model: nn.Module,
    config: CheckpointConfig,
    num_samples: int = 16,
    *,
    seed: int = 0,
    class_labels: Sequence[int | str] | int | str | None = None,
    sampler: str | None = None,
    num_sampling_steps: int | str | None = None,
    cfg_scale: float | None = None,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    codec: Codec | None = None,
    callback: Callback | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw images from a network, as sample.py does with the same settings; what is None, the checkpoint recommends.

        images, labels = sample_images(*load_model("Diffit-Fashion"))

    Args:
        model: a network in eval mode.
        config: what its checkpoint says; `load_model` returns both.
        num_samples: N.
        seed: sample i depends on (seed, i) and the settings alone.
        class_labels: numbers or names of classes, repeated in turn; drawn at random per sample by default.
        sampler, num_sampling_steps: see `diffit.diffusion.config.SamplingConfig`.
        cfg_scale: guidance scale; 1 is no guidance.
        batch_size: samples at a time; it changes samples by no more than rounding.
        device: where to sample, to which the model is moved; by default where the model is.
        codec: from what the network sees to images, on the device; by default the checkpoint's, loaded at every call.
        callback: called after every step of every batch with (step, num_steps, x): x is the state of the batch
            [B, c, h, w], on the device.

    Returns uint8 images [N, H, W, C] and int64 labels [N] (all num_classes, the null label, without classes).

    Raises:
        ValueError: in one sentence, if a setting does not fit the model, or there is no such class.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be at least 1, not {num_samples} and {batch_size}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed must be between 0 and 2^64 - 1, not {seed}")
    if model.training:
        raise ValueError("the model is in training mode, in which labels are dropped: call model.eval() first")
    named = {"sampler": sampler, "num_sampling_steps": num_sampling_steps}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    sampling, guidance = replace(config.sampling, **given), config.guidance
    if cfg_scale is not None:
        guidance = replace(guidance, scale=cfg_scale, enabled=True)
    config = replace(config, sampling=sampling, guidance=guidance)
    check_process(config.process_config, sampling, guidance)
    listed = [class_labels] if isinstance(class_labels, int | str) else class_labels or []
    wanted = resolve_labels(listed, class_names(config))
    place = torch.device(device) if device is not None else next(model.parameters()).device
    draw = create_sampler(config.process_config, sampling)
    codec = codec or create_codec(config.codec, place)
    images, labels = [], []
    for start in range(0, num_samples, batch_size):
        indices = range(start, min(start + batch_size, num_samples))
        y = batch_labels(config, indices, seed, wanted, place)
        pixels = sample_batch(model.to(place), config, draw, codec, indices, y, seed=seed, callback=callback)
        images.append(pixels.cpu().numpy())
        labels.append(y.cpu().numpy())
    return np.concatenate(images), np.concatenate(labels)


@torch.no_grad()
def sample_batch(
    network: Callable[..., Tensor],
    config: CheckpointConfig,
    sampler: Sampler,
    codec: Codec,
    indices: Sequence[int],
    labels: Tensor,
    *,
    seed: int = 0,
    callback: Callback | None = None,
) -> Tensor:
    """Samples of these numbers: uint8 [B, H, W, C], on the device of the labels.

    Args:
        network: (x, t, y) -> prediction, on the device.
        config: of the network: its size, process and guidance.
        sampler: of `create_sampler`, for that process.
        codec: from what the network sees to images.
        indices: numbers i of the samples; every number a sample needs depends on (seed, i).
        labels: int64 [B]; see `batch_labels`.
        callback: see `sample_images`.
    """
    size = config.network.input_size
    noise = SampleNoise(seed, indices, (config.network.in_channels, size, size), labels.device)
    denoiser = guided_model(network, labels, config.network.num_classes, config.guidance, config.process_config, size)
    for state in sampler(denoiser, noise.start(), noise):
        if callback is not None:
            callback(state.step, state.num_steps, state.x)
    return codec.decode(state.x)


def batch_labels(
    config: CheckpointConfig,
    indices: Sequence[int],
    seed: int,
    wanted: Sequence[int],
    device: torch.device,
    conditional: bool = True,
) -> Tensor:
    """Labels int64 [B] of these samples: the wanted ones in turn, else drawn at random; all null if not conditional."""
    num_classes = config.network.num_classes
    if not (conditional and num_classes):
        return torch.full((len(indices),), num_classes, device=device)
    if wanted:
        return to_device(torch.tensor([wanted[i % len(wanted)] for i in indices]), device)
    return SampleNoise(seed, indices, (), device).labels(num_classes)
