"""The command evaluations/evaluator.py: score samples as ADM does.

    python evaluations/evaluator.py REFERENCE.npz SAMPLES.npz

Prints Inception Score, FID, sFID, Precision and Recall. Without arguments: of the newest samples; those of the bundled
model are compared with a bundled reference, beside real images. Under torchrun the ranks share the images.
"""

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import start

    start("diffit.cli.evaluate:main")

import argparse
import json
import os
import warnings
from dataclasses import asdict, replace
from pathlib import Path

from diffit.cli.run import one_sentence
from diffit.evaluation import fashion
from diffit.evaluation.checks import check_images, check_labels, check_pair, class_labels
from diffit.evaluation.downloads import REFERENCES, SELF_TEST_SAMPLES, cached
from diffit.evaluation.features import INCEPTION, create_backend
from diffit.evaluation.reader import ImageSource, open_images
from diffit.evaluation.scores import LABELS, NEEDS, Scores, load_reference, score_images, share
from diffit.evaluation.statistics import SingularCovarianceWarning
from diffit.system.console import say, warn
from diffit.system.device import resolve_device
from diffit.system.distributed import World, joined, main_first, on_main
from diffit.system.files import check_apart, explained_write, write_atomically

# What ADM's README says of its public pair, and what half precision and other hardware may move.
_PUBLISHED = {
    "inception_score": (215.837, 0.1),
    "fid": (3.9426, 0.005),
    "sfid": (6.1404, 0.005),
    "precision": (0.8265, 0.003),
    "recall": (0.5309, 0.003),
}


def boolean(text: str) -> bool:
    """'True' or 'False', as the flags of sample.py are written."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got '{text}'")
    return text.lower() == "true"


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose features."""
    parser.add_argument("--backend", choices=("torch", "tensorflow"), help="of Inception (default: torch)")
    parser.add_argument("--weights", type=Path, help="Inception weights (.pb or .pth); default: the cache, or fetched")
    parser.add_argument(
        "--features", metavar="MODULE[:FILE]", help="dinov2, or features of your own, in place of Inception's"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument("--batch_size", type=positive, default=64, help="images at a time (default: 64)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "reference", nargs="?", type=Path, help="default: bundled (Fashion-MNIST) or ADM's, fetched once"
    )
    parser.add_argument("samples", nargs="?", type=Path, help="default: the newest samples_*.npz under --log_dir")
    parser.add_argument(
        "--log_dir", type=Path, help="where samples are looked for (default: logs/ here, else of the project)"
    )
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    parser.add_argument("--pr_fp16", type=boolean, default=True, help="False: exact precision and recall, not ADM's")
    parser.add_argument("--kid", type=boolean, default=False, help="True: the kernel distance (KID) too")
    parser.add_argument("--bootstrap", type=int, default=0, help="print standard errors, from so many random halves")
    parser.add_argument("--self_test", action="store_true", help="score ADM's public pair and compare with its README")
    add_backend_flags(parser)
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace, world: World) -> Scores:
    """Find the files, check them before hours are spent, score; rank 0 prints. Returns the scores as they are printed.

    Raises:
        ValueError, FileNotFoundError: for all that a user can fix.
    """
    if args.json and (args.json.is_dir() or not os.access(args.json.resolve().parent, os.W_OK)):
        reason = "a folder stands there" if args.json.is_dir() else "its folder is missing or read-only; make it first"
        raise ValueError(f"cannot write --json {args.json}: {reason}, or choose another file")
    real, file = main_first(world, lambda: _open(args))
    for source in (real, file):
        if args.json and source:
            check_apart(args.json, source.path, "--json", inside=False)
    notes = on_main(world, lambda: _inspect(real, file))
    features = args.features if real else fashion.FEATURES
    kind, device = args.backend or "torch", resolve_device(args.device)
    backend = main_first(world, lambda: create_backend(kind, args.weights, features, device))
    manifold = file.count > 3 and (real is None or real.count > 0)  # precision takes 3 nearest neighbours
    test, (start, stop) = None, share(file.count)
    with warnings.catch_warnings(record=True) as caught:  # for the bundled reference _inspect has said the same
        warnings.simplefilter("always" if real else "ignore", SingularCovarianceWarning)
        if real is None:
            reference = fashion.bundled_reference(backend)
            test = fashion.score_test_images(file.count, reference, backend, manifold)
        else:
            reference = load_reference(real, backend, manifold or args.kid, args.batch_size, progress=True)
            size = backend(next(file.batches(1))).pool.shape[1]
            if size != len(reference.mean):
                raise ValueError(
                    f"{real.path} holds moments of {len(reference.mean)} features, {backend.name} has {size}"
                )
        batches, labels = file.batches(args.batch_size, start, stop), None if real else class_labels(file)
        scores = score_images(batches, reference, backend, manifold, stop - start, labels, args.kid, args.bootstrap)
    adm = {"precision_fp16": scores.precision, "recall_fp16": scores.recall}
    if not args.pr_fp16:
        scores, test = _exact(scores), test and _exact(test)
    if world.is_main:
        late = [str(entry.message) for entry in caught if issubclass(entry.category, SingularCovarianceWarning)]
        warn(*(f"warning: {message}" for message in late))
        protocol = "ADM (Dhariwal & Nichol 2021)"
        if backend.name != INCEPTION:
            protocol = "ADM's scores in the features of a classifier, which compare with no scores in other features"
            protocol = protocol if real else f"Fashion-MNIST, bundled: {protocol}"
        say(f"protocol: {protocol}", f"features: {backend.name} on {device}", *reference.origin)
        say(*_lines(scores, test, "a reference that holds images" if real and not real.count else None))
        if args.json:
            about: dict[str, object] = {"protocol": protocol, "features": backend.name, "origin": reference.origin}
            about |= {"reference": str(real.path if real else fashion.REFERENCE), "samples": str(file.path)}
            about |= {"real_test_images": test and asdict(test), "warnings": notes + late}
            with explained_write(f"--json {args.json}", "free some space; the scores are those printed above"):
                write_atomically(args.json, (json.dumps(asdict(scores) | adm | about, indent=2) + "\n").encode())
    return scores


