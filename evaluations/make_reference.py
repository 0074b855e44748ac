"""Make a reference file of any images: python evaluations/make_reference.py SOURCE OUT.npz

SOURCE is a folder, a .zip, an .npz, or a torchvision data set (torchvision:CIFAR10). The file holds the moments of all
images and 10,000 of them, as ADM's references do: moments for FID and sFID, images for precision and recall.
"""

import argparse
import os
import sys
import zipfile
from pathlib import Path

# Run as a file, this folder comes first in the search path, where its statistics.py would hide Python's own module.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diffit.device import resolve_device
from diffit.evaluation.backends import Backend, create_backend
from diffit.evaluation.reader import Images
from diffit.evaluation.scores import collect
from diffit.evaluation.sources import ImageSource, open_source
from evaluations.evaluator import add_backend_flags


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder, .zip, .npz or torchvision:NAME")
    parser.add_argument("out", type=Path, help="the reference file to write")
    parser.add_argument("--image_size", type=int, help="centre crop and resize to this side, as ADM does for ImageNet")
    parser.add_argument("--padding", type=int, default=0, help="black pixels to add on every side (default: 0)")
    parser.add_argument("--num_images", type=int, default=10_000, help="images to store (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these images (default: 0)")
    parser.add_argument("--data_root", default="data", help="where torchvision keeps its data sets (default: data)")
    add_backend_flags(parser)
    return parser.parse_args(arguments)


def make_reference(source: ImageSource, out: Path, backend: Backend, num_images: int, seed: int, batch: int) -> None:
    """Write moments of all images of the source and `num_images` of the images themselves."""
    found = collect(source.batches(batch, 0, source.count), backend, source.count, "features")
    arrays: dict[str, NDArray] = {"mu": found.moments.mean, "sigma": found.moments.covariance()}
    if found.spatial is not None:
        arrays |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance()}
    arrays["features"] = np.array(backend.name)
    chosen = np.random.default_rng(seed).permutation(source.count)[:num_images]
    _write(out, arrays, source, np.sort(chosen))


def _write(out: Path, arrays: dict[str, NDArray], source: ImageSource, chosen: NDArray[np.int64]) -> None:
    """The .npz, image by image; it appears under its name when whole."""
    temporary = out.with_name(f"{out.name}.part")
    with zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(array))
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            shape = (len(chosen), *source.image_shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for number in tqdm(chosen, "storing images", leave=False):
                image: Images = source[int(number)]
                member.write(image.tobytes())
    os.replace(temporary, out)


def main(arguments: list[str] | None = None) -> int:
    """0 if the file was written, 2 for what the user can mend."""
    args = parse(arguments)
    try:
        if not args.out.resolve().parent.is_dir():
            raise FileNotFoundError(f"the folder {args.out.parent} does not exist: make it first")
        if args.out.suffix != ".npz":
            raise ValueError(f"{args.out} must end in .npz")
        source = open_source(args.source, args.image_size, args.data_root, args.padding)
        backend = create_backend(args.backend, args.weights, args.features, resolve_device(args.device))
        make_reference(source, args.out, backend, args.num_images, args.seed, args.batch_size)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shape, stored = "x".join(map(str, source.image_shape)), min(args.num_images, source.count)
    print(f"{args.out}: moments of {source.count} images {shape} ({backend.name}), {stored} of them stored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
