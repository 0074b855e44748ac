"""Make a reference file of any images: python evaluations/make_reference.py SOURCE OUT.npz

SOURCE is a folder, a .zip, an .npz, or a torchvision data set (torchvision:CIFAR10). The file holds the moments of all
images and 10,000 of them, as ADM's references do: moments for FID and sFID, images for precision and recall.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed
if __name__ == "__main__":  # above the imports, which take long: Ctrl-C is one line during them too
    from diffit.cli.run import imported

    raise SystemExit(imported("evaluations.make_reference:main")())

import argparse

from diffit.cli.evaluate import add_backend_flags, positive
from diffit.cli.run import one_sentence
from diffit.evaluation.features import create_backend
from diffit.evaluation.reference import make_reference, open_source
from diffit.system.console import say
from diffit.system.device import resolve_device
from diffit.system.files import check_apart, exclusive, explained_write


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, .zip, .npz or torchvision:NAME")
    parser.add_argument("out", type=Path, help="the reference file to write")
    parser.add_argument(
        "--image_size", type=positive, default=0, help="centre crop and resize to this side, as ADM does for ImageNet"
    )
    parser.add_argument("--padding", type=int, default=0, help="black pixels to add on every side (default: 0)")
    parser.add_argument("--num_images", type=positive, default=10_000, help="images to store (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images (default: 0)")
    parser.add_argument("--data_root", default="data", help="where torchvision keeps its data sets (default: data)")
    add_backend_flags(parser)
    return parser.parse_args(arguments)


@one_sentence()
def main(arguments: list[str] | None = None) -> int:
    """Parse, write the file, print what it holds."""
    args = parse(arguments)
    if not args.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder {args.out.parent} does not exist: make it first")
    if args.out.suffix != ".npz":
        raise ValueError(f"{args.out} must end in .npz")
    check_apart(args.out, args.source, "OUT", inside=False)
    source = open_source(args.source, args.image_size, args.data_root)
    backend = create_backend(args.backend or "torch", args.weights, args.features, resolve_device(args.device))
    writing = explained_write(str(args.out), "free some space, or choose another OUT")
    with exclusive(args.out.parent, args.out.name), writing:
        stored = make_reference(
            *(source, args.out, backend),
            num_images=args.num_images,
            seed=args.seed,
            batch_size=args.batch_size,
            image_size=args.image_size,
            padding=args.padding,
        )
    say(f"{args.out}: moments of {source.count} images ({backend.name}), {'x'.join(map(str, stored))} of them stored")
    return 0
