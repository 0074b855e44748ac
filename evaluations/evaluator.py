"""Score samples as ADM does: python evaluations/evaluator.py REFERENCE.npz SAMPLES.npz

Prints Inception Score, FID, sFID, Precision and Recall. Under torchrun the processes share the images.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

# Run as a file, this folder comes first in the search path, where its statistics.py would hide Python's own module.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from diffit.device import resolve_device
from diffit.distributed import World, on_main, start, stop
from diffit.evaluation.backends import create_backend
from diffit.evaluation.checks import check_images, check_pair, label_histogram
from diffit.evaluation.downloads import REFERENCES, SELF_TEST_SAMPLES, cached
from diffit.evaluation.reader import ImageFile
from diffit.evaluation.scores import Scores, load_reference, score_images, share
from diffit.evaluation.statistics import SingularCovarianceWarning

T = TypeVar("T")
_PROJECT = Path(__file__).resolve().parents[1]

# ADM's README for its public pair, with what its half precision and other hardware may move.
_PUBLIC = {
    "inception_score": (215.837, 0.1),
    "fid": (3.9426, 0.005),
    "sfid": (6.1404, 0.005),
    "precision": (0.8265, 0.003),
    "recall": (0.5309, 0.003),
}
_LABELS = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}


def boolean(text: str) -> bool:
    """'True' or 'False', as the flags of sample.py are written."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got '{text}'")
    return text.lower() == "true"


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose features."""
    parser.add_argument("--backend", choices=("torch", "tensorflow"), default="torch", help="default: torch")
    parser.add_argument("--weights", type=Path, help="Inception weights (.pb or .pth); default: the cache, or fetched")
    parser.add_argument(
        "--features", metavar="MODULE:FILE", help="a classifier instead of Inception, see docs/evaluate.md"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", nargs="?", type=Path, help="default: ADM's for 256 or 512 pixels, fetched once")
    parser.add_argument("samples", nargs="?", type=Path, help="default: the newest samples_*.npz under --log_dir")
    parser.add_argument(
        "--log_dir", type=Path, help="where samples are looked for (default: logs/ here, else of the project)"
    )
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument("--pr_fp16", type=boolean, default=False, help="precision/recall in ADM's half precision")
    parser.add_argument("--self_test", action="store_true", help="score ADM's public pair and compare with its README")
    add_backend_flags(parser)
    return parser.parse_args(arguments)


def find_samples(log_dir: Path | None) -> Path:
    """The newest samples_*.npz under a folder; by default logs/ of this folder, or else of the project.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = log_dir or next((path for path in (Path("logs"), _PROJECT / "logs") if path.is_dir()), Path("logs"))
    found = sorted(folder.rglob("samples_*.npz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"there is no samples_*.npz under {folder.resolve()}: sample first, or name REFERENCE and SAMPLES"
        )
    return found[-1]


def find_reference(samples: ImageFile) -> Path:
    """ADM's reference for the size of these samples, from the cache or fetched.

    Raises:
        ValueError: if there is none for the size.
        FileNotFoundError: if it cannot be fetched.
    """
    height, width = samples.image_shape[:2]
    if height != width or height not in REFERENCES:
        raise ValueError(
            f"there is no public reference for {height}x{width} images: make one with evaluations/make_reference.py"
        )
    return cached(REFERENCES[height])


def open_files(args: argparse.Namespace) -> tuple[ImageFile, ImageFile]:
    """Reference and samples, named or found.

    Raises:
        ValueError, FileNotFoundError: for all that a user can mend.
    """
    if args.json and not args.json.resolve().parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: the folder {args.json.parent} does not exist; make it first")
    samples = ImageFile(args.samples or find_samples(args.log_dir))
    return ImageFile(args.reference or find_reference(samples)), samples


def inspect(reference: ImageFile, samples: ImageFile) -> list[str]:
    """Print what the files hold. Returns warnings, which are printed too.

    Raises:
        ValueError: if scores would be meaningless.
    """
    print(f"reference: {reference.path}\nsamples: {samples.path}")
    found = [*check_pair(reference, samples), *check_images(reference), *check_images(samples)]
    print(f"labels: {label_histogram(samples) or 'none stored'}")
    warn(found)
    return found


def warn(messages: list[str]) -> None:
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)


def evaluate(args: argparse.Namespace, world: World) -> Scores:
    """Check, load, score; rank 0 prints what it finds.

    Raises:
        ValueError, FileNotFoundError: for all that a user can mend.
    """
    reference, samples = main_first(world, lambda: open_files(args))
    found = on_main(world, lambda: inspect(reference, samples))
    backend = main_first(world, lambda: create_backend(args.backend, args.weights, args.features, args.device))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SingularCovarianceWarning)
        statistics = load_reference(reference.path, backend, True, args.batch_size, progress=True)
        first, last = share(samples.count)
        batches = samples.batches(args.batch_size, first, last)
        scores = score_images(batches, statistics, backend, True, args.pr_fp16, total=last - first)
    if world.is_main:
        late = [str(entry.message) for entry in caught if issubclass(entry.category, SingularCovarianceWarning)]
        warn(late)
        print(f"features: {backend.name} on {backend.device}", *statistics.origin, sep="\n")
        report(scores)
        if args.json:
            about = {"reference": str(reference.path), "samples": str(samples.path), "features": backend.name}
            write_json(args.json, {**asdict(scores), **about, "origin": statistics.origin, "warnings": found + late})
    return scores


def main_first(world: World, function: Callable[[], T]) -> T:
    """Call a function on rank 0, then on the others, which find the downloads of rank 0; its error is everyone's."""
    made: list[T] = []
    on_main(world, lambda: made.append(function()))
    return made[0] if made else function()


def report(scores: Scores) -> None:
    """The numbers, with the names and in the order of ADM."""
    for field, label in _LABELS.items():
        value = getattr(scores, field)
        if value is not None:
            print(f"{label}: {value}")


def write_json(path: Path, content: dict[str, object]) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def self_test(scores: Scores) -> bool:
    """Whether the scores of the public pair are the published ones."""
    good = True
    for field, (expected, tolerance) in _PUBLIC.items():
        value = getattr(scores, field)
        fits = value is not None and abs(value - expected) <= tolerance
        good &= fits
        print(f"{'ok  ' if fits else 'FAIL'} {_LABELS[field]}: {value}, published {expected} (± {tolerance})")
    return good


def main(arguments: list[str] | None = None) -> int:
    """0 if all went well, 1 if the self-test failed, 2 for what the user can mend."""
    args = parse(arguments)
    world = World()
    try:
        args.device = resolve_device(args.device)
        world = start(args.device)
        if args.self_test:
            args.reference, args.samples = cached(REFERENCES[256]), cached(SELF_TEST_SAMPLES)
        scores = evaluate(args, world)
        return 0 if not args.self_test or self_test(scores) else 1
    except (ValueError, FileNotFoundError) as error:
        if world.is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    finally:
        stop()


if __name__ == "__main__":
    sys.exit(main())
