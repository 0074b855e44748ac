"""The evaluator's work: find the files, check them before hours are spent, score, print."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import torch

from diffit.distributed import World, on_main
from diffit.evaluation import fashion
from diffit.evaluation.checks import check_images, check_labels, check_pair, class_labels
from diffit.evaluation.downloads import REFERENCES, cached
from diffit.evaluation.features import INCEPTION, Backend, create_backend
from diffit.evaluation.reader import ImageFile
from diffit.evaluation.scores import Scores, load_reference, score_images, share
from diffit.evaluation.statistics import SingularCovarianceWarning
from diffit.files import write_atomically

T = TypeVar("T")
# Field of `Scores` -> what is printed before it, if it is defined; the last five are ADM's, in its order.
LABELS = {
    "accuracy": "Classified as asked",
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}
_NEIGHBOURS = 3
_NEEDS = {"sfid": "Inception's spatial features"}
_NEEDS |= dict.fromkeys(("precision", "recall"), f"more than {_NEIGHBOURS} samples")
# What ADM's README says of its public pair, and what half precision and other hardware may move.
_PUBLISHED = {
    "inception_score": (215.837, 0.1),
    "fid": (3.9426, 0.005),
    "sfid": (6.1404, 0.005),
    "precision": (0.8265, 0.003),
    "recall": (0.5309, 0.003),
}


def evaluate(
    reference: Path | None,
    samples: Path | None,
    device: torch.device,
    world: World,
    *,
    kind: str | None = None,
    weights: Path | None = None,
    features: str | None = None,
    batch_size: int = 64,
    pr_fp16: bool = True,
    out: Path | None = None,
    log_dirs: Sequence[Path] = (Path("logs"),),
) -> Scores:
    """Check, load, score; rank 0 prints what it finds.

    reference: by default ADM's for the size of the samples; samples: by default the newest samples_*.npz under the
    first of the log_dirs that is there; world: the ranks that share the images, in batches of batch_size; kind,
    weights, features: of `create_backend`. With neither these nor a reference, samples of Fashion-MNIST are compared
    with the bundled one, by the bundled classifier. pr_fp16: print precision and recall in ADM's half precision, not
    the exact ones; out: a JSON file for the scores.

    Raises:
        ValueError, FileNotFoundError: for all that a user can mend.
    """
    may_choose = not (reference or kind or weights or features)
    real, file = _main_first(world, lambda: _open(reference, samples, log_dirs, may_choose))
    notes = on_main(world, lambda: _inspect(real, file))
    features = features if real else fashion.FEATURES
    backend = _main_first(world, lambda: create_backend(kind or "torch", weights, features, device))
    manifold, test, (start, stop) = file.count > _NEIGHBOURS, None, share(file.count)
    with warnings.catch_warnings(record=True) as caught:  # for the bundled reference _inspect has said the same
        warnings.simplefilter("always" if real else "ignore", SingularCovarianceWarning)
        if real is None:
            loaded = fashion.bundled_reference(backend)
            test = _printed(fashion.score_test_images(file.count, loaded, backend, manifold), pr_fp16)
        else:
            loaded = load_reference(real.path, backend, manifold, batch_size, progress=True)
        batches, labels = file.batches(batch_size, start, stop), None if real else class_labels(file)
        scores = score_images(batches, loaded, backend, manifold, stop - start, labels)
    printed = _printed(scores, pr_fp16)
    if world.is_main:
        late = [str(entry.message) for entry in caught if issubclass(entry.category, SingularCovarianceWarning)]
        _warn(late)
        protocol = _protocol(backend, bundled=real is None)
        print(f"protocol: {protocol}", f"features: {backend.name} on {device}", *loaded.origin, sep="\n")
        print(*_lines(printed, test), sep="\n")
        if out:
            content = asdict(printed) | {"precision_fp16": scores.precision, "recall_fp16": scores.recall}
            content |= {"real_test_images": test and asdict(test), "protocol": protocol, "features": backend.name}
            content |= {"reference": str(real.path if real else fashion.REFERENCE), "samples": str(file.path)}
            content |= {"origin": loaded.origin, "warnings": notes + late}
            write_atomically(out, (json.dumps(content, indent=2) + "\n").encode())
    return printed


def _open(
    reference: Path | None, samples: Path | None, log_dirs: Sequence[Path], may_choose: bool
) -> tuple[ImageFile | None, ImageFile]:
    """Both files; None means the bundled reference, which is taken for fitting samples if it may be chosen."""
    file = ImageFile(samples or _find_samples(log_dirs))
    if may_choose and fashion.drawn_by_fashion_model(file.path):
        return None, file
    return ImageFile(reference or _find_reference(file)), file


def _protocol(backend: Backend, bundled: bool) -> str:
    if backend.name == INCEPTION:
        return "ADM (Dhariwal & Nichol 2021)"
    data = "Fashion-MNIST, bundled: " if bundled else ""
    return f"{data}ADM's scores in the features of a classifier, which compare with no scores in other features"


def _printed(scores: Scores, pr_fp16: bool) -> Scores:
    """The scores with precision and recall in the arithmetic that is to be printed."""
    return scores if pr_fp16 else replace(scores, precision=scores.precision_exact, recall=scores.recall_exact)


def _lines(scores: Scores, test: Scores | None) -> list[str]:
    """The scores, each with that of real test images beside it."""
    lines = []
    for field, label in LABELS.items():
        value, real = getattr(scores, field), getattr(test, field, None)
        if value is not None and test and real is not None:
            lines.append(f"{label}: {value:.4f}  ({test.count} real test images: {real:.4f})")
        elif value is not None:
            lines.append(f"{label}: {value}")
        elif field in _NEEDS:
            lines.append(f"{label}: not defined, it needs {_NEEDS[field]}")
    return lines


def self_test(scores: Scores) -> bool:
    """Whether the scores of ADM's public pair are the published ones; says so for each."""
    good = True
    for field, (expected, tolerance) in _PUBLISHED.items():
        value = getattr(scores, field)
        fits = value is not None and abs(value - expected) <= tolerance
        good &= fits
        print(f"{'ok  ' if fits else 'FAIL'} {LABELS[field]}: {value}, published {expected} (± {tolerance})")
    return good


