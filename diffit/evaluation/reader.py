"""Images out of .npz files, streamed: no file is ever whole in memory. And the statistics that a reference holds.

An .npz of ADM's format holds `arr_0`, uint8 images [N, H, W, C], perhaps `arr_1`, labels [N]; a reference may also hold
the moments of its whole data set: `mu, sigma` of FID's features and `mu_s, sigma_s` of sFID's.
Letters: N images, B of a batch, H x W x C of an image.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


class ImageFile:
    """One .npz with images: its header is read at once, its images when they are asked for.

    Attributes:
        count, image_shape: N and (H, W, C).
        keys: names of all arrays in the file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is no whole .npz file, or holds no uint8 images [N, H, W, 1 or 3].
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist: name a file samples_NxHxWxC.npz or a reference .npz")
        if self.path.stat().st_size == 0:
            raise ValueError(f"{self.path} is an empty file: it was never written; make or download it again")
        with self._damage_named(), zipfile.ZipFile(self.path) as archive:
            self.keys = tuple(name.removesuffix(".npy") for name in archive.namelist())
        if "arr_0" not in self.keys:
            found = ", ".join(self.keys) or "nothing"
            raise ValueError(
                f"{self.path} holds no array 'arr_0' (it holds {found}): save images [N, H, W, C] as arr_0"
            )
        with self._open() as (_, shape, dtype):
            if len(shape) != 4 or shape[-1] not in (1, 3):
                raise ValueError(
                    f"{self.path}: arr_0 has shape {[*shape]}, but images [N, H, W, C] with 1 or 3 channels are needed"
                )
            if dtype != np.uint8:
                raise ValueError(
                    f"{self.path}: arr_0 holds {dtype} images{self._range()}, but uint8 in 0..255 is needed; convert "
                    "them as the sampler does, ((x + 1) * 127.5) clamped to 0..255, if they are in -1..1"
                )
            if 0 in shape:
                raise ValueError(f"{self.path}: arr_0 is empty, shape {[*shape]}")
            self.count, self.image_shape = shape[0], shape[1:]

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Images]:
        """Images start, ..., stop - 1 as [B, H, W, C], in order, B = size but for the last.

        Raises:
            ValueError: if the file ends early, or its checksum is wrong.
        """
        stop = self.count if stop is None else stop
        image_bytes = int(np.prod(self.image_shape))
        with self._open() as (stream, _, _):
            stream.seek(start * image_bytes, 1)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                data = stream.read(count * image_bytes)
                if len(data) < count * image_bytes:
                    raise ValueError(f"{self.path} ends early, after {first} of {self.count} images: make it again")
                yield np.frombuffer(data, np.uint8).reshape(count, *self.image_shape)

    def array(self, name: str) -> NDArray | None:
        """A small array of the file, or None if it has none of this name."""
        if name not in self.keys:
            return None
        try:
            with self._damage_named(), np.load(self.path) as file:
                return file[name]
        except ValueError as error:  # NumPy refuses pickled objects with one
            raise ValueError(f"{self.path}: cannot read array '{name}' ({error})") from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
        """The images' data as a stream, with its shape and type."""
        with self._damage_named(), zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = header(stream)
            if fortran_order and len(shape) > 1:
                raise ValueError(f"{self.path}: 'arr_0' is stored in Fortran order; save np.ascontiguousarray of it")
            yield stream, shape, dtype

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, SyntaxError) as error:
            raise ValueError(f"{self.path} is not a whole .npz file ({error}): make or download it again") from error

    def _range(self) -> str:
        """The values of the first images of another type, in words."""
        with self._open() as (stream, shape, dtype):
            count = min(16, shape[0])
            if dtype.hasobject or not count:
                return ""
            values = np.frombuffer(stream.read(count * int(np.prod(shape[1:])) * dtype.itemsize), dtype)
        bad = int((~np.isfinite(values)).sum())
        finite = values[np.isfinite(values)]
        span = f" between {finite.min():g} and {finite.max():g}" if len(finite) else ""
        return f"{span}{f', {bad} of the first {len(values)} values NaN or infinite,' if bad else ''}"
