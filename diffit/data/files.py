"""Pictures in a folder or a ZIP: one subfolder per class, or all in one place and then without classes.

What is there is known from names alone; a picture is opened when it is asked for, and cropped to a square as ADM does,
which was trained and measured with that crop.

Letters: N pictures, S side of the square, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffit.system.distributed import detect_world

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
MODES = {1: "L", 3: "RGB"}  # by number of channels, as Pillow calls them
_SPLITS = frozenset({"train", "val", "validation", "test"})


@dataclass(frozen=True)
class ImageFiles:
    """The pictures under a folder or in a ZIP.

    Args:
        root: the folder or the ZIP.
        names: of the picture files, relative to root, [N].
        labels: int64 [N]; all 0 without classes.
        class_names: of the subfolders, sorted; empty without classes.
        ignored: how many other files are there, by suffix.
    """

    root: Path
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    ignored: Counter[str]
    _archives: dict[int, zipfile.ZipFile] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_archives": {}}  # an open file is of one process

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{self.root}/{self.names[index]}"

    def picture(self, index: int) -> Image.Image:
        """Picture `index`, decoded. Raises whatever the decoder raises if it cannot be."""
        with self._open(self.names[index]) as file:
            picture = Image.open(file)
            picture.load()
        return picture

    def stamps(self) -> NDArray[np.uint64]:
        """A number for each picture's file that changes with its name, size or time; in a ZIP with its checksum."""
        if self.root.is_dir():
            texts = [f"{name} {_size_and_time(self.root / name)}" for name in self.names]
        else:
            with zipfile.ZipFile(self.root) as archive:
                texts = [f"{name} {archive.getinfo(name).CRC}" for name in self.names]
        digests = b"".join(hashlib.blake2b(os.fsencode(text), digest_size=8).digest() for text in texts)
        return np.frombuffer(digests, np.uint64)

    def fingerprint(self) -> str:
        """Of the names; the contents are not read."""
        return hashlib.sha256(os.fsencode("\n".join(self.names))).hexdigest()[:16]

    def _open(self, name: str) -> IO[bytes]:
        if self.root.is_dir():
            return open(self.root / name, "rb")
        process = os.getpid()  # processes that share a handle would move each other's position in the file
        if process not in self._archives:
            self._archives[process] = zipfile.ZipFile(self.root)
        return self._archives[process].open(name)


def _size_and_time(path: Path) -> str:
    try:
        found = os.stat(path)
    except OSError:  # a link to nothing: unreadable, which decoding it says
        return "missing"
    return f"{found.st_size} {found.st_mtime_ns}"


def image_files(path: str | Path) -> ImageFiles:
    """The pictures of a folder or ZIP, sorted; each subfolder is a class, with all that lies under it.

    A folder that holds nothing but one folder of folders stands for that one; beside val or test, train is taken.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: in one sentence, if it holds no pictures, or they are laid out in another way.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"there are no images at {root}: check --data.path")
    entries = sorted(_walk(root) if root.is_dir() else _members(root))
    top = _top([entry for entry in entries if _suffix(entry) in SUFFIXES])
    entries = [entry for entry in entries if entry.startswith(top)]
    files = [entry for entry in entries if not entry.endswith("/")]
    names = tuple(name for name in files if _suffix(name) in SUFFIXES)
    ignored = Counter(_suffix(name) for name in files if _suffix(name) not in SUFFIXES)
    if not names:
        counts = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.most_common(3))
        others = f" (only {counts})" if ignored else ""
        raise ValueError(f"{root} holds no images{others}: --data.path must be a folder or a ZIP of images")
    classes = [_class_of(name[len(top) :]) for name in names]
    if "" in classes and len(set(classes)) > 1:
        stray = names[classes.index("")]
        raise ValueError(f"{root} holds both class folders and loose images such as {stray}: move those into a class")
    class_names = tuple(sorted({*classes} - {""}))
    empty = {_class_of(entry[len(top) :]) for entry in entries} - {"", *class_names}
    if class_names and empty:
        raise ValueError(f"the class folder '{min(empty)}' of {root} holds no images: fill it, or remove it")
    number = {name: label for label, name in enumerate(class_names)}
    labels = np.array([number.get(name, 0) for name in classes], np.int64)
    return ImageFiles(root, names, labels, class_names, ignored)


def _walk(root: Path) -> Iterator[str]:
    """Relative names of all files, and of folders with a slash at the end.

    Links are followed, after the folders that are no links; a folder that was seen already is left out, and named.
    """
    starts, seen = [root], set()
    while starts:
        for folder, subfolders, files in os.walk(starts.pop(0), onerror=_refuse_folder):
            place, status = Path(folder), os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                if detect_world().is_main:
                    print(f"left out {folder}: it links to {place.resolve()}, which is read already", file=sys.stderr)
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
            starts += [place / name for name in subfolders if (place / name).is_symlink()]
            relative = place.relative_to(root)
            if place != root:
                yield f"{relative.as_posix()}/"
            yield from ((relative / name).as_posix() for name in files if not _hidden(name))


def _refuse_folder(error: OSError) -> None:
    raise ValueError(f"cannot read the folder {error.filename} ({error.strerror}): mend its permissions") from error


def _members(path: Path) -> Iterable[str]:
    """The same of a ZIP."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is neither a folder nor a readable ZIP ({error}): check --data.path") from error
    return {name for name in names if not any(_hidden(part) for part in name.split("/"))}


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _top(names: list[str]) -> str:
    """The prefix of pictures' names under which the classes lie."""
    top = ""
    while True:
        below = [name[len(top) :] for name in names if name.startswith(top)]
        folders = {_class_of(name) for name in below}
        if "train" in folders and len(folders) > 1 and folders <= _SPLITS:
            top += "train/"
        elif len(folders) == 1 and folders != {""} and all(name.count("/") > 1 for name in below):
            top += f"{folders.pop()}/"
        else:
            return top


def _class_of(name: str) -> str:
    """The first folder of a relative name; empty for a file outside folders."""
    first, slash, _ = name.partition("/")
    return first if slash else ""


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The central size x size square of a picture whose short side was brought to that size (ADM, section on data).

    Halved by box averages while both sides are at least twice the size, then resized bicubically: so no step shrinks by
    more than 2, whatever the filter of the library does beyond.
    """
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def square_pixels(picture: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """The centre crop of a picture as uint8 [S, S, C]."""
    if picture.mode.startswith("I;16"):  # convert() would clip its 65536 greys at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    pixels = np.array(centre_crop(picture.convert(MODES[channels]), size))
    return pixels.reshape(size, size, channels)
