"""Score samples as ADM does: python evaluations/evaluator.py REFERENCE.npz SAMPLES.npz

Prints Inception Score, FID, sFID, Precision and Recall. Without arguments: of the newest samples; those of the bundled
model are compared with a bundled reference, beside real images. Under torchrun the ranks share the images.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from diffit.device import resolve_device
from diffit.distributed import World, start, stop
from diffit.evaluation.downloads import REFERENCES, SELF_TEST_SAMPLES, cached
from diffit.evaluation.evaluate import evaluate, self_test


def boolean(text: str) -> bool:
    """'True' or 'False', as the flags of sample.py are written."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got '{text}'")
    return text.lower() == "true"


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that choose features."""
    parser.add_argument("--backend", choices=("torch", "tensorflow"), help="of Inception (default: torch)")
    parser.add_argument("--weights", type=Path, help="Inception weights (.pb or .pth); default: the cache, or fetched")
    parser.add_argument(
        "--features", metavar="MODULE:FILE", help="a classifier instead of Inception, see docs/evaluate.md"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: 64)")


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
    parser.add_argument("--self_test", action="store_true", help="score ADM's public pair and compare with its README")
    add_backend_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 if all went well, 1 if the self-test failed, 2 for what the user can mend."""
    args = parse(arguments)
    world = World()
    try:
        device = resolve_device(args.device)
        world = start(device)
        files = args.reference, args.samples
        if args.self_test:
            files = cached(REFERENCES[256]), cached(SELF_TEST_SAMPLES)
        if args.json and not args.json.resolve().parent.is_dir():
            raise FileNotFoundError(f"--json {args.json}: the folder {args.json.parent} does not exist; make it first")
        scores = evaluate(
            *files,
            device,
            world,
            kind=args.backend,
            weights=args.weights,
            features=args.features,
            batch_size=args.batch_size,
            pr_fp16=args.pr_fp16,
            out=args.json,
            log_dirs=[args.log_dir] if args.log_dir else [Path("logs"), Path(__file__).resolve().parents[1] / "logs"],
        )
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
