"""Data sets as streams of images, to make references of: a folder, a ZIP, an .npz, or a torchvision data set.

Letters: N images, H x W x C of one.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffit.evaluation.reader import ImageFile, Images

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class ImageSource:
    """Images by number, all of one shape.

    Args:
        count: N.
        read: number -> a Pillow image.
        image_size: side to which images are cropped and resized; None leaves them as they are.
        padding: black pixels added on every side afterwards.
    """

    def __init__(self, count: int, read: Callable[[int], Any], image_size: int | None, padding: int = 0) -> None:
        if not count:
            raise ValueError("the source holds no images (.png, .jpg, .webp or .bmp)")
        self.count, self._read, self._size, self._padding = count, read, image_size, padding
        self.image_shape = self[0].shape

    def __getitem__(self, number: int) -> Images:
        """Image [H, W, 1 or 3].

        Raises:
            ValueError: if it cannot be read, or its shape is not that of the first.
        """
        try:
            picture = self._read(number)
            picture = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
            if self._size is not None:
                picture = centre_crop(picture, self._size)
        except OSError as error:
            raise ValueError(f"image {number} of the source cannot be read ({error}): remove or replace it") from error
        pixels = np.asarray(picture, np.uint8)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        if self._padding:
            pixels = np.pad(pixels, ((self._padding,) * 2, (self._padding,) * 2, (0, 0)))
        if number and pixels.shape != self.image_shape:
            raise ValueError(
                f"image {number} of the source is {pixels.shape} and the first is {self.image_shape}: "
                "give --image_size to bring all to one size"
            )
        return pixels

    def batches(self, size: int, start: int, stop: int) -> Iterator[Images]:
        """Images start, ..., stop - 1 as [B, H, W, C]."""
        for first in range(start, stop, size):
            yield np.stack([self[number] for number in range(first, min(first + size, stop))])


def centre_crop(picture: Any, size: int) -> Any:
    """ADM's crop: halve with a box filter while twice too large, bring the short side to `size`, cut out the middle."""
    from PIL import Image

    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def open_source(name: str, image_size: int | None = None, root: str = "data", padding: int = 0) -> ImageSource:
    """The data set that a name means: a folder (with subfolders), a .zip, an .npz, or 'torchvision:CIFAR10'.

    root: where torchvision keeps its data sets, to which it downloads missing ones.

    Raises:
        ValueError: if there is no such data set, or it holds no images.
        FileNotFoundError: if a file is not there, or cannot be downloaded.
    """
    if name.startswith("torchvision:"):
        items = _torchvision(name.partition(":")[2], root)
        return ImageSource(len(items), lambda number: items[number][0], image_size, padding)
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES)
        return ImageSource(len(files), lambda number: _picture(files[number].read_bytes()), image_size, padding)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is no folder, .zip or .npz, and does not start with 'torchvision:'")
    if path.suffix == ".npz":
        return _npz_source(ImageFile(path), image_size, padding)
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name} is not a whole .zip file: make or download it again") from error
    members = sorted(member for member in archive.namelist() if Path(member).suffix.lower() in _SUFFIXES)
    return ImageSource(len(members), lambda number: _picture(archive.read(members[number])), image_size, padding)


def _picture(content: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content))


def _npz_source(file: ImageFile, image_size: int | None, padding: int) -> ImageSource:
    """Images of an .npz, which must fit into memory here: they are asked for by number."""
    from PIL import Image

    images = np.concatenate(list(file.batches(1024)))
    return ImageSource(len(images), lambda number: Image.fromarray(images[number].squeeze()), image_size, padding)


def _torchvision(name: str, root: str) -> Sequence[Any]:
    """A torchvision data set's training part, from disk or downloaded."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if kind is None:
        raise ValueError(
            f"torchvision has no data set '{name}'; its names are CIFAR10, CIFAR100, FashionMNIST, STL10, ..."
        )
    try:
        return kind(root, download=True)
    except TypeError:  # some have no download
        return kind(root)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"torchvision's {name} is not under {root} and cannot be downloaded ({error}): put its files there"
        ) from error
