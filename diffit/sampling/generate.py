"""The work of sample.py: the samples of a command line, in shards as they come, then in one file.

Letters: B samples of a batch, H x W x C of an image.
"""

from __future__ import annotations

import contextlib
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffit
from diffit.checkpoint.config import CheckpointConfig
from diffit.checkpoint.resolve import find_guide
from diffit.checkpoint.weights import load_weights
from diffit.config import PIXELS
from diffit.sampling.config import SampleConfig, SampleTask
from diffit.sampling.folder import GRID, SampleFolder, draw_grid, save_png, save_pngs
from diffit.sampling.images import ImageSampler, fitting_sampler, resolve_compile, resolve_precision
from diffit.sampling.labels import class_names, resolve_labels
from diffit.settings import SAME, settings_that
from diffit.system import distributed
from diffit.system.console import progress
from diffit.system.device import explained_memory, resolve_device, set_matmul_precision
from diffit.system.files import as_tree, exclusive

_GRID_IMAGES = 36


def generate(task: SampleTask) -> Path:
    """Make the samples of a task, or the missing ones of them; returns the .npz.

    Raises:
        ValueError: in one sentence, for everything that a user can correct.
    """
    config, device = task.config, resolve_device(task.config.device)
    precision = resolve_precision(config.precision, config.fast, device)
    compile = resolve_compile(config.compile, config.fast, device)
    set_matmul_precision(precision)
    checkpoint, classes = _conditions(task)
    fitting_sampler(checkpoint)  # refuses before weights are fetched
    folder = SampleFolder(Path(config.log_dir or f"logs/{checkpoint.model}"), config.num_samples)
    less_memory = f"use a smaller --batch_size than {config.batch_size}, the samples stay the same"
    with distributed.joined(device) as world, distributed.main_only(world, exclusive(folder.path)):
        # Weights are fetched and hashed once, by rank 0; of a run that goes on, all take what is the newest to it.
        source, sha256 = distributed.on_main(world, lambda: (task.source, task.source.sha256()))
        guide, guide_sha256 = distributed.on_main(world, lambda: _guide(checkpoint))
        checkpoint = replace(checkpoint, guidance=replace(checkpoint.guidance, guide=guide))
        settings = _settings(config, vae=checkpoint.codec.vae, precision=precision, compile=compile)
        settings |= {"device": device.type, "weights_sha256": sha256}
        settings |= {"conversion": "rounded" if checkpoint.codec.vae == PIXELS else "truncated"}  # see `to_uint8`
        settings |= {"guide_sha256": guide_sha256} if guide_sha256 else {}
        defaults = as_tree(SampleConfig()) | {
            "precision": resolve_precision(None, config.fast, device),
            "compile": resolve_compile(None, config.fast, device),
        }
        folder.key = distributed.on_main(world, lambda: folder.prepare(settings, config.overwrite, defaults))
        missing = distributed.on_main(world, folder.missing)
        seconds_per_image = None  # unknown where nothing is left to sample
        if missing:
            model = load_weights(source.fetch(), task.checkpoint).requires_grad_(False)
            pictures = ImageSampler.create(
                model, checkpoint, device, precision=precision, fast=config.fast, compile=compile
            )
            mine = list(_batches(missing, config.batch_size))[world.rank :: world.size]  # every size-th batch
            start, done, count = time.monotonic(), 0, sum(map(len, mine))
            share = f" (rank 0 of {world.size})" if world.size > 1 else ""
            bar = progress(title=f"sampling{share}", show=world.is_main, unit="step")
            with explained_memory(less_memory), bar, _background() as write:
                for indices in mine:
                    drawn = indices
                    if compile:  # a graph is compiled for one shape: a short batch is filled up
                        drawn = range(indices[0], indices[0] + min(config.batch_size, config.num_samples))
                    labels = pictures.labels(drawn, config.seed, classes)
                    for state in pictures.states(drawn, labels, config.seed):
                        bar.total = len(mine) * state.num_steps
                        bar.update()
                    write(_save, folder, config, indices, pictures.codec.decode(state.x), labels)
                    done += len(indices)
                    bar.set_postfix_str(f"{done}/{count} images", refresh=False)
            distributed.barrier(world)
            seconds_per_image = round((time.monotonic() - start) / len(missing), 4)
        made = {"settings": settings, "seconds_per_image": seconds_per_image, "processes": world.size}
        return distributed.on_main(world, lambda: _finish(folder, task, made))


