"""Image data sets as arrays: uint8 images [N, H, W, C], int64 labels [N] and the names of the classes."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Where Debian's dataset-fashion-mnist keeps the original files.
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class ImageArrays:
    """A data set in memory."""

    images: NDArray[np.uint8]  # [N, H, W, C]
    labels: NDArray[np.int64]  # [N]
    class_names: tuple[str, ...]


def fashion_mnist(path: str | Path | None = None, train: bool = True) -> ImageArrays:
    """Fashion-MNIST, 28x28 grey padded with black to 32x32: [60000 or 10000, 32, 32, 1].

    path: the folder of the four original files (gzipped or not). By default the one that Debian's package
    dataset-fashion-mnist installs, or else `data/`, to which torchvision downloads the same files once.

    Raises:
        FileNotFoundError: if a path is named that does not hold the files.
    """
    folder = _fashion_folder(Path(path) if path else None)
    stem = "train" if train else "t10k"
    images = np.pad(_read_idx(folder, f"{stem}-images-idx3-ubyte"), ((0, 0), (2, 2), (2, 2)))
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte")
    return ImageArrays(images[..., None], labels.astype(np.int64), FASHION_CLASSES)


def cifar10(path: str | Path | None = None) -> ImageArrays:
    """The training images of CIFAR-10, RGB: [50000, 32, 32, 3].

    path: the folder that holds cifar-10-batches-py; by default data/, to which torchvision downloads it once.

    Raises:
        FileNotFoundError: if a path is named that does not hold the files.
        ValueError: if the download fails.
    """
    from torchvision.datasets import CIFAR10

    if path is None:
        data = _downloaded("CIFAR-10", lambda: CIFAR10("data", download=True))
    else:
        try:
            data = CIFAR10(path)
        except RuntimeError as error:  # of files that are missing or corrupted
            raise FileNotFoundError(
                f"{path} does not hold CIFAR-10, or not whole: expected cifar-10-batches-py there; leave the path out to "
                "have it downloaded"
            ) from error
    return ImageArrays(data.data, np.asarray(data.targets, np.int64), tuple(data.classes))


def _fashion_folder(path: Path | None) -> Path:
    if path is not None or DEBIAN_FASHION.is_dir():
        return path or DEBIAN_FASHION
    from torchvision.datasets import FashionMNIST

    return Path(_downloaded("Fashion-MNIST", lambda: FashionMNIST("data", download=True)).raw_folder)


def _downloaded(name: str, download: Callable[[], T]) -> T:
    """What a data set of torchvision downloads.

    Raises:
        ValueError: if it cannot; torchvision fails in several ways.
    """
    try:
        return download()
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{name} cannot be downloaded ({reason}): check the network, or give --data.path the folder of a copy"
        ) from error


def _read_idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """A file in the IDX format of MNIST: zero, zero, type, number of dimensions, big-endian sizes, bytes."""
    for file, opener in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if file.exists():
            with opener(file, "rb") as stream:
                content = stream.read()
            dims = content[3]
            shape = np.frombuffer(content, ">i4", dims, offset=4)
            return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)
    raise FileNotFoundError(
        f"{folder} does not hold Fashion-MNIST: expected {name}.gz there; leave the path out to have it downloaded"
    )


DATASETS = {"fashion_mnist": fashion_mnist, "cifar10": cifar10}
