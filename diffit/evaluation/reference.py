"""References made of a folder, a ZIP, an .npz, or a torchvision data set.

Letters: N images, M of them stored, H x W x C of one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from diffit.data.files import picture_of, square_pixels
from diffit.evaluation.features import Backend
from diffit.evaluation.reader import Images, ImageSource, ListedImages, PictureFiles, open_images
from diffit.evaluation.scores import collect
from diffit.system.files import npz_member, open_atomically


def open_source(name: str, image_size: int = 0, root: str = "data") -> ImageSource:
    """The images that a name means: of a folder, a .zip, an .npz, or 'torchvision:CIFAR10'.

    Args:
        name: path, or torchvision: and one of its data sets.
        image_size: side of the centre crop of pictures; 0 leaves them as they are.
        root: where torchvision keeps its data sets, to which it downloads missing ones.

    Raises:
        ValueError: if there is no such data set, it holds no images, or its first one cannot be read.
        FileNotFoundError: if a file is not there, or cannot be downloaded.
    """
    kind, _, set_name = name.partition(":")
    if kind != "torchvision":
        return open_images(name, image_size)
    from torchvision import datasets

    data_set = getattr(datasets, set_name, None)
    if data_set is None:
        raise ValueError(
            f"torchvision has no data set '{set_name}'; its names are CIFAR10, CIFAR100, FashionMNIST, STL10, ..."
        )
    try:
        items = data_set(root, download=True)
    except TypeError:  # some have no download
        items = data_set(root)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"torchvision's {set_name} is not under {root} and cannot be downloaded ({error}): put its files there"
        ) from error
    return PictureFiles(Path(name), ListedImages(items), image_size)


def make_reference(
    source: ImageSource,
    out: Path,
    backend: Backend,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    image_size: int = 0,
    padding: int = 0,
) -> tuple[int, ...]:
    """Write moments of all N images and M = `num_images` of the images themselves, drawn with the seed.

    Args:
        source: the images, from `open_source`.
        out: the file, which is whole or not there.
        backend: what makes features of images.
        num_images: M; all if there are fewer.
        seed: of the choice of those.
        batch_size: images at a time.
        image_size: side of the images' centre crop; 0 leaves them as they are.
        padding: black pixels that are then added on every side.

    Returns the shape of what is stored, [M, H, W, C].
    """
    if not source.count:
        raise ValueError(f"{source.path} holds statistics and no images: name the images themselves")
    stored = np.sort(np.random.default_rng(seed).permutation(source.count)[:num_images])
    height, width, channels = source.image_shape
    sides = (image_size or side for side in (height, width))
    shape = (len(stored), *(side + 2 * padding for side in sides), channels)

    def batches(member: IO[bytes]) -> Iterator[Images]:
        """All images [B, H, W, C]; those to be stored are written as they pass by."""
        start = 0
        for batch in source.batches(batch_size):
            if image_size and batch.shape[1:3] != (image_size, image_size):  # of an .npz
                batch = np.stack([square_pixels(picture_of(image), image_size, channels) for image in batch])
            batch = np.pad(batch, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
            chosen = stored[(stored >= start) & (stored < start + len(batch))]
            member.write(batch[chosen - start].tobytes())
            start += len(batch)
            yield batch

    with open_atomically(out) as file, zipfile.ZipFile(file, "w") as archive:
        with npz_member(archive, "arr_0", np.dtype(np.uint8), shape) as member:
            found = collect(batches(member), backend, source.count)
        arrays: dict[str, NDArray] = {"mu": found.moments.mean, "sigma": found.moments.covariance()}
        if found.spatial.count:
            arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance()}
        arrays["features"] = np.array(backend.name)
        for name, array in arrays.items():
            with npz_member(archive, name, array.dtype, array.shape) as member:
                member.write(array.tobytes())
    return shape
