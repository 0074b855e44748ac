"""Image data sets: by name (Fashion-MNIST, CIFAR-10) or from a path (a folder or ZIP), seen as squares of one size.

A data set knows its labels and class names at once and decodes a picture when asked for it.

Letters: N images, S side, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from diffit.codec import PixelCodec
from diffit.data.config import DataName
from diffit.data.files import MODES, ImageFiles, image_files, picture_of, square_pixels
from diffit.data.sampler import Key
from diffit.system.console import say
from diffit.system.files import first_line
from diffit.system.ranks import detect_world

T = TypeVar("T")

_FASHION = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
FASHION_CLASSES = tuple(_FASHION.split(", "))
# Where Debian's dataset-fashion-mnist keeps the original files.
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Unreadable:
    """An image that cannot be decoded."""

    index: int  # in its data set
    name: str
    reason: str


def listing(images: Sequence[Unreadable]) -> str:
    """How many images, and the names of the first five."""
    shown = "; ".join(f"{image.name} ({image.reason})" for image in images[:5])
    more = len(images) - 5
    return f"{len(images)} image{'s' * (len(images) > 1)}: {shown}{f'; and {more} more' * (more > 0)}"


class UnreadableImagesError(ValueError):
    """Images that cannot be decoded; the first few are named."""

    def __init__(self, images: Sequence[Unreadable]) -> None:
        self.images = images
        super().__init__(images)  # and no text, so that it can be sent from a worker process

    def __str__(self) -> str:
        advice = "fix or remove them, or leave them out with --data.skip_unreadable True"
        return f"cannot read {listing(self.images)}: {advice}"


@dataclass(frozen=True)
class ImageArrays:
    """A data set in memory."""

    images: NDArray[np.uint8]  # [N, H, W, C]
    labels: NDArray[np.int64]  # [N]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"the data set's files hold {len(self.images)} images and {len(self.labels)} labels: get them again"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"image {index}"

    def picture(self, index: int) -> Image.Image:
        return picture_of(self.images[index])

    def headers(self) -> list[tuple[int, int, int]]:
        """As those of `ImageFiles`."""
        _, height, width, channels = self.images.shape
        return [(width, height, channels)] * len(self)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class ImageDataset(Dataset[tuple[NDArray[np.uint8], int]]):
    """A data set as squares of one size: index -> (uint8 [S, S, C], label).

    Args:
        source: of the pictures, at their own sizes.
        size: S; pictures are centre-cropped.
        channels: C.
    """

    source: ImageFiles | ImageArrays
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.source)

    @property
    def labels(self) -> NDArray[np.int64]:
        """[N], known without decoding; all 0 where there are no classes."""
        return self.source.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty where there are no classes."""
        return self.source.class_names

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Raises UnreadableImagesError if the picture cannot be decoded."""
        index = range(len(self))[index]  # may raise IndexError, which ends an iteration
        try:
            image = square_pixels(self.source.picture(index), self.size, self.channels)
        except Exception as error:  # a decoder raises anything over a damaged file
            raise UnreadableImagesError([Unreadable(index, self.source.name(index), first_line(error))]) from error
        return image, int(self.labels[index])

    def remarks(self) -> list[str]:
        """Which sizes and kinds the pictures have, and what is made of them, in lines."""
        headers = self.source.headers()
        if not headers:
            return ["sizes and kinds: unknown, as no image can be decoded"]
        sizes = Counter((width, height) for width, height, _ in headers)
        grey = sum(channels == 1 for _, _, channels in headers)
        known = [f"{width}x{height} ({count})" for (width, height), count in sizes.most_common(3)]
        kinds = [f"{name} ({count})" for name, count in (("RGB", len(headers) - grey), ("grey", grey)) if count]
        looked_at = f"of {len(headers)} looked at: " if len(headers) < len(self) else ""
        lines = [f"sizes and kinds: {looked_at}{', '.join(known)}{', ...' * (len(sizes) > 3)}; {', '.join(kinds)}"]
        if set(sizes) - {(self.size, self.size)}:
            lines.append(f"each is cropped to its central square and resized to {self.size}x{self.size}")
        if self.channels == 1 and grey < len(headers):
            lines.append("RGB images are made grey, which is what the network or VAE takes")
        if self.channels == 3 and grey:
            lines.append("grey images are made RGB, with three equal channels")
        return lines

    def readable(self, indices: Iterable[int]) -> tuple[Tensor, list[Unreadable]]:
        """Those of these images that can be decoded, uint8 [n, S, S, C], and the others."""
        images = [torch.empty(0, self.size, self.size, self.channels, dtype=torch.uint8)]
        unreadable: list[Unreadable] = []
        for index in indices:
            try:
                images.append(torch.from_numpy(self[index][0])[None])
            except UnreadableImagesError as error:
                unreadable += error.images
        return torch.cat(images), unreadable


class PixelDataset(Dataset[tuple[Tensor, int]]):
    """What a network of pixels learns from: key -> (x_start float32 [C, S, S] in [-1, 1], label).

    Args:
        images: the data set.
        left_out: those of its images that do not count, by index.
    """

    def __init__(self, images: ImageDataset, left_out: Sequence[int] = ()) -> None:
        self.images, self.class_names = images, images.class_names
        self.index = np.delete(np.arange(len(images)), left_out)
        self.labels = images.labels[self.index]
        self.shape = (images.channels, images.size, images.size)  # of x_start

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        image, _ = self.images[int(self.index[key.image])]
        x_start = PixelCodec().encode(torch.from_numpy(image)[None])[0]  # [C, S, S]
        return x_start.flip(-1) if key.flip else x_start, int(self.labels[key.image])


def open_images(name: DataName, path: str | None, size: int, channels: int, train: bool = True) -> ImageDataset:
    """A data set by name, or from a path; rank 0 prints what is there and what is made of it.

    train: the training split, not the test split, of a data set by name.

    Raises:
        ValueError: in one sentence, if there are no images, no path, or nothing can be done with that many channels.
        FileNotFoundError: if the path does not exist, or does not hold the named data set.
    """
    if channels not in MODES:
        raise ValueError(f"images of {channels} channels cannot be made: the network or VAE must take 1 or 3")
    if name == "fashion_mnist":
        source: ImageFiles | ImageArrays = fashion_mnist(path, train)
    elif name == "cifar10":
        source = cifar10(path, train)
    elif path is None:
        raise ValueError("name the images: --data.path FOLDER_OR_ZIP, or --data.name fashion_mnist or cifar10")
    else:
        source = image_files(path)
    images = ImageDataset(source, size, channels)
    if detect_world().is_main:
        say(*images.remarks())
    return images


def fitting_labels(labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """The labels for a network of that many classes: all 0, its null label, if it has none.

    Raises:
        ValueError: if a label is beyond them.
    """
    if num_classes == 0:
        return np.zeros_like(labels)
    if len(labels) and labels.max() >= num_classes:
        raise ValueError(
            f"the data has a label {labels.max()}, but the network has {num_classes} classes (0 to {num_classes - 1}): "
            f"set network.num_classes to {labels.max() + 1}, or leave it out"
        )
    return labels


def fashion_mnist(path: str | Path | None = None, train: bool = True) -> ImageArrays:
    """Fashion-MNIST, 28x28 grey padded with black to 32x32: [60000 or 10000, 32, 32, 1].

    path: the folder of the four original files (gzipped or not). By default the one that Debian's package
    dataset-fashion-mnist installs, or else `data/`, to which torchvision downloads the same files once.

    Raises:
        FileNotFoundError: if a path is named that does not hold the files.
    """
    if not path and not DEBIAN_FASHION.is_dir():
        from torchvision.datasets import FashionMNIST

        path = _downloaded("Fashion-MNIST", lambda: FashionMNIST("data", download=True)).raw_folder
    folder, stem = Path(path or DEBIAN_FASHION), "train" if train else "t10k"
    images = np.pad(_read_idx(folder, f"{stem}-images-idx3-ubyte"), ((0, 0), (2, 2), (2, 2)))
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte")
    return ImageArrays(images[..., None], labels.astype(np.int64), FASHION_CLASSES)


def cifar10(path: str | Path | None = None, train: bool = True) -> ImageArrays:
    """The images of CIFAR-10, RGB: [50000 or 10000, 32, 32, 3].

    path: the folder that holds cifar-10-batches-py; by default data/, to which torchvision downloads it once.

    Raises:
        FileNotFoundError: if a path is named that does not hold the files.
        ValueError: if the download fails.
    """
    from torchvision.datasets import CIFAR10

    if path is None:
        data = _downloaded("CIFAR-10", lambda: CIFAR10("data", train, download=True))
    else:
        try:
            data = CIFAR10(path, train)
        except RuntimeError as error:  # of files that are missing or corrupted
            raise FileNotFoundError(
                f"{path} does not hold CIFAR-10, or not whole: expected cifar-10-batches-py there; leave the path out "
                "to have it downloaded"
            ) from error
    return ImageArrays(data.data, np.asarray(data.targets, np.int64), tuple(data.classes))


def _downloaded(name: str, download: Callable[[], T]) -> T:
    """What a data set of torchvision downloads."""
    try:
        return download()
    except (OSError, RuntimeError) as error:  # torchvision fails in several ways
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{name} cannot be downloaded ({reason}): check the network, or give --data.path the folder of a copy"
        ) from error


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """A file in the IDX format of MNIST: zero, zero, type, number of dimensions, big-endian sizes, bytes."""
    for file, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if file.exists():
            try:
                with opener(file, "rb") as stream:
                    content = stream.read()
                dims = content[3]
                shape = np.frombuffer(content, ">i4", dims, offset=4)
                return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
            except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
                raise ValueError(f"{file} is damaged ({first_line(error)}): get it again") from error
    raise FileNotFoundError(
        f"{folder} does not hold Fashion-MNIST: expected {name}.gz there; leave the path out to have it downloaded"
    )
