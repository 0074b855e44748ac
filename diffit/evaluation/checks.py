"""What to find out about samples before hours are spent on them.

What makes scores meaningless is an error; what makes them differ from published ones is a warning.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diffit.evaluation.reader import ImageFile

PUBLISHED_COUNT = 50_000
_STATISTICS = {"mu", "sigma"}


def check_pair(reference: ImageFile, samples: ImageFile) -> list[str]:
    """Compare the headers of both files. Returns warnings.

    Raises:
        ValueError: if the arguments are swapped, or there are too few images.
    """
    if set(samples.keys) >= _STATISTICS and not set(reference.keys) >= _STATISTICS:
        raise ValueError(
            f"the arguments are swapped: {samples.path} holds the statistics of a reference and {reference.path} does "
            "not; the order is REFERENCE SAMPLES"
        )
    for file in (reference, samples):
        if file.count < 4:
            raise ValueError(f"{file.path} holds {file.count} images: at least 4 are needed (3 nearest neighbours)")
    found = []
    if samples.count != PUBLISHED_COUNT:
        found.append(
            f"{samples.count} samples instead of {PUBLISHED_COUNT}: FID and sFID are biased, higher the fewer samples "
            "there are, and the Inception Score is lower; compare only with scores of the same count"
        )
    if samples.image_shape[:2] != reference.image_shape[:2]:
        sizes = ["x".join(map(str, file.image_shape[:2])) for file in (samples, reference)]
        found.append(f"samples are {sizes[0]} and reference images are {sizes[1]}: is this the right reference?")
    found += [
        f"{file.path.name} holds grey images: their channel is replicated to three where the features need colour"
        for file in (reference, samples)
        if file.image_shape[2] == 1
    ]
    return found


def check_images(file: ImageFile) -> list[str]:
    """Look at every image once. Returns warnings about constant and repeated images and the label histogram.

    Raises:
        ValueError: if all images are black or nearly so, or are all the same.
    """
    constant, repeated, highest = 0, 0, 0
    seen: set[bytes] = set()
    with tqdm(total=file.count, desc=f"checking {file.path.name}", unit="img", leave=False) as bar:
        for batch in file.batches(256):
            flat = batch.reshape(len(batch), -1)
            constant += int((flat.min(axis=1) == flat.max(axis=1)).sum())
            highest = max(highest, int(flat.max()))
            for image in flat:
                digest = hashlib.blake2b(image.tobytes(), digest_size=12).digest()
                repeated += digest in seen
                seen.add(digest)
            bar.update(len(batch))
    if highest <= 1:
        raise ValueError(f"{file.path}: all values are 0 or 1; were images in 0..1 stored without scaling to 0..255?")
    if len(seen) == 1:
        raise ValueError(f"{file.path}: all {file.count} images are the same")
    found = []
    if constant:
        found.append(f"{file.path.name}: {constant} of {file.count} images are constant (one value everywhere)")
    if repeated:
        found.append(f"{file.path.name}: {repeated} of {file.count} images repeat an earlier one exactly")
    labels = file.array("arr_1")
    if labels is None:
        return found
    unusable = _unusable(file, labels)
    if unusable:
        return [*found, unusable]
    counts = np.bincount(labels)
    expected = counts.mean()
    # Pearson's statistic of labels drawn evenly has mean K - 1 and variance 2 (K - 1); 5 deviations are no accident.
    excess = ((counts - expected) ** 2 / expected).sum() - (len(counts) - 1)
    if excess > 5 * np.sqrt(2 * len(counts)):
        found.append(
            f"{file.path.name}: classes are more uneven than chance, {counts.min()} to {counts.max()} images each, "
            f"{int((counts == 0).sum())} of {len(counts)} classes have none"
        )
    return found


def label_histogram(file: ImageFile) -> str | None:
    """The number of images per class in one line, if the file has labels."""
    labels = file.array("arr_1")
    if labels is None or _unusable(file, labels):
        return None
    classes, counts = np.unique(labels, return_counts=True)
    return f"{len(classes)} classes, {counts.min()} to {counts.max()} images each (mean {counts.mean():.1f})"


def _unusable(file: ImageFile, labels: NDArray) -> str | None:
    """Why labels are not used, if they are not."""
    if labels.shape != (file.count,):
        return f"{file.path.name}: arr_1 has shape {list(labels.shape)}, not one label per image; it is not used"
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        return f"{file.path.name}: arr_1 holds {labels.dtype} values, not class numbers; it is not used"
    return None
