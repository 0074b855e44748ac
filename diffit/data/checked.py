"""Which images can be decoded: all are, once, before a training; what is found is remembered for the runs to come.

Letters: N images, S side, C channels.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from diffit.data.datasets import ImageArrays, ImageDataset, Unreadable
from diffit.data.files import ImageFiles, picture_of
from diffit.system import distributed
from diffit.system.console import progress
from diffit.system.ranks import World

_MOST_REMEMBERED = 1 << 31  # bytes of squares of a data set that are kept


def decode_ahead(
    images: ImageDataset, batches: Sequence[Sequence[int]], workers: int
) -> Iterator[tuple[Tensor, list[Unreadable]]]:
    """`images.readable` of each batch of indices, in their order, decoded ahead by worker processes."""
    # A loader without a batch size takes each item, here the indices of a batch, through collate_fn by itself.
    data: Any = batches
    return iter(DataLoader(data, batch_size=None, collate_fn=images.readable, num_workers=worker_count(workers)))


def unreadable_images(images: ImageDataset, workers: int, memory: Path, world: World) -> list[Unreadable]:
    """Decode all images once, every rank its part, and list those that cannot be.

    Files that could be decoded are remembered in the folder `memory` by name, size and time as the work goes on, with
    their squares where these are small, and no run on them decodes them again. A folder that cannot be written to
    remembers nothing.
    """
    source = images.source
    if isinstance(source, ImageArrays):
        return []
    file, record = _memory(images, memory)

    def fresh() -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Indices and stamps of the images that nobody has decoded yet."""
        with contextlib.suppress(OSError):
            memory.mkdir(parents=True, exist_ok=True)
        stamps = source.stamps()
        indices = np.flatnonzero(~np.isin(stamps, _remembered(file, record)))
        return indices, stamps[indices]

    own, stamps = (np.array_split(part, world.size)[world.rank] for part in distributed.on_main(world, fresh))
    starts = range(0, len(own), 64)

    def look() -> list[Unreadable]:
        found: list[Unreadable] = []
        decoded = decode_ahead(images, [own[first : first + 64].tolist() for first in starts], workers)
        with progress(title="checking images", show=world.is_main and len(own) > 0, total=len(own), unit="img") as bar:
            for first, (squares, unreadable) in zip(starts, decoded, strict=True):
                found += unreadable
                good = ~np.isin(own[first : first + 64], [image.index for image in unreadable])
                records = np.zeros(len(squares), record)
                records["stamp"] = stamps[first : first + 64][good]
                if "pixels" in record.fields:
                    records["pixels"] = squares.numpy()
                    records["crc"] = [zlib.crc32(square.tobytes()) for square in squares.numpy()]
                with contextlib.suppress(OSError), open(file, "ab") as out:
                    # A write that a full disk cut off is filled up to whole records; it ends with the stamp.
                    out.write(bytes(-out.tell() % record.itemsize) + records.tobytes())
                bar.update(len(good))
        return found

    parts = distributed.gather(world, distributed.on_all(world, look))
    return [image for part in parts for image in part]


def _memory(images: ImageDataset, folder: Path) -> tuple[Path, Any]:
    """The file in which decoded images are remembered, and the type of its records: stamps, and squares if small."""
    side, channels, name = images.size, images.channels, images.source.fingerprint()
    if len(images) * side**2 * channels > _MOST_REMEMBERED:
        return folder / name, np.dtype([("stamp", np.uint64)])
    square = np.dtype((np.uint8, (side, side, channels)))
    return folder / f"{name}-{side}x{channels}", np.dtype(
        [("pixels", square), ("crc", np.uint32), ("stamp", np.uint64)]
    )


def _remembered(file: Path, record: Any) -> NDArray[np.uint64]:
    """The stamps in such a file, by record."""
    if not file.is_file() or file.stat().st_size < record.itemsize:
        return np.empty(0, np.uint64)
    return np.array(np.memmap(file, record, "r", shape=file.stat().st_size // record.itemsize)["stamp"])


@dataclass(frozen=True)
class DecodedFiles(ImageFiles):
    """Pictures of which squares of the size that is learned are remembered: large photographs are decoded once.

    Args:
        squares: the file of `_memory`.
        record: type of its records.
        rows: int64 [N], the record of each picture; -1 for none.
        stamped: uint64 [N], the stamp of each picture: the file may have been deleted and made anew in another order.
    """

    squares: Path = Path()
    record: Any = None
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    stamped: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def picture(self, index: int, decode: bool = True) -> Image.Image:
        """The square, if it is there and intact; else as in `ImageFiles`."""
        if decode and self.rows[index] >= 0:
            with contextlib.suppress(OSError, ValueError, IndexError), open(self.squares, "rb", buffering=0) as file:
                file.seek(int(self.rows[index]) * self.record.itemsize)
                square = np.frombuffer(file.read(self.record.itemsize), self.record)[0]
                intact = zlib.crc32(square["pixels"].tobytes()) == square["crc"]
                if intact and square["stamp"] == self.stamped[index]:
                    return picture_of(square["pixels"])
        return super().picture(index, decode)


def decoded_once(images: ImageDataset, memory: Path, world: World) -> ImageDataset:
    """The data set with the squares that `unreadable_images` remembered in its folder `memory`."""
    source = images.source
    if isinstance(source, ImageArrays):
        return images
    file, record = _memory(images, memory)
    if "pixels" not in record.fields:
        return images

    def look_up() -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        number, stamps = {stamp: row for row, stamp in enumerate(_remembered(file, record).tolist())}, source.stamps()
        return np.array([number.get(stamp, -1) for stamp in stamps.tolist()], np.int64), stamps

    rows, stamps = distributed.on_main(world, look_up)
    decoded = DecodedFiles(**vars(source), squares=file, record=record, rows=rows, stamped=stamps)
    return replace(images, source=decoded)


def worker_count(most: int) -> int:
    """The number of worker processes: as many as this rank may use cores, at most `most`."""
    return min(most, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
