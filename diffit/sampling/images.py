"""From noise to images: `ImageSampler`, the one place where samples are drawn.

sample.py, the pictures and scores of training, the pipeline, the page and the benchmark hold one; `sample_images` is
a few lines on top of it. Letters: N samples, B samples of a batch, c channels and h = w side of what the network sees,
H x W x C of an image.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import which
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._triton import has_triton

from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import find_guide
from diffit.checkpoint.weights import load_model, load_weights
from diffit.codec import Codec, create_codec
from diffit.config import Precision
from diffit.diffusion import SampleNoise, create_sampler, guided_model
from diffit.diffusion.config import SKIP_BELOW, changed_sampling, check_process
from diffit.diffusion.samplers import Sampler, SamplerState
from diffit.models.fast import compiled, compiles, fast_precision, prepare_for_sampling
from diffit.sampling.labels import class_names, resolve_labels
from diffit.settings import Range, check_setting
from diffit.system.device import autocast, product_dtype, resolve_device, to_device

Callback = Callable[[int, int, Tensor], Any]


@dataclass(frozen=True)
class ImageSampler:
    """All that turns noise into images; `load` or `create` puts it together.

        pictures = ImageSampler.load("Diffit-Fashion")
        for state in pictures.states(range(4), pictures.labels(range(4), seed=0)):
            pictures.codec.decode(state.pred_xstart)  # what the network believes the images will be

    Sample i depends on (seed, i), its label and the settings alone: batches can be cut as memory allows.

    Args:
        network: (x [B, c, h, w], t [B], y [B]) -> prediction, on the codec's device.
        config: of the network: its size, process and guidance.
        sampler: of `create_sampler`, for that process.
        codec: from what the network sees to images.
        precision: of the network's products, for errors to name.
        guide: the network of autoguidance, called as the first one; None without.
    """

    network: Callable[..., Tensor]
    config: CheckpointConfig
    sampler: Sampler
    codec: Codec
    precision: str = "fp32"
    guide: Callable[..., Tensor] | None = None

    @classmethod
    def load(
        cls,
        path_or_name: str | Path,
        fast: bool = False,
        device: torch.device | str | None = None,
        guide: str | Path | None = None,
    ) -> ImageSampler:
        """The sampler of a checkpoint, with the settings that it recommends.

        Args:
            path_or_name: whatever `load_model` takes.
            fast: for previews, as sample.py's --fast True.
            device: where to sample; by default a GPU if there is one.
            guide: weights of the network of autoguidance, whatever `load_model` takes.

        Raises:
            ValueError: in one sentence, if it cannot be found, is damaged or does not fit.
        """
        model, config = load_model(path_or_name)
        config = changed(config, guide=str(guide) if guide else None)
        if fast and config.process_config.num_timesteps is not None:
            config = replace(config, guidance=replace(config.guidance, skip_below=SKIP_BELOW))
        place = torch.device(device) if device is not None else resolve_device("auto")
        return cls.create(model.requires_grad_(False), config, place, fast=fast)

    @classmethod
    def create(
        cls,
        model: nn.Module,
        config: CheckpointConfig,
        device: torch.device,
        *,
        precision: Precision | None = None,
        fast: bool = False,
        compile: bool | None = None,
        codec: Codec | None = None,
    ) -> ImageSampler:
        """The sampler of a network in eval mode, which is moved to the device.

        Args:
            config: its checkpoint's config; `load_model` returns both.
            precision: of matrix products; see `resolve_precision`.
            fast: replace the network's blocks by faster ones, in place.
            compile: compile network and VAE; see `resolve_compile`.
            codec: on the device; by default the checkpoint's, which is loaded.

        Raises:
            ValueError: in one sentence, if settings, VAE or the guide that the config names do not fit the network, or
                cannot be loaded.
        """
        sampler = fitting_sampler(config)
        compile = resolve_compile(compile, fast, device)
        codec = codec or create_codec(config.codec, device, compiled=compile)
        if codec.latent_channels not in (None, config.network.in_channels):
            raise ValueError(
                f"the VAE {config.codec.vae} has {codec.latent_channels} latent channels, {config.model} needs "
                f"{config.network.in_channels}: leave --vae out, or give one that fits"
            )
        precision = resolve_precision(precision, fast, device)
        weights = next(model.to(device).parameters()).dtype

        def prepared(model: nn.Module) -> Any:
            if not fast:
                fit = autocast(model, device, precision)
            else:
                fit = prepare_for_sampling(model.float(), product_dtype(precision))
            return compiled(fit) if compile else fit

        named = precision if weights == torch.float32 else str(weights).removeprefix("torch.")
        found = find_guide(config)
        guide = found and load_weights(found[0].fetch(), found[1]).requires_grad_(False).to(device)
        return cls(prepared(model), config, sampler, codec, named, guide and prepared(guide))

    def with_settings(self, **settings: Any) -> ImageSampler:
        """The same with other settings: `sampler`, `num_sampling_steps`, `cfg_scale`, `schedule` (of guidance).

        Raises:
            ValueError: in one sentence, if a setting does not fit the process.
        """
        config = changed(self.config, **settings)
        if config.guidance.guide != self.config.guidance.guide:
            raise ValueError("another guide needs another ImageSampler: name it to ImageSampler.load")
        return replace(self, config=config, sampler=fitting_sampler(config))

    def labels(self, indices: Sequence[int], seed: int, wanted: Sequence[int] = ()) -> Tensor:
        """Labels of samples: the wanted classes, repeated in turn, else drawn at random: int64 [B], on the device.

        num_classes is the label without a class, and the only one where the network has no classes.
        """
        num_classes = self.config.network.num_classes
        if not wanted and num_classes:
            return SampleNoise(seed, indices, (), self.codec.device).labels(num_classes)
        turns = wanted or [num_classes]
        return to_device(torch.tensor([turns[i % len(turns)] for i in indices]), self.codec.device)

    @torch.no_grad()  # of PyTorch: it holds within each step, and not where the states are read
    def states(self, indices: Sequence[int], labels: Tensor, seed: int = 0) -> Iterator[SamplerState]:
        """The states of these samples on their way from noise, the finished ones last; stop reading to stop sampling.

        Args:
            indices: numbers i of the samples [B]; all random numbers of a sample depend on (seed, i).
            labels: int64 [B]; see `labels`.

        Raises:
            ValueError: after the last step, naming sample, step and precision, if a state was not finite.
        """
        network = self.config.network
        noise = SampleNoise(seed, indices, (network.in_channels, *2 * [network.input_size]), labels.device)
        process, guidance = self.config.process_config, self.config.guidance
        sizes = network.num_classes, guidance, process, network.input_size
        denoiser = guided_model(self.network, labels, *sizes, self.guide)
        failed = torch.zeros_like(labels)  # the first step of each sample that is not finite; 0 where all are
        for state in self.sampler(denoiser, noise.start(), noise):
            wrong = ~state.x.flatten(1).isfinite().all(1)
            failed = torch.where(wrong & (failed == 0), state.step, failed)
            if state.step == state.num_steps and (failed > 0).any():  # read here alone: no other step waits
                first = int((failed > 0).int().argmax())
                raise ValueError(
                    f"sample {indices[first]} is not finite after step {failed[first]} of {state.num_steps} in "
                    f"{self.precision}: use a smaller guidance scale, a --precision of more bits, or intact weights"
                )
            yield state

    @torch.no_grad()
    def draw(self, indices: Sequence[int], labels: Tensor, seed: int = 0) -> Tensor:
        """The samples of these numbers, as `states` takes them: uint8 [B, H, W, C], on the device."""
        (last,) = deque(self.states(indices, labels, seed), maxlen=1)  # which keeps no other state in memory
        return self.codec.decode(last.x)


def resolve_precision(precision: Precision | None, fast: bool, device: torch.device) -> Precision:
    """The requested precision; by default fp32 or, to be fast, the 16 bits that the device computes with."""
    return precision or (fast_precision(device) if fast else "fp32")


def resolve_compile(compile: bool | None, fast: bool, device: torch.device) -> bool:
    """Whether to compile: as requested; by default where the sampler is to be fast and it pays, which is on CUDA.

    Raises:
        ValueError: if the machine has nothing to compile with.
    """
    if compile and not (has_triton() if device.type == "cuda" else which(os.environ.get("CXX", "g++"))):
        raise ValueError("--compile True needs Triton on a GPU and a C++ compiler elsewhere: leave --compile out")
    return (fast and compiles(device)) if compile is None else compile


def changed(
    config: CheckpointConfig,
    sampler: str | None = None,
    num_sampling_steps: int | str | None = None,
    cfg_scale: float | None = None,
    schedule: str | None = None,
    guide: str | None = None,
) -> CheckpointConfig:
    """A config with other settings of sampling and guidance, which scale or guide turn on; what is None stays."""

    def given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    changes = given(sampler=sampler, num_sampling_steps=num_sampling_steps)
    sampling = changed_sampling(config.process, config.sampling, **changes)
    enabled = None if cfg_scale is None and guide is None else True
    guidance = given(scale=cfg_scale, schedule=schedule, guide=guide, enabled=enabled)
    return replace(config, sampling=sampling, guidance=replace(config.guidance, **guidance))


def fitting_sampler(config: CheckpointConfig) -> Sampler:
    """The sampler that a config names.

    Raises:
        ValueError: in one sentence, if settings of sampling or guidance do not fit the process.
    """
    check_process(config.process_config, config.sampling, config.guidance)
    return create_sampler(config.process_config, config.sampling)


def sample_images(
    model: nn.Module,
    config: CheckpointConfig,
    num_samples: int = 16,
    *,
    seed: int = 0,
    class_labels: Sequence[int | str] | Tensor | NDArray[Any] | int | str | None = None,
    sampler: str | None = None,
    num_sampling_steps: int | str | None = None,
    cfg_scale: float | None = None,
    guide: str | None = None,
    batch_size: int = 16,
    device: torch.device | str | None = None,
    codec: Codec | None = None,
    callback: Callback | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw images from a network, as sample.py does with the same settings; what is None, the checkpoint recommends.

        images, labels = sample_images(*load_model("Diffit-Fashion"))

    Args:
        model: a network in eval mode; its products are of its weights' dtype.
        config: its checkpoint's config; `load_model` returns both.
        num_samples: N.
        seed: sample i depends on (seed, i) and the settings alone.
        class_labels: numbers or names of classes, repeated in turn; drawn at random per sample by default.
        sampler, num_sampling_steps: see `diffit.diffusion.config.SamplingConfig`.
        cfg_scale: guidance scale; 1 is no guidance.
        guide: weights of the network of autoguidance, all that `load_model` takes, loaded at every call.
        batch_size: samples at a time; it changes samples by no more than rounding.
        device: where to sample, to which the model is moved; by default where the model is.
        codec: from what the network sees to images, on the device; by default the checkpoint's, loaded at every call.
        callback: called after every step of every batch with (step, num_steps, x): x is the state of the batch
            [B, c, h, w], on the device.

    Returns uint8 images [N, H, W, C] and int64 labels [N] (all num_classes, the null label, without classes).

    Raises:
        ValueError: in one sentence, if a setting does not fit the model, or there is no such class.
    """
    for name, number in (("num_samples", num_samples), ("batch_size", batch_size)):
        check_setting(name, int, Range(at_least=1), number)
    if model.training:
        raise ValueError("the model is in training mode, in which labels are dropped: call model.eval() first")
    classes = resolve_labels(class_labels, class_names(config))
    config = changed(config, sampler, num_sampling_steps, cfg_scale, guide=guide)
    place = torch.device(device) if device is not None else next(model.parameters()).device
    pictures = ImageSampler.create(model, config, place, codec=codec)
    images, labels = [], []
    for start in range(0, num_samples, batch_size):
        indices = range(start, min(start + batch_size, num_samples))
        y = pictures.labels(indices, seed, classes)
        for state in pictures.states(indices, y, seed):
            if callback is not None:
                callback(state.step, state.num_steps, state.x)
        images.append(pictures.codec.decode(state.x).cpu().numpy())
        labels.append(y.cpu().numpy())
    return np.concatenate(images), np.concatenate(labels)
