"""What to find out about samples before hours are spent on them.

What makes scores meaningless is an error; what makes them differ from published ones is a warning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffit.data.files import MOST_CLASSES
from diffit.evaluation.reader import ImageSource
from diffit.system.console import progress

PUBLISHED_COUNT = 50_000


def check_pair(reference: ImageSource, samples: ImageSource) -> list[str]:
    """Compare the headers of both files. Returns warnings.

    Raises:
        ValueError: if the arguments are swapped, or there are too few images.
    """
    if set(samples.keys) >= {"mu", "sigma"} and not set(reference.keys) >= {"mu", "sigma"}:
        raise ValueError(
            f"the arguments are swapped: {samples.path} holds the statistics of a reference and {reference.path} does "
            "not; the order is REFERENCE SAMPLES"
        )
    for file in (reference, samples) if reference.count else (samples,):
        if file.count < 4:
            raise ValueError(f"{file.path} holds {file.count} images: at least 4 are needed (3 nearest neighbours)")
    found = []
    if samples.count != PUBLISHED_COUNT:
        found.append(
            f"{samples.count} samples instead of {PUBLISHED_COUNT}: FID and sFID are biased, higher the fewer samples "
            "there are, and the Inception Score is lower; compare only with scores of the same count"
        )
    if reference.count and samples.image_shape != reference.image_shape:
        shapes = ["x".join(map(str, file.image_shape)) for file in (samples, reference)]
        found.append(f"samples are {shapes[0]} and reference images are {shapes[1]}: is this the right reference?")
    return found


def check_images(file: ImageSource) -> None:
    """Read every image once.

    Raises:
        ValueError: if the file is damaged, or all images are black or nearly so, or the same.
    """
    first, all_same, highest = next(file.batches(1)), True, 0
    with progress(title=f"checking {file.path.name}", total=file.count, unit="img", leave=False) as bar:
        for batch in file.batches(256):
            all_same = all_same and bool((batch == first).all())
            highest = max(highest, int(batch.max()))
            bar.update(len(batch))
    if highest <= 1:
        raise ValueError(f"{file.path}: all values are 0 or 1; were images in 0..1 stored without scaling to 0..255?")
    if all_same:
        raise ValueError(f"{file.path}: all {file.count} images are the same")


def class_labels(file: ImageSource) -> NDArray[np.integer] | None:
    """The class numbers [N] of a file's images; None if there are none, or they are not one number per image."""
    labels = file.array("arr_1")
    if labels is None or labels.shape != (file.count,) or not np.issubdtype(labels.dtype, np.integer):
        return None
    return labels if labels.min() >= 0 and labels.max() < MOST_CLASSES else None


def check_labels(file: ImageSource) -> tuple[str, list[str]]:
    """The number of images per class in words, and warnings about them."""
    labels = class_labels(file)
    if labels is None:
        ignored = f"{file.path.name}: arr_1 is not used: it is not one label per image, or they are not class numbers"
        return "none stored", [ignored] if "arr_1" in file.keys else []
    counts = np.bincount(labels)
    used, expected = counts[counts > 0], counts.mean()
    balanced = ", balanced: every class in turn" * bool((labels == np.arange(len(labels)) % len(counts)).all())
    shown = f"{len(used)} classes, {used.min()} to {used.max()} images each (mean {used.mean():.1f}){balanced}"
    # Pearson's statistic of labels drawn evenly has mean K - 1 and variance 2 (K - 1); 5 deviations are no accident.
    excess = ((counts - expected) ** 2 / expected).sum() - (len(counts) - 1)
    if excess <= 5 * np.sqrt(2 * len(counts)):
        return shown, []
    return shown, [
        f"{file.path.name}: classes are more uneven than chance, {counts.min()} to {counts.max()} images each, "
        f"{len(counts) - len(used)} of {len(counts)} classes have none"
    ]
