"""The evaluator's work: find the files, check them before hours are spent, score, print."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from diffit.distributed import World, on_main
from diffit.evaluation import fashion
from diffit.evaluation.checks import check_images, check_pair, label_histogram
from diffit.evaluation.features import INCEPTION, Backend
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
_NEIGHBOURS = 3


def evaluate(
    reference: Path | None,
    samples: Path | None,
    make_backend: Callable[[str | None], Backend],
    world: World,
    batch_size: int = 64,
    pr_fp16: bool = True,
    out: Path | None = None,
    log_dirs: Sequence[Path] = (Path("logs"),),
    may_choose: bool = False,
) -> Scores:
    """Check, load, score; rank 0 prints what it finds.

    reference: by default ADM's for the size of the samples; samples: by default the newest samples_*.npz under the
    first of the log_dirs that is there; make_backend: from 'module:path' of a classifier, or None for the features that
    the user chose; world: the ranks that share the images, in batches of batch_size; pr_fp16: print precision and
    recall in ADM's half precision, not the exact ones; out: a JSON file for the scores; may_choose: without a
    reference, samples of Fashion-MNIST are compared with the bundled one, by the bundled classifier.

    Raises:
        ValueError, FileNotFoundError: for all that a user can mend.
    """

    if out and not out.resolve().parent.is_dir():
        raise FileNotFoundError(f"--json {out}: the folder {out.parent} does not exist; make it first")

    def open_files() -> tuple[ImageFile | None, ImageFile]:
        file = ImageFile(samples or _find_samples(log_dirs))
        if may_choose and reference is None and fashion.drawn_by_fashion_model(file.path):
            return None, file
        return ImageFile(reference or find_reference(file)), file

    reference_file, file = _main_first(world, open_files)
    notes = on_main(world, lambda: _inspect(reference_file, file))
    backend = _main_first(world, lambda: make_backend(None if reference_file else fashion.FEATURES))
    manifold, test = file.count > _NEIGHBOURS, None
    with warnings.catch_warnings(record=True) as caught:  # for the bundled reference _inspect has said the same
        warnings.simplefilter("always" if reference_file else "ignore", SingularCovarianceWarning)
        if reference_file is None:
            loaded = fashion.bundled_reference(backend)
            test = _printed(fashion.score_test_images(file.count, loaded, backend, manifold), pr_fp16)
        else:
            loaded = load_reference(reference_file.path, backend, manifold, batch_size, progress=True)
        start, stop = share(file.count)
        scores = score_images(file.batches(batch_size, start, stop), loaded, backend, manifold, total=stop - start)
    printed = _printed(scores, pr_fp16)
    if world.is_main:
        late = [str(entry.message) for entry in caught if issubclass(entry.category, SingularCovarianceWarning)]
        _warn(late)
        about = {"protocol": _protocol(backend, test is not None), "features": f"{backend.name} on {backend.device}"}
        print(*(f"{name}: {value}" for name, value in about.items()), *loaded.origin, *_lines(printed, test), sep="\n")
        if out:
            about |= {"reference": str(reference_file.path if reference_file else fashion.REFERENCE)}
            about |= {"samples": str(file.path), "features": backend.name}
            both = {"precision_fp16": scores.precision, "recall_fp16": scores.recall}
            others = {"real_test_images": test and asdict(test), "origin": loaded.origin, "warnings": notes + late}
            content = asdict(printed) | both | about | others
            write_atomically(out, (json.dumps(content, indent=2) + "\n").encode())
    return printed


def _printed(scores: Scores, pr_fp16: bool) -> Scores:
    """The scores with precision and recall in the arithmetic that is to be printed."""
    return scores if pr_fp16 else replace(scores, precision=scores.precision_exact, recall=scores.recall_exact)


def _protocol(backend: Backend, bundled: bool) -> str:
    if backend.name == INCEPTION:
        return "ADM (Dhariwal & Nichol 2021)"
    data = "Fashion-MNIST, bundled: " if bundled else ""
    return f"{data}ADM's scores in the features of a classifier, which compare with no scores in other features"


def _lines(scores: Scores, test: Scores | None) -> list[str]:
    """The five numbers, each with that of real test images beside it."""
    lines = []
    for field, (label, _, _) in _SCORES.items():
        value = getattr(scores, field)
        if value is None:
            needs = "Inception's spatial features" if field == "sfid" else f"more than {_NEIGHBOURS} samples"
            lines.append(f"{label}: not defined, it needs {needs}")
        elif test is None:
            lines.append(f"{label}: {value}")
        else:
            lines.append(f"{label}: {value:.4f}  ({test.count} real test images: {getattr(test, field):.4f})")
    return lines


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


def _inspect(reference: ImageFile | None, samples: ImageFile) -> list[str]:
    """Print what the files hold; no reference means the bundled one. Returns warnings, which are printed too."""
    print(f"reference: {reference.path if reference else fashion.REFERENCE}\nsamples: {samples.path}")
    if reference:
        found = [*check_pair(reference, samples), *check_images(reference)]
    else:
        found = [
            f"{samples.count} samples: FID is biased upwards, more the fewer there are, and the other scores depend on "
            "the count too; read them beside those of real images, and compare only equal counts"
        ]
    found += check_images(samples)
    print(f"labels: {label_histogram(samples) or 'none stored'}")
    _warn(found)
    return found


def _warn(messages: list[str]) -> None:
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
