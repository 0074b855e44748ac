"""The evaluator's work: find the files, check them before hours are spent, score, print."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from diffit.distributed import World, on_main
from diffit.evaluation.checks import check_images, check_pair, label_histogram
from diffit.evaluation.features import Backend
from diffit.evaluation.reader import ImageFile
from diffit.evaluation.reference import find_reference
from diffit.evaluation.scores import Scores, load_reference, score_images, share
from diffit.evaluation.statistics import SingularCovarianceWarning
from diffit.files import write_atomically

T = TypeVar("T")
# ADM's names and order; what its README says of its public pair, and what half precision and other hardware may move.
_SCORES = {
    "inception_score": ("Inception Score", 215.837, 0.1),
    "fid": ("FID", 3.9426, 0.005),
    "sfid": ("sFID", 6.1404, 0.005),
    "precision": ("Precision", 0.8265, 0.003),
    "recall": ("Recall", 0.5309, 0.003),
}


def evaluate(
    reference: Path | None,
    samples: Path | None,
    make_backend: Callable[[], Backend],
    world: World,
    batch_size: int = 64,
    pr_fp16: bool = False,
    out: Path | None = None,
    log_dirs: Sequence[Path] = (Path("logs"),),
) -> Scores:
    """Check, load, score; rank 0 prints what it finds.

    reference: by default ADM's for the size of the samples; samples: by default the newest samples_*.npz under the
    first of the log_dirs that is there; world: the ranks that share the images, in batches of batch_size; pr_fp16:
    precision and recall in ADM's half precision; out: a JSON file for the scores.

    Raises:
        ValueError, FileNotFoundError: for all that a user can mend.
    """

    def open_files() -> tuple[ImageFile, ImageFile]:
        if out and not out.resolve().parent.is_dir():
            raise FileNotFoundError(f"--json {out}: the folder {out.parent} does not exist; make it first")
        file = ImageFile(samples or _find_samples(log_dirs))
        return ImageFile(reference or find_reference(file)), file

    reference_file, file = _main_first(world, open_files)
    found = on_main(world, lambda: _inspect(reference_file, file))
    backend = _main_first(world, make_backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SingularCovarianceWarning)
        loaded = load_reference(reference_file.path, backend, True, batch_size, progress=True)
        start, stop = share(file.count)
        batches = file.batches(batch_size, start, stop)
        scores = score_images(batches, loaded, backend, True, pr_fp16, total=stop - start)
    if world.is_main:
        late = [str(entry.message) for entry in caught if issubclass(entry.category, SingularCovarianceWarning)]
        _warn(late)
        print(f"features: {backend.name} on {backend.device}", *loaded.origin, sep="\n")
        for field, (label, _, _) in _SCORES.items():
            if getattr(scores, field) is not None:
                print(f"{label}: {getattr(scores, field)}")
        if out:
            about = {"reference": str(reference_file.path), "samples": str(file.path), "features": backend.name}
            content = {**asdict(scores), **about, "origin": loaded.origin, "warnings": found + late}
            write_atomically(out, (json.dumps(content, indent=2) + "\n").encode())
    return scores


def self_test(scores: Scores) -> bool:
    """Whether the scores of ADM's public pair are the published ones; says so for each."""
    good = True
    for field, (label, expected, tolerance) in _SCORES.items():
        value = getattr(scores, field)
        fits = value is not None and abs(value - expected) <= tolerance
        good &= fits
        print(f"{'ok  ' if fits else 'FAIL'} {label}: {value}, published {expected} (± {tolerance})")
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


def _inspect(reference: ImageFile, samples: ImageFile) -> list[str]:
    """Print what the files hold. Returns warnings, which are printed too."""
    print(f"reference: {reference.path}\nsamples: {samples.path}")
    found = [*check_pair(reference, samples), *check_images(reference), *check_images(samples)]
    print(f"labels: {label_histogram(samples) or 'none stored'}")
    _warn(found)
    return found


def _warn(messages: list[str]) -> None:
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
