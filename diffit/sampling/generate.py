"""The sampling loop: noise -> guided denoiser -> sampler -> codec -> shards -> one file.

Letters: B batch, c latent channels, h = w latent side.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffit
from diffit import distributed
from diffit.device import Precision, autocast, resolve_device, set_matmul_precision, to_device
from diffit.fast import compiles, fast_network, fast_precision
from diffit.files import as_tree, sha256
from diffit.sampling.config import SampleConfig, SampleTask
from diffit.sampling.folder import GRID, SampleFolder, save_grid, save_pngs
from diffit.sampling.writer import BackgroundWriter

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from tqdm import tqdm

    from diffit.codec import Codec
    from diffit.diffusion.gaussian import Model
    from diffit.diffusion.states import Sampler

log = logging.getLogger(__name__)
# Settings that do not change a sample; a resumed run may change them.
_FREE = ("log_dir", "batch_size", "save_png", "overwrite", "dry_run", "model_path")
_GRID_IMAGES = 36


def generate(task: SampleTask) -> Path:
    """Make the samples of a task, or the missing ones of them; returns the .npz.

    Raises:
        ValueError: in one sentence, for everything that a user can mend.
    """
    device = resolve_device(task.config.device)
    set_matmul_precision(resolve_precision(task.config, device))
    world = distributed.start(device)
    try:
        return Generation(task, device, world).run()
    finally:
        distributed.stop()


def resolve_precision(config: SampleConfig, device: torch.device) -> Precision:
    """The precision that was asked for; else fp32 or, to be fast, what the device is best at."""
    return config.precision or (fast_precision(device) if config.fast else "fp32")


def class_names(names: Sequence[str], num_classes: int) -> Sequence[str]:
    """The checkpoint's class names; ImageNet's for a model of 1000 unnamed classes; else the numbers."""
    if names:
        return names
    if num_classes == 1000:
        from timm.data import ImageNetInfo

        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(i).split(",")[0] for i in range(1000)]
    return [str(i) for i in range(num_classes)]


def resolve_labels(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Class numbers for numbers or names (in any case).

    Raises:
        ValueError: if there is no such class.
    """
    by_name = {name.lower(): index for index, name in reversed(list(enumerate(names)))}
    labels = []
    for text in wanted:
        index = int(text) if text.lstrip("-").isdigit() else by_name.get(text.lower(), -1)
        if not 0 <= index < len(names):
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(
                f"there is no class '{text}': choose a number from 0 to {len(names) - 1} or one of {shown}"
            )
        labels.append(index)
    return labels


