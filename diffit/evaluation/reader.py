"""Images to be scored, streamed: out of an .npz, a folder or a ZIP. And the statistics that a reference holds.

An .npz of ADM's format holds `arr_0`, uint8 images [N, H, W, C], perhaps `arr_1`, labels [N]; a reference may also hold
the moments of its whole data set: `mu, sigma` of FID's features and `mu_s, sigma_s` of sFID's.
Letters: N images, B of a batch, H x W x C of an image.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffit.data.files import ImageFiles, enter_member, image_files, is_grey, square_pixels
from diffit.system.files import first_few, first_line

Images = NDArray[np.uint8]


class ImageFile:
    """One .npz with images: its header is read at once, its images when they are asked for.

    A reference may hold statistics and no images: then N is 0.

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
        self.count, self.image_shape = 0, (0, 0, 0)
        if "arr_0" not in self.keys:
            if set(self.keys) >= {"mu", "sigma"}:
                return
            found = first_few(self.keys) or "nothing"
            raise ValueError(
                f"{self.path} holds no array 'arr_0' (it holds {found}): save images [N, H, W, C] as arr_0"
            )
        with self._open() as (_, shape, dtype):
            if len(shape) != 4 or shape[-1] not in (1, 3):
                advice = "; transpose them by (0, 2, 3, 1)" if len(shape) == 4 and shape[1] in (1, 3) else ""
                raise ValueError(
                    f"{self.path}: arr_0 has shape {[*shape]}, but images [N, H, W, C] with 1 or 3 channels are needed"
                    f"{advice}"
                )
            if dtype != np.uint8:
                raise ValueError(f"{self.path}: arr_0 holds {dtype} images{self._range()}")
            if 0 in shape:
                raise ValueError(f"{self.path}: arr_0 is empty, shape {[*shape]}")
            self.count, self.image_shape = shape[0], shape[1:]

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Images]:
        """Images start, ..., stop - 1 as [B, H, W, C], in order, B = size but for the last.

        Raises:
            ValueError: if all images are read, and the file's checksum is wrong.
        """
        stop = self.count if stop is None else stop
        image_bytes = math.prod(self.image_shape)
        with self._open(start * image_bytes) as (stream, _, _):
            for first in range(start, stop, size):
                count = min(size, stop - first)
                yield np.frombuffer(stream.read(count * image_bytes), np.uint8).reshape(count, *self.image_shape)

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
    def _open(self, skip: int = 0) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
        """The images' data as a stream, from byte `skip` on, with its shape and type."""
        with (
            self._damage_named(),
            zipfile.ZipFile(self.path) as archive,
            archive.open("arr_0.npy") as stream,
            open(self.path, "rb") as file,
        ):
            major, _ = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = header(stream)
            if fortran_order and len(shape) > 1:
                raise ValueError(f"{self.path}: 'arr_0' is stored in Fortran order; save np.ascontiguousarray of it")
            member, start = archive.getinfo("arr_0.npy"), stream.tell()
            if not dtype.hasobject and member.file_size < start + math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{self.path} ends before the last of {shape[0]} images: make it again")
            if skip and member.compress_type == zipfile.ZIP_STORED:  # the archive's stream would read what it skips
                enter_member(file, member.header_offset)
                file.seek(start + skip, os.SEEK_CUR)
                yield file, shape, dtype
            else:
                stream.seek(skip, os.SEEK_CUR)
                yield stream, shape, dtype

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, SyntaxError) as error:
            raise ValueError(f"{self.path} is not a whole .npz file ({error}): make or download it again") from error

    def _range(self) -> str:
        """The values of the first images of another type, in words, and how to convert them."""
        with self._open() as (stream, shape, dtype):
            count = min(16, shape[0])
            if not count or dtype.kind not in "biuf":
                return ", but uint8 in 0..255 is needed"
            values = np.frombuffer(stream.read(count * int(np.prod(shape[1:])) * dtype.itemsize), dtype)
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        advice = "convert them by x.round().astype(np.uint8)"
        if high <= 1:
            formula = "(x + 1) * 127.5" if low < 0 else "x * 255"
            advice = f"convert them by ({formula}).round().clip(0, 255).astype(np.uint8)"
        elif low < 0 or high > 255:
            advice = f"bring them to 0..255, and {advice}"
        span = f" between {low:g} and {high:g}" if len(finite) else ""
        bad = len(values) - len(finite)
        damage = f", {bad} of the first {len(values)} values NaN or infinite" if bad else ""
        return f"{span}{damage}, but uint8 in 0..255 is needed; {advice}"


@dataclass(frozen=True)
class ListedImages:
    """A data set of torchvision, without its classes: items (picture, label), each made when asked for."""

    items: Sequence[tuple[Image.Image, object]]

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return f"image {index}"

    def picture(self, index: int) -> Image.Image:
        return self.items[index][0]

    def channels(self) -> int:
        return 1 if all(is_grey(picture) for picture, _ in self.items) else 3


class PictureFiles:
    """Pictures, read in order like the images of an .npz; grey ones become RGB if others have colours.

    Args:
        path: what to call them.
        source: the pictures.
        image_size: side of their centre crops; 0 leaves them as they are, which must then be of one size.

    Raises:
        ValueError: (also from `batches`) if a picture cannot be read, or is of another size than the first.
    """

    def __init__(self, path: Path, source: ImageFiles | ListedImages, image_size: int = 0) -> None:
        self.path, self.count, self._source, self._size = path, len(source), source, image_size or None
        self._labels = source.labels if isinstance(source, ImageFiles) and source.class_names else None
        self.keys = ("arr_0",) if self._labels is None else ("arr_0", "arr_1")
        self._channels = source.channels()
        self.image_shape = self._pixels(0).shape

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[Images]:
        """See `ImageFile.batches`."""
        stop = self.count if stop is None else stop
        for first in range(start, stop, size):
            batch = [self._pixels(index) for index in range(first, min(first + size, stop))]
            for index, image in enumerate(batch, first):
                if image.shape != self.image_shape:
                    shapes = ["x".join(map(str, shape)) for shape in (image.shape, self.image_shape)]
                    raise ValueError(
                        f"{self._source.name(index)} is {shapes[0]} and the first image is {shapes[1]}: resize them, "
                        "or give make_reference.py --image_size to bring all to one size"
                    )
            yield np.stack(batch)

    def array(self, name: str) -> NDArray | None:
        """The labels [N] as arr_1, if there are classes; see `ImageFile.array`."""
        return self._labels if name == "arr_1" else None

    def _pixels(self, index: int) -> Images:
        try:
            return square_pixels(self._source.picture(index), self._size, self._channels)
        except Exception as error:  # a decoder raises anything over a damaged file
            name = self._source.name(index)
            raise ValueError(f"cannot read {name} ({first_line(error)}): fix or remove it") from error


ImageSource = ImageFile | PictureFiles


def open_images(path: str | Path, image_size: int = 0) -> ImageSource:
    """The images of an .npz, or of a folder, ZIP or Parquet file of pictures (then of that size, 0: as they are).

    Raises:
        FileNotFoundError, ValueError: see `ImageFile` and `diffit.data.files.image_files`.
    """
    path = Path(path).expanduser()
    if path.is_dir() or path.suffix.lower() in (".zip", ".parquet"):
        return PictureFiles(path, image_files(path), image_size)
    return ImageFile(path)