def _open(args: argparse.Namespace) -> tuple[ImageSource | None, ImageSource]:
    """Reference (by default ADM's for the size of the samples) and samples (by default the newest).

    A reference of None means the bundled one, where the user has chosen nothing.
    """
    path = args.samples
    if path is None:
        here, project = Path("logs"), Path(__file__).resolve().parents[2] / "logs"
        folder = args.log_dir or (project if project.is_dir() and not here.is_dir() else here)
        found = sorted(folder.rglob("samples_*.npz"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise FileNotFoundError(
                f"there is no samples_*.npz under {folder.resolve()}: sample first, or name REFERENCE and SAMPLES"
            )
        path = found[-1]
    file = open_images(path)
    chosen = args.reference or args.backend or args.weights or args.features
    if not chosen and fashion.drawn_by_fashion_model(file.path):
        return None, file
    if args.reference:
        return open_images(args.reference), file
    height, width = file.image_shape[:2]
    if height != width or height not in REFERENCES:
        raise ValueError(
            f"there is no public reference for {height}x{width} images: make one with evaluations/make_reference.py"
        )
    return open_images(cached(REFERENCES[height])), file


def _exact(scores: Scores) -> Scores:
    """With precision and recall of exact distances in the place of ADM's."""
    errors = scores.errors | {name: scores.errors[f"{name}_exact"] for name in ("precision", "recall") if scores.errors}
    return replace(scores, precision=scores.precision_exact, recall=scores.recall_exact, errors=errors)


def _lines(scores: Scores, test: Scores | None, missing: str | None) -> list[str]:
    """The scores, each with that of real test images beside it, or with what it needs: `missing`, or its own text."""
    lines = []
    for field, label in LABELS.items():
        value, real = getattr(scores, field), getattr(test, field, None)
        error = f" ± {scores.errors[field]:.2g}" if field in scores.errors else ""
        if value is not None and test and real is not None:
            lines.append(f"{label}: {value:.4f}{error}  ({test.count} real test images: {real:.4f})")
        elif value is not None:
            lines.append(f"{label}: {value}{error}")
        elif NEEDS[field]:
            lines.append(f"{label}: not defined, it needs {missing or NEEDS[field]}")
    return lines


def _inspect(reference: ImageSource | None, samples: ImageSource) -> list[str]:
    """Print what the files hold; no reference means the bundled one. Returns warnings, which are printed too."""
    say(f"reference: {reference.path if reference else fashion.REFERENCE}", f"samples: {samples.path}")
    if reference:
        found = check_pair(reference, samples)
        if reference.count:
            check_images(reference)
    else:
        found = [
            f"{samples.count} samples: FID is biased upwards, more the fewer there are, and the other scores depend on "
            "the count too; read them beside those of real images, and compare only equal counts"
        ]
    check_images(samples)
    labels, uneven = check_labels(samples)
    say(f"labels: {labels}")
    warn(*(f"warning: {message}" for message in found + uneven))
    return found + uneven


def self_test(scores: Scores) -> bool:
    """Whether the scores of ADM's public pair are the published ones; says so for each."""
    good = True
    for field, (expected, tolerance) in _PUBLISHED.items():
        value = getattr(scores, field)
        fits = value is not None and abs(value - expected) <= tolerance
        good &= fits
        say(f"{'ok  ' if fits else 'FAIL'} {LABELS[field]}: {value}, published {expected} (± {tolerance})")
    return good


@one_sentence()
def main(arguments: list[str] | None = None) -> int:
    """Parse, score, print; returns 1 if the self-test failed."""
    args = parse(arguments)
    with joined(resolve_device(args.device)) as world:
        if args.self_test:
            args.reference, args.samples = cached(REFERENCES[256]), cached(SELF_TEST_SAMPLES)
        scores = evaluate(args, world)
        return 0 if not args.self_test or self_test(scores) else 1
