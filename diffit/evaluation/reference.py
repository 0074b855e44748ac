"""References: found among the public ones, or made of a folder, a ZIP, an .npz, or a torchvision data set.

Letters: N images, H x W x C of one.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from diffit.data.files import SUFFIXES, centre_crop
from diffit.evaluation.downloads import REFERENCES, cached
from diffit.evaluation.features import Backend
from diffit.evaluation.reader import ImageFile, Images
from diffit.evaluation.scores import collect
from diffit.files import npz_member


def find_reference(samples: ImageFile) -> Path:
    """ADM's reference for the size of these samples, from the cache or fetched.

    Raises:
        ValueError, FileNotFoundError: if there is none for the size, or it cannot be fetched.
    """
    height, width = samples.image_shape[:2]
    if height != width or height not in REFERENCES:
        raise ValueError(
            f"there is no public reference for {height}x{width} images: make one with evaluations/make_reference.py"
        )
    return cached(REFERENCES[height])


@dataclass(frozen=True)
class ImageSource:
    """Images by number, all of one shape."""

    count: int
    image_shape: tuple[int, ...]
    read: Callable[[int], Images]  # number -> image [H, W, 1 or 3]


def open_source(name: str, image_size: int | None = None, root: str = "data", padding: int = 0) -> ImageSource:
    """The data set that a name means: a folder (with subfolders), a .zip, an .npz, or 'torchvision:CIFAR10'.

    image_size: side to which images are cropped and resized, None leaves them as they are; padding: black pixels that
    are then added on every side; root: where torchvision keeps its data sets, to which it downloads missing ones.

    Raises:
        ValueError: if there is no such data set, it holds no images, or (from `read`) one that does not fit the first.
        FileNotFoundError: if a file is not there, or cannot be downloaded.
    """
    count, open_picture = _pictures(name, root)
    if not count:
        raise ValueError("the source holds no images (.png, .jpg, .webp or .bmp)")

    def pixels(number: int) -> Images:
        try:
            picture = open_picture(number)
            picture = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
            found = np.array(picture if image_size is None else centre_crop(picture, image_size), np.uint8)
        except OSError as error:
            raise ValueError(f"image {number} of the source cannot be read ({error}): remove or replace it") from error
        return np.pad(found.reshape(*found.shape[:2], -1), ((padding,) * 2, (padding,) * 2, (0, 0)))

    shape = pixels(0).shape

    def read(number: int) -> Images:
        found = pixels(number)
        if found.shape != shape:
            raise ValueError(
                f"image {number} of the source is {found.shape} and the first is {shape}: give --image_size to bring "
                "all to one size"
            )
        return found

    return ImageSource(count, shape, read)


def _pictures(name: str, root: str) -> tuple[int, Callable[[int], Image.Image]]:
    """How many pictures a data set has, and the function that reads one."""
    path = Path(name)
    if name.startswith("torchvision:"):
        items = _torchvision(name.partition(":")[2], root)
        return len(items), lambda number: items[number][0]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        return len(files), lambda number: Image.open(files[number])
    if not path.is_file():
        raise FileNotFoundError(f"{name} is no folder, .zip or .npz, and does not start with 'torchvision:'")
    if path.suffix == ".npz":  # must fit into memory here: images are asked for by number
        images = np.concatenate([*ImageFile(path).batches(1024)])
        return len(images), lambda number: Image.fromarray(images[number].squeeze())
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name} is not a whole .zip file: make or download it again") from error
    members = sorted(member for member in archive.namelist() if Path(member).suffix.lower() in SUFFIXES)
    return len(members), lambda number: Image.open(archive.open(members[number]))


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


def make_reference(source: ImageSource, out: Path, backend: Backend, num_images: int, seed: int, batch: int) -> None:
    """Write moments of all images of the source and `num_images` of the images themselves, drawn with the seed.

    The file appears under its name when whole.
    """
    numbers = range(source.count)
    batches = (np.stack([*map(source.read, numbers[i : i + batch])]) for i in range(0, source.count, batch))
    found = collect(batches, backend, source.count)
    arrays: dict[str, NDArray] = {"mu": found.moments.mean, "sigma": found.moments.covariance()}
    if found.spatial.count:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance()}
    arrays["features"] = np.array(backend.name)
    chosen = np.sort(np.random.default_rng(seed).permutation(source.count)[:num_images])
    temporary = out.with_name(f"{out.name}.part")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with npz_member(archive, name, array.dtype, array.shape) as member:
                member.write(array.tobytes())
        with npz_member(archive, "arr_0", np.dtype(np.uint8), (len(chosen), *source.image_shape)) as member:
            for number in tqdm(chosen, "storing images", leave=False):
                member.write(source.read(number).tobytes())
    os.replace(temporary, out)
