"""The command evaluations/evaluator.py: score samples as ADM does.

    python evaluations/evaluator.py REFERENCE.npz SAMPLES.npz
    python evaluations/evaluator.py REFERENCE.npz --compare logs/a logs/b

Prints Inception Score, FID, sFID, Precision and Recall. Without arguments: of the newest samples; those of the bundled
model are compared with a bundled reference, beside real images. Under torchrun the ranks share the images.
"""

if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("diffit.cli.evaluate:main")())

import argparse
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffit.cli.run import one_sentence
from diffit.evaluation import fashion
from diffit.evaluation.checks import check_images, check_labels, check_pair, class_labels
from diffit.evaluation.downloads import REFERENCES, SELF_TEST_SAMPLES, cached
from diffit.evaluation.features import INCEPTION, Backend, create_backend
from diffit.evaluation.reader import ImageSource, open_images
from diffit.evaluation.scores import DIGITS, LABELS, NEEDS, Reference, Scores, load_reference, score_images, share
from diffit.evaluation.statistics import SingularCovarianceWarning
from diffit.sampling.folder import MANIFEST, OLDER, SampleFolder
from diffit.system.console import say, warn
from diffit.system.device import resolve_device
from diffit.system.distributed import World, joined, main_first, on_main
from diffit.system.files import check_apart, differing, explained_write, first_few, write_atomically

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
    parser.add_argument("--compare", nargs="+", type=Path, metavar="SAMPLES", help="score all of these into one table")
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


def evaluate(args: argparse.Namespace, world: World) -> list[Scores]:
    """Find the files, check them before hours are spent, score; rank 0 prints. Returns the scores as they are printed.

    Raises:
        ValueError, FileNotFoundError: for all that a user can fix.
    """
    if args.compare and (args.samples or args.log_dir or args.self_test):
        raise ValueError("--compare names the samples: leave SAMPLES, --log_dir and --self_test out")
    if args.json and (args.json.is_dir() or not os.access(args.json.resolve().parent, os.W_OK)):
        reason = "a folder stands there" if args.json.is_dir() else "its folder is missing or read-only; make it first"
        raise ValueError(f"cannot write --json {args.json}: {reason}, or choose another file")
    real, files = main_first(world, lambda: _open(args))
    for source in (real, *files):
        if args.json and source:
            check_apart(args.json, source.path, "--json", inside=False)
    settings, notes = on_main(world, lambda: (_settings(files), _inspect(real, files)))
    features = args.features if real else fashion.FEATURES
    kind, device = args.backend or "torch", resolve_device(args.device)
    backend = main_first(world, lambda: create_backend(kind, args.weights, features, device))
    scored, tests = list[Scores](), list[Scores | None]()
    with warnings.catch_warnings(record=True) as caught:  # for the bundled reference _inspect has said the same
        warnings.simplefilter("always" if real else "ignore", SingularCovarianceWarning)
        reference = _load(real, files[0], backend, args.batch_size) if real else fashion.bundled_reference(backend)
        for file in files:
            near = file.count > 3 and reference.pool is not None  # precision takes 3 nearest neighbours
            start, stop = share(file.count)
            batches, labels = file.batches(args.batch_size, start, stop), None if real else class_labels(file)
            tests.append(None if real else fashion.score_test_images(file.count, reference, backend, near))
            options = near, stop - start, labels, args.kid, args.bootstrap
            scored.append(score_images(batches, reference, backend, *options))
    printed = [scores if args.pr_fp16 else _exact(scores) for scores in scored]
    tests = [test if args.pr_fp16 or test is None else _exact(test) for test in tests]
    if world.is_main:
        found = [str(entry.message) for entry in caught if issubclass(entry.category, SingularCovarianceWarning)]
        late = list(dict.fromkeys(found))
        warn(*(f"warning: {message}" for message in late))
        protocol = "ADM (Dhariwal & Nichol 2021)"
        if backend.name != INCEPTION:
            protocol = "ADM's scores in the features of a classifier, which compare with no scores in other features"
            protocol = protocol if real else f"Fashion-MNIST, bundled: {protocol}"
        say(f"protocol: {protocol}", f"features: {backend.name} on {device}", *reference.origin)
        about: dict[str, Any] = {"protocol": protocol, "features": backend.name, "origin": reference.origin}
        about |= {"reference": str(real.path if real else fashion.REFERENCE), "warnings": notes + late}
        rows = [
            asdict(shown)
            | {"precision_fp16": scores.precision, "recall_fp16": scores.recall}
            | {"samples": str(file.path), "real_test_images": test and asdict(test)}
            for scores, shown, file, test in zip(scored, printed, files, tests, strict=True)
        ]
        if args.compare:
            rows = [row | {"settings": differ} for row, differ in zip(rows, settings, strict=True)]
            rows.sort(key=lambda row: row["fid"])
            say("", *_table(rows))
            about |= {"compared": rows}
        else:
            say(*_lines(printed[0], tests[0], "a reference that holds images" if real and not real.count else None))
            about |= rows[0]
        if args.json:
            with explained_write(f"--json {args.json}", "free some space; the scores are those printed above"):
                write_atomically(args.json, (json.dumps(about, indent=2) + "\n").encode())
    return printed


def _load(real: ImageSource, samples: ImageSource, backend: Backend, batch_size: int) -> Reference:
    """A reference, of as many features as the backend has of the samples."""
    reference = load_reference(real, backend, batch_size=batch_size, progress=True)
    size = backend(next(samples.batches(1))).pool.shape[1]
    if size != len(reference.mean):
        raise ValueError(f"{real.path} holds moments of {len(reference.mean)} features, {backend.name} has {size}")
    return reference


