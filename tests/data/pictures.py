"""Generated pictures in folders and ZIPs."""

import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(root: Path, classes: dict[str, int], seed: int = 0) -> Path:
    """So many random RGB pictures of different sizes per class folder; class "" is the root itself."""
    random = np.random.default_rng(seed)
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            height, width = random.integers(16, 40, 2)
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def zipped(root: Path, path: Path, prefix: str = "") -> Path:
    """All files under root in a ZIP."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*"), reverse=True):  # not in the order of a folder's names
            archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def cut_off(path: Path) -> Path:
    """Leave the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
