"""What a step sees, by step number: from memory on the device, or read ahead by worker processes.

Both give the same for a step, whichever steps were asked for before; asking for one after the other is fast.

Letters: N images of the set, b of this process's part of a batch, S side, C channels.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffit.data.datasets import Images, Unreadable, UnreadableImagesError
from diffit.data.order import Picks, Plan
from diffit.device import to_device


class Stream(Protocol):
    """This process's part of every step's images or latent moments, on the device."""

    def __getitem__(self, step: int) -> Tensor: ...


class Readable(Protocol):
    """Whatever is read by number."""

    def read(self, picks: Picks) -> Tensor:
        """What was picked, [b, ...] on the CPU, mirrored where the picks say so."""


@dataclass(frozen=True)
class MemoryStream:
    """From a tensor that holds everything, both flips apart: [N, 2, ...], or [N, 1, ...] if none is mirrored."""

    items: Tensor
    plan: Plan

    def __getitem__(self, step: int) -> Tensor:
        picks = self.plan.picks(step)
        device = self.items.device
        return self.items[to_device(picks.index, device), to_device(picks.flip, device)]


@dataclass(frozen=True)
class ImageReader:
    """Images decoded when they are picked."""

    images: Images

    def read(self, picks: Picks) -> Tensor:
        """uint8 [b, S, S, C].

        Raises:
            UnreadableImagesError: naming all of these that cannot be decoded.
        """
        images, unreadable = self.images.readable(picks.index.tolist())
        if unreadable:
            raise UnreadableImagesError(unreadable)
        mirrored = picks.flip.astype(bool)
        images[mirrored] = images[mirrored, :, ::-1]
        return torch.from_numpy(images)


class WorkerStream:
    """Read by worker processes, some steps ahead. A step out of turn starts them anew.

    Args:
        reader: of what was picked.
        plan: what is picked.
        workers: how many processes read; without any it is read when asked for.
        device: where it goes.
    """

    def __init__(self, reader: Readable, plan: Plan, workers: int, device: torch.device) -> None:
        self.steps = _Steps(reader, plan)
        self.workers = worker_count(workers)
        self.device = device
        self._next = -1
        self._coming: Iterator[Tensor | Exception] = iter(())

    def __getitem__(self, step: int) -> Tensor:
        if step != self._next:
            self._coming = self._start(step)
        self._next = step + 1
        batch = next(self._coming)
        if isinstance(batch, Exception):
            raise batch
        return batch.to(self.device, non_blocking=True)

    def _start(self, step: int) -> Iterator[Tensor | Exception]:
        loader = DataLoader(
            self.steps,
            batch_size=None,
            sampler=_From(step),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)


def worker_count(wanted: int) -> int:
    """No more workers than this process may use cores."""
    return min(wanted, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@dataclass(frozen=True)
class _Steps(Dataset[Any]):
    """What a worker runs: a step number in, its batch out, or the error, whose sentence a raise would bury."""

    reader: Readable
    plan: Plan

    def __getitem__(self, step: int) -> Tensor | Exception:
        try:
            return self.reader.read(self.plan.picks(step))
        except ValueError as error:
            return error


@dataclass(frozen=True)
class _From(Iterable[int]):
    """first, first + 1, ..."""

    first: int

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


@dataclass(frozen=True)
class _Scan(Dataset[Any]):
    """Those of every 256 images that cannot be decoded."""

    images: Images

    def __len__(self) -> int:
        return -(-len(self.images) // 256)

    def __getitem__(self, number: int) -> list[Unreadable]:
        first = number * 256
        return self.images.readable(range(first, min(first + 256, len(self.images))))[1]


def find_unreadable(images: Images, workers: int) -> list[Unreadable]:
    """Decode all images once and list those that cannot be."""
    if images.in_memory() is not None:
        return []
    found = DataLoader(_Scan(images), batch_size=None, collate_fn=_as_it_is, num_workers=worker_count(workers))
    return list(itertools.chain.from_iterable(tqdm(found, desc="looking for unreadable images", unit="x256")))


def _as_it_is(values: Any) -> Any:
    return values


def image_stream(images: Images, plan: Plan, workers: int, device: torch.device) -> Stream:
    """uint8 images [b, S, S, C] by step; small sets that are in memory already are held on the device."""
    pixels = images.in_memory()
    if pixels is None:
        return WorkerStream(ImageReader(images), plan, workers, device)
    flips = [pixels, pixels[:, :, ::-1]] if plan.flip else [pixels]
    return MemoryStream(torch.from_numpy(np.stack(flips, axis=1)).to(device), plan)
