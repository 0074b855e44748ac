"""References made of a folder, a ZIP, an .npz, or a torchvision data set.

Letters: N images, H x W x C of one.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffit.data.files import SUFFIXES, centre_crop
from diffit.evaluation.features import Backend
from diffit.evaluation.reader import ImageFile, Images
from diffit.evaluation.scores import collect
from diffit.system.files import npz_member


def read_images(
    name: str, image_size: int | None = None, root: str = "data", padding: int = 0
) -> tuple[int, Iterator[Images]]:
    """The data set that a name means: a folder (with subfolders), a .zip, an .npz, or 'torchvision:CIFAR10'.

    Returns N and the images in order, uint8 [H, W, 1 or 3]. image_size: side to which images are cropped and resized,
    None leaves them as they are; padding: black pixels that are then added on every side; root: where torchvision keeps
    its data sets, to which it downloads missing ones.

    Raises:
        ValueError: if there is no such data set, it holds no images, or (from the iterator) one that cannot be read or
            does not fit the first.
        FileNotFoundError: if a file is not there, or cannot be downloaded.
    """
    count, pictures = _pictures(name, root)
    if not count:
        raise ValueError("the source holds no images (.png, .jpg, .webp or .bmp)")

    def images() -> Iterator[Images]:
        shape: tuple[int, ...] = ()
        for number in range(count):
            try:
                picture = next(pictures)
                picture = picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
                pixels = np.array(picture if image_size is None else centre_crop(picture, image_size), np.uint8)
            except OSError as error:
                raise ValueError(
                    f"image {number} of the source cannot be read ({error}): remove or replace it"
                ) from error
            pixels = np.pad(pixels.reshape(*pixels.shape[:2], -1), ((padding,) * 2, (padding,) * 2, (0, 0)))
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise ValueError(
                    f"image {number} of the source is {pixels.shape} and the first is {shape}: give --image_size to "
                    "bring all to one size"
                )
            yield pixels

    return count, images()


def _pictures(name: str, root: str) -> tuple[int, Iterator[Image.Image]]:
    """How many pictures a data set has, and the pictures, which are opened when it is their turn."""
    path = Path(name)
    if name.startswith("torchvision:"):
        from torchvision import datasets

        set_name = name.partition(":")[2]
        kind = getattr(datasets, set_name, None)
        if kind is None:
            raise ValueError(
                f"torchvision has no data set '{set_name}'; its names are CIFAR10, CIFAR100, FashionMNIST, STL10, ..."
            )
        try:
            items = kind(root, download=True)
        except TypeError:  # some have no download
            items = kind(root)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"torchvision's {set_name} is not under {root} and cannot be downloaded ({error}): put its files there"
            ) from error
        return len(items), (items[number][0] for number in range(len(items)))
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        return len(files), map(Image.open, files)
    if not path.is_file():
        raise FileNotFoundError(f"{name} is no folder, .zip or .npz, and does not start with 'torchvision:'")
    if path.suffix == ".npz":
        file = ImageFile(path)
        return file.count, (Image.fromarray(image.squeeze()) for batch in file.batches(256) for image in batch)
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name} is not a whole .zip file: make or download it again") from error
    members = sorted(member for member in archive.namelist() if Path(member).suffix.lower() in SUFFIXES)
    return len(members), (Image.open(archive.open(member)) for member in members)


def make_reference(
    count: int, images: Iterator[Images], out: Path, backend: Backend, num_images: int, seed: int, batch_size: int
) -> tuple[int, ...]:
    """Write moments of all N images and `num_images` of the images themselves, drawn with the seed.

    The file appears under its name when whole. Returns the shape of what is stored, [M, H, W, C].
    """
    first = next(images)
    images = chain([first], images)
    stored = np.sort(np.random.default_rng(seed).permutation(count)[:num_images])
    shape, temporary = (len(stored), *first.shape), out.with_name(f"{out.name}.part")

    def batches(member: IO[bytes]) -> Iterator[Images]:
        """All images [B, H, W, C]; those to be stored are written as they pass by."""
        for start in range(0, count, batch_size):
            batch = np.stack([*islice(images, batch_size)])
            chosen = stored[(stored >= start) & (stored < start + len(batch))]
            member.write(batch[chosen - start].tobytes())
            yield batch

    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            with npz_member(archive, "arr_0", np.dtype(np.uint8), shape) as member:
                found = collect(batches(member), backend, count)
            arrays: dict[str, NDArray] = {"mu": found.moments.mean, "sigma": found.moments.covariance()}
            if found.spatial.count:
                arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance()}
            arrays["features"] = np.array(backend.name)
            for name, array in arrays.items():
                with npz_member(archive, name, array.dtype, array.shape) as member:
                    member.write(array.tobytes())
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return shape