def _main_first(world: World, function: Callable[[], T]) -> T:
    """Call a function on rank 0, then on the others, which find the downloads of rank 0; its error is everyone's."""
    made: list[T] = []
    on_main(world, lambda: made.append(function()))
    return made[0] if made else function()


def _find_samples(folders: Sequence[Path]) -> Path:
    folder = next((path for path in folders if path.is_dir()), folders[0])
    found = sorted(folder.rglob("samples_*.npz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"there is no samples_*.npz under {folder.resolve()}: sample first, or name REFERENCE and SAMPLES"
        )
    return found[-1]


def _find_reference(samples: ImageFile) -> Path:
    """ADM's reference for the size of these samples, from the cache or fetched."""
    height, width = samples.image_shape[:2]
    if height != width or height not in REFERENCES:
        raise ValueError(
            f"there is no public reference for {height}x{width} images: make one with evaluations/make_reference.py"
        )
    return cached(REFERENCES[height])


def _inspect(reference: ImageFile | None, samples: ImageFile) -> list[str]:
    """Print what the files hold; no reference means the bundled one. Returns warnings, which are printed too."""
    print(f"reference: {reference.path if reference else fashion.REFERENCE}\nsamples: {samples.path}")
    if reference:
        found = check_pair(reference, samples)
        check_images(reference)
    else:
        found = [
            f"{samples.count} samples: FID is biased upwards, more the fewer there are, and the other scores depend on "
            "the count too; read them beside those of real images, and compare only equal counts"
        ]
    check_images(samples)
    labels, uneven = check_labels(samples)
    print(f"labels: {labels}")
    _warn(found + uneven)
    return found + uneven


def _warn(messages: list[str]) -> None:
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