def _conditions(task: SampleTask) -> tuple[CheckpointConfig, list[int]]:
    """The checkpoint's config as it is sampled from, and the classes that are repeated in turn."""
    config, checkpoint = task.config, task.resolved
    classes = resolve_labels(config.class_labels, class_names(checkpoint))
    if config.class_cond and checkpoint.network.num_classes:
        return checkpoint, classes
    if checkpoint.guidance.guide is None:  # null labels cannot be guided towards
        checkpoint = replace(checkpoint, guidance=replace(checkpoint.guidance, enabled=False))
    return checkpoint, [checkpoint.network.num_classes]


def _settings(config: SampleConfig, **resolved: Any) -> dict[str, Any]:
    """All that a sample depends on beside its number, as a tree; weights are compared by their hash, not by name."""
    settings = {key: value for key, value in as_tree(config).items() if key in settings_that(SAME, SampleConfig)}
    del settings["guidance"]["guide"]
    return settings | resolved


def _finish(folder: SampleFolder, task: SampleTask, made: dict[str, Any]) -> Path:
    """Grid, .npz, manifest: each appears whole, and a run killed in between makes the rest."""
    folder.check_owner()
    names, config = class_names(task.checkpoint), task.config
    path = folder.finished()
    if path is None:
        pairs = ((image, label) for shard in folder.stream() for image, label in zip(*shard, strict=True))
        shown = list(itertools.islice(pairs, _GRID_IMAGES))
        titles = [names[y] if y < len(names) else f"{number}" for number, (_, y) in enumerate(shown)]
        save_png(folder.path / GRID, draw_grid([image for image, _ in shown], titles))
        path = folder.merge(with_labels=config.class_cond and task.checkpoint.network.num_classes > 0)
    folder.discard_shards()
    if not folder.read_manifest().get("complete"):
        on_cuda = made["settings"]["device"] == "cuda"
        machine = torch.cuda.get_device_name() if on_cuda else platform.processor() or platform.machine()
        versions = {name: version(name) for name in ("torch", "diffusers", "timm", "numpy")}
        versions |= {"diffit": diffit.__version__, "python": platform.python_version()}
        made |= {"complete": True, "samples": path.name, "num_samples": config.num_samples}
        folder.write_manifest(made | {"made_on": machine, "versions": versions, "checkpoint": as_tree(task.checkpoint)})
    return path


def _guide(checkpoint: CheckpointConfig) -> tuple[str | None, str | None]:
    """The weights of autoguidance, of a run those of its newest checkpoint, and their hash; they are fetched."""
    name, found = checkpoint.guidance.guide, find_guide(checkpoint)
    if found is None:
        return None, None
    path = found[0].path
    return str(path) if path and path.is_file() else name, found[0].sha256()


@contextlib.contextmanager
def _background() -> Iterator[Callable[..., None]]:
    """write(function, *arguments): files are written by a thread while the next batch is computed, one at a time.

    What a write raises is raised by the next one, or at the end of the block; finished work is written in any case.
    """
    with ThreadPoolExecutor(1) as thread:
        pending = [thread.submit(lambda: None)]

        def write(function: Callable[..., None], *arguments: Any) -> None:
            pending[-1].result()  # host memory holds the images of one batch beside those that are computed
            pending[:] = [thread.submit(function, *arguments)]

        yield write
        pending[-1].result()


def _save(folder: SampleFolder, config: SampleConfig, indices: range, images: Tensor, labels: Tensor) -> None:
    """Write a batch, without what filled it up; waits for the device."""
    pixels, classes = (tensor[: len(indices)].cpu().numpy() for tensor in (images, labels))
    folder.check_owner()
    if config.save_png:  # before the shard, which says that these samples are done
        save_pngs(folder.path / "png", indices[0], pixels)
    folder.add(indices[0], pixels, classes)


def _batches(missing: Sequence[int], batch_size: int) -> Iterator[range]:
    """Runs of consecutive missing numbers that do not cross a multiple of the batch size.

    A resumed run thus repeats the very batches that an undisturbed one has, and their arithmetic.
    """
    # Consecutive numbers grow as their positions do.
    for _, group in itertools.groupby(enumerate(missing), lambda pair: (pair[1] - pair[0], pair[1] // batch_size)):
        numbers = [number for _, number in group]
        yield range(numbers[0], numbers[-1] + 1)