class Generation:
    """One command's sampling, as seen by one process."""

    def __init__(self, task: SampleTask, device: torch.device, world: distributed.World) -> None:
        self.task, self.config, self.checkpoint = task, task.config, task.checkpoint
        self.device, self.world = device, world
        self.precision = resolve_precision(self.config, device)
        self.compiled = self.config.fast and compiles(device)
        self.num_classes = self.checkpoint.network.num_classes
        self.conditional = self.config.class_cond and self.num_classes > 0
        self.names = class_names(self.checkpoint.class_names, self.num_classes)
        self.wanted = resolve_labels(self.config.class_labels or [], self.names)
        folder = Path(self.config.log_dir or f"logs/{self.checkpoint.model}")
        self.folder = SampleFolder(folder, self.config.num_samples)
        # Compilation included; unknown where nothing was left to sample.
        self.seconds_per_image: float | None = None

    def run(self) -> Path:
        """Load, sample what is missing, merge."""
        from diffit.checkpoint import load_weights

        sampler = self._sampler()
        weights = distributed.on_main(self.world, self.task.source.fetch)
        self.settings = distributed.on_main(self.world, lambda: self._settings(weights))
        distributed.on_main(self.world, lambda: self.folder.prepare(self.settings, self.config.overwrite))
        if self.folder.finished() is None:
            model = load_weights(self.task.source.fetch(), self.checkpoint).requires_grad_(False).to(self.device)
            self._sample_missing(model, sampler)
        distributed.barrier(self.world)
        return distributed.on_main(self.world, self._finish)

    def _sampler(self) -> Sampler:
        from diffit.diffusion import create_sampler

        return create_sampler(self.config.process_config, self.config.sampling)

    def _settings(self, weights: Path) -> dict[str, Any]:
        """All that a sample depends on beside its number, for the manifest."""
        tree = {key: value for key, value in as_tree(self.config).items() if key not in _FREE}
        found = {"weights_sha256": sha256(weights), "vae": self.task.vae.vae, "device": self.device.type}
        return tree | found | {"precision": self.precision}

    def _sample_missing(self, model: nn.Module, sampler: Sampler) -> None:
        from tqdm import tqdm

        from diffit.codec import create_codec

        missing = distributed.on_main(self.world, self.folder.missing)
        batches = list(_batches(missing, self.config.batch_size))
        codec = create_codec(self.task.vae, self.device, self.compiled)
        self._check_codec(codec)
        network = self._network(model, sampler)
        mine = batches[self.world.rank :: self.world.size]
        share = f" (process 1 of {self.world.size})" if self.world.size > 1 else ""
        bar = tqdm(total=sum(map(len, mine)), unit="img", desc=f"sampling{share}", disable=not self.world.is_main)
        start = time.monotonic()
        with bar, BackgroundWriter(self._write) as writer:
            for indices in mine:
                images, labels = self._sample_batch(network, sampler, codec, indices, bar)
                writer.add(indices[0], images[: len(indices)], labels[: len(indices)])
                bar.update(len(indices))
        distributed.barrier(self.world)
        if missing:
            self.seconds_per_image = round((time.monotonic() - start) / len(missing), 4)

    def _network(self, model: nn.Module, sampler: Sampler) -> Any:
        """The network as the denoiser calls it: as it is, or prepared for speed."""
        if self.config.fast:
            return fast_network(model, sampler.times, self.precision, self.device)
        return autocast(model, self.device, self.precision)

    def _write(self, first: int, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        self.folder.add(first, images, labels)
        if self.config.save_png:
            save_pngs(self.folder.path / "png", first, images)

    def _check_codec(self, codec: Codec) -> None:
        if codec.latent_channels not in (None, self.checkpoint.network.in_channels):
            raise ValueError(
                f"the VAE {self.task.vae.vae} has {codec.latent_channels} latent channels, {self.checkpoint.model} "
                f"needs {self.checkpoint.network.in_channels}: leave --vae out, or give one that fits"
            )

    def _sample_batch(
        self, network: Any, sampler: Sampler, codec: Codec, indices: range, bar: tqdm[Any]
    ) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, H, W, C] and labels [B] of these samples, and perhaps of more."""
        import torch

        from diffit.diffusion import SampleNoise

        if self.compiled:  # a graph is made for one shape: a short batch is filled up
            indices = range(indices[0], indices[0] + min(self.config.batch_size, self.config.num_samples))
        config = self.checkpoint.network
        shape = (config.in_channels, config.input_size, config.input_size)
        noise = SampleNoise(self.config.seed, indices, shape, self.device)
        with torch.no_grad(), _explained_memory(self.config.batch_size):
            labels = self._labels(noise, indices)
            for state in sampler(self._denoiser(network, labels), noise.start(), noise):
                bar.set_postfix_str(f"step {state.step}/{state.num_steps}", refresh=False)
                bar.update(0)
            return codec.decode(state.x), labels

    def _labels(self, noise: Any, indices: range) -> Tensor:
        """Labels [B]: the classes asked for in turn, or drawn at random; all null if unconditional."""
        import torch

        if not self.conditional:
            return torch.full((len(indices),), self.num_classes, device=self.device)
        if self.wanted:
            return to_device(torch.tensor([self.wanted[i % len(self.wanted)] for i in indices]), self.device)
        return noise.labels(self.num_classes)

    def _denoiser(self, model: Any, labels: Tensor) -> Model:
        """(x, t) -> prediction for these labels, guided if the settings say so."""
        from diffit.diffusion import guided_model

        classes = self.num_classes if self.conditional else 0
        size = self.checkpoint.network.input_size
        return guided_model(model, labels, classes, self.config.guidance, self.config.process_config, size)

    def _finish(self) -> Path:
        """Grid, .npz, manifest: each appears whole, and a run killed in between makes the rest."""
        path = self.folder.finished()
        if path is None:
            self._save_grid()
            path = self.folder.merge(with_labels=self.conditional)
        self.folder.discard_shards()
        if not self.folder.complete:
            self.folder.write_manifest(self._manifest(path))
        return path

    def _manifest(self, path: Path) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "complete": True,
            "samples": path.name,
            "num_samples": self.config.num_samples,
            "seconds_per_image": self.seconds_per_image,
            "processes": self.world.size,
            "made_on": _machine(self.device),
            "versions": _versions(),
            "checkpoint": as_tree(self.checkpoint),
        }

    def _save_grid(self) -> None:
        import numpy as np

        images, labels = [], []
        for shard_images, shard_labels in self.folder.stream():
            images.append(shard_images)
            labels.append(shard_labels)
            if sum(map(len, images)) >= _GRID_IMAGES:
                break
        shown = np.concatenate(images)[:_GRID_IMAGES]
        numbers = np.concatenate(labels)[:_GRID_IMAGES]
        titles = [self.names[label] if label < self.num_classes else f"{i}" for i, label in enumerate(numbers)]
        save_grid(self.folder.path / GRID, shown, titles)


def _batches(missing: Sequence[int], batch_size: int) -> Iterator[range]:
    """Runs of consecutive missing numbers that do not cross a multiple of the batch size.

    A resumed run thus repeats the very batches that an undisturbed one has, and their arithmetic.
    """
    start = 0
    for position in range(1, len(missing) + 1):
        ends = position == len(missing) or missing[position] != missing[position - 1] + 1
        if ends or missing[position] % batch_size == 0:
            yield range(missing[start], missing[position - 1] + 1)
            start = position


@contextlib.contextmanager
def _explained_memory(batch_size: int) -> Iterator[None]:
    """Turns running out of device memory into advice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the device is out of memory at --batch_size {batch_size}: use a smaller one, the samples stay the same"
        ) from error


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "diffusers", "timm", "numpy")
    return {"diffit": diffit.__version__, "python": platform.python_version()} | {p: version(p) for p in packages}


def _machine(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