def _open(args: argparse.Namespace) -> tuple[ImageSource | None, list[ImageSource]]:
    """Reference (by default ADM's for the size of the samples) and samples (of a folder, the newest in it).

    A reference of None means the bundled one, where the user has chosen nothing.
    """
    named = args.compare or ([args.samples] if args.samples else [])
    here, project = Path("logs"), Path(__file__).resolve().parents[2] / "logs"
    logs = args.log_dir or (project if project.is_dir() and not here.is_dir() else here)
    files = []
    for path in named or [logs]:
        newest = sorted(path.rglob("samples_*.npz"), key=lambda path: path.stat().st_mtime)[-1:]
        if not newest and (path / MANIFEST).exists():
            raise ValueError(f"{path} holds unfinished samples: run its sample.py command again, which makes the rest")
        if not newest and not named:
            raise FileNotFoundError(
                f"there is no samples_*.npz under {path.resolve()}: sample first, or name REFERENCE and SAMPLES"
            )
        files.append(open_images(*(newest or [path])))
    chosen = args.reference or args.backend or args.weights or args.features
    if not chosen and all(fashion.drawn_by_fashion_model(file.path) for file in files):
        return None, files
    if args.reference:
        return open_images(args.reference), files
    height, width = files[0].image_shape[:2]
    if height != width or height not in REFERENCES:
        raise ValueError(
            f"there is no public reference for {height}x{width} images: make one with evaluations/make_reference.py"
        )
    return open_images(cached(REFERENCES[height])), files


def _settings(files: Sequence[ImageSource]) -> list[dict[str, Any]]:
    """The settings in which the manifests beside the files differ, for each file; None where it has no manifest."""
    trees = [SampleFolder(file.path.parent, file.count).read_manifest().get("settings") for file in files]
    known = [number for number, tree in enumerate(trees) if tree]
    free = {"num_samples"}  # which is a column of its own
    found = differing([tree for tree in trees if tree], free, defaults=OLDER)
    values = {name: dict(zip(known, each, strict=True)) for name, each in found.items()}
    return [{name: each.get(number) for name, each in values.items()} for number in range(len(files))]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Scores (FID first), count, settings and file of each row, as lines; below, real images in as many numbers."""
    names = dict.fromkeys(name for name in ("fid", *LABELS) if any(row[name] is not None for row in rows))
    real = {row["count"]: row["real_test_images"] for row in rows if row["real_test_images"]}
    lines = [[*(LABELS[name] for name in names), "count", *rows[0]["settings"], "samples"]]
    for row in (*rows, *({"samples": "real test images", "settings": {}} | each for each in real.values())):
        cells = [f"{row[k]:.{DIGITS[k]}f}{_error(row['errors'], k)}" if row[k] is not None else "-" for k in names]
        for name in rows[0]["settings"]:
            value = row["settings"].get(name)
            text = first_few([*map(str, value)]) if isinstance(value, list) else "-" if value is None else str(value)
            cells.append(text[:12] if name.endswith("sha256") else text)
        lines.append([*cells[: len(names)], str(row["count"]), *cells[len(names) :], row["samples"]])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _error(errors: dict[str, float], name: str) -> str:
    """The standard error of a score, if it was estimated."""
    return f" ± {errors[name]:.2g}" if name in errors else ""


def _exact(scores: Scores) -> Scores:
    """With precision and recall of exact distances in the place of ADM's."""
    errors = scores.errors | {name: scores.errors[f"{name}_exact"] for name in ("precision", "recall") if scores.errors}
    return replace(scores, precision=scores.precision_exact, recall=scores.recall_exact, errors=errors)


def _lines(scores: Scores, test: Scores | None, missing: str | None) -> list[str]:
    """The scores, each with that of real test images beside it, or with what it needs: `missing`, or its own text."""
    lines = []
    for field, label in LABELS.items():
        value, real = getattr(scores, field), getattr(test, field, None)
        error = _error(scores.errors, field)
        if value is not None and test and real is not None:
            lines.append(f"{label}: {value:.4f}{error}  ({test.count} real test images: {real:.4f})")
        elif value is not None:
            lines.append(f"{label}: {value}{error}")
        elif NEEDS[field]:
            lines.append(f"{label}: not defined, it needs {missing or NEEDS[field]}")
    return lines


def _inspect(reference: ImageSource | None, files: Sequence[ImageSource]) -> list[str]:
    """Print what the files hold; no reference means the bundled one. Returns warnings, which are printed too."""
    say(f"reference: {reference.path if reference else fashion.REFERENCE}")
    if reference and reference.count:
        check_images(reference)
    notes = list[str]()
    for samples in files:
        say(f"samples: {samples.path}")
        if reference:
            found = check_pair(reference, samples)
        else:
            found = [
                f"{samples.count} samples: FID is biased upwards, more the fewer there are, and the other scores "
                "depend on the count too; read them beside those of real images, and compare only equal counts"
            ]
        check_images(samples)
        labels, uneven = check_labels(samples)
        say(f"labels: {labels}")
        warn(*(f"warning: {message}" for message in found + uneven))
        notes += found + uneven
    if len({samples.count for samples in files}) > 1:
        notes.append("the samples differ in number, on which all scores depend: compare those of equal counts alone")
        warn(f"warning: {notes[-1]}")
    return notes


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
        return 0 if not args.self_test or self_test(scores[0]) else 1
