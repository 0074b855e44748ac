"""What the tools score samples by: Frechet distance to real images, and the share that shows the class asked for.

By default both are seen by the classifier of Fashion-MNIST; with a reference file of your own, by Inception.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffit import ImageSampler
from diffit.data.datasets import FASHION_CLASSES
from diffit.evaluation.fashion import FEATURES, bundled_reference
from diffit.evaluation.features import Backend, create_backend
from diffit.evaluation.reader import Images
from diffit.evaluation.scores import Reference, Scores, load_reference, score_images
from diffit.sampling.config import SampleConfig
from diffit.sampling.labels import class_names, resolve_labels
from diffit.system.console import progress


def open_reference(
    device: torch.device, reference: str | None = None, features: str | None = None
) -> tuple[Backend, Reference]:
    """What samples are seen by, and compared with: the training set of Fashion-MNIST, as its classifier sees it.

    reference: an .npz, folder or ZIP of other images, seen by Inception or by `features`, as the evaluator takes them.

    Raises:
        ValueError, FileNotFoundError: in one sentence, if reference or weights cannot be had.
    """
    backend = create_backend("torch", features=features if reference else FEATURES, device=device)
    return backend, load_reference(reference, backend) if reference else bundled_reference(backend)


def score(
    pictures: ImageSampler,
    config: SampleConfig,
    backend: Backend,
    reference: Reference,
    title: str,
    bootstrap: int = 0,
    manifold: bool = True,
) -> Scores:
    """Scores of the samples that sample.py draws with this config; accuracy where the classifier knows the classes.

    title: of the progress bar; bootstrap, manifold: see `score_images`.
    """
    count, size, seed = config.num_samples, config.batch_size, config.seed
    names = class_names(pictures.config)
    classes = resolve_labels(config.class_labels or [], names)
    labels = pictures.labels(range(count), seed, classes)
    known = backend.name.startswith("fashion-") and tuple(names) == FASHION_CLASSES

    def batches() -> Iterator[Images]:
        for start in progress(range(0, count, size), title, unit="batch", leave=False):
            part = range(start, min(start + size, count))
            yield pictures.draw(part, labels[part.start : part.stop], seed).cpu().numpy()

    seen = labels.cpu().numpy() if known else None
    return score_images(batches(), reference, backend, manifold, labels=seen, bootstrap=bootstrap)
