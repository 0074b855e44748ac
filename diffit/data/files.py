"""Pictures in a folder or a ZIP: one subfolder per class, or all in one place and then without classes.

Training, latents, references and samples to be scored are all read here. The names alone say what is there; a picture
is decoded when it is asked for, and cropped to a square as ADM does, which was trained and measured with that crop.

Letters: N pictures, S side of the square, C channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from diffit.system.console import say, warn
from diffit.system.files import first_few, first_line
from diffit.system.ranks import detect_world

# What people keep pictures in, the same on every machine. Where Pillow has no decoder (for HEIC and JPEG XL anywhere,
# for AVIF before 11.3) the picture is named as unreadable; else two machines would see two data sets in one folder.
# Vector graphics, camera raw files, icons and formats of floating-point numbers are not in it.
_NAMES = "apng avif bmp gif heic heif j2k jfif jp2 jpe jpeg jpf jpg jpx jxl pbm pgm png pnm ppm tga tif tiff webp"
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
MODES = {1: "L", 3: "RGB"}  # by number of channels, as Pillow calls them
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
TRAIN, HELD_OUT = frozenset({"train", "training"}), frozenset({"val", "valid", "validation", "test", "testing"})
_EDM_LABELS = "dataset.json"  # as EDM's dataset_tool writes it
MOST_CLASSES = 1_000_000  # a label beyond is a mistake, and would make a table of names that fills the memory


@dataclass(frozen=True)
class ImageFiles:
    """The pictures in a folder, a ZIP or Parquet files.

    Args:
        root: the folder or the ZIP.
        names: of the picture files, relative to root, sorted, [N].
        labels: int64 [N]; all 0 without classes.
        class_names: name of each class number; empty without classes.
        ignored: how many other files are there, by suffix.
        places: int64 [N, 4], where the contents are if they are no files: what `read` takes. The third number changes
            with the content. (Workers share them: to open a ZIP of a million files takes a gigabyte and seconds.)
        read: the content at a place.
    """

    root: Path
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    ignored: Counter[str]
    places: NDArray[np.int64] | None = None
    read: Callable[..., bytes] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        """One line: how many pictures, in which classes, and what was left out."""
        names = self.class_names
        classes = f"classes: {len(names)} ({first_few(names, 10)})" if names else "no classes"
        left_out = f"; left out: {_counts(self.ignored)}" if self.ignored else ""
        return f"images in {self.root}: {len(self)}; {classes}{left_out}"

    def name(self, index: int) -> str:
        return f"{self.root}/{self.names[index]}"

    def picture(self, index: int, decode: bool = True) -> Image.Image:
        """Picture `index`, the first of an animation; or only its header.

        Raises whatever the decoder raises if it cannot be decoded.
        """
        with self._open(index) as file:
            try:
                picture = Image.open(file)
            except PIL.UnidentifiedImageError:  # its message names a Python object
                raise ValueError(f"Pillow {PIL.__version__} cannot decode it: convert it to PNG or JPEG") from None
            if decode:
                picture.load()
        return picture

    def _open(self, index: int) -> IO[bytes]:
        if self.places is None or self.read is None:
            # Without waiting: a pipe of a picture's name would never be written to, and is empty then.
            wait_not = getattr(os, "O_NONBLOCK", 0)
            return open(self.root / self.names[index], "rb", opener=lambda path, flags: os.open(path, flags | wait_not))
        return io.BytesIO(self.read(*self.places[index].tolist()))

    def headers(self, most: int = 1000) -> list[tuple[int, int, int]]:
        """Width, height and channels (1 grey, 3 colours) of pictures, by their headers; undecodable ones are left out.

        most: how many are looked at, in ten runs of neighbours spread over all.
        """
        headers, run = [], -(-min(most, len(self)) // 10)
        starts = np.linspace(0, len(self) - run, 10).astype(int).tolist()
        for index in sorted({index for start in starts for index in range(start, start + run)}):
            with contextlib.suppress(Exception):  # whoever decodes it names it
                picture = self.picture(index, decode=False)
                headers.append((*picture.size, 1 if is_grey(picture) else 3))
        return headers

    def channels(self) -> int:
        """3 if any picture has colours, by its header; else 1, which takes a look at all."""
        some = self.headers()
        grey = all(channels == 1 for _, _, channels in some)
        every = self.headers(len(self)) if grey and len(some) < len(self) else some
        return max((channels for _, _, channels in every), default=3)

    def stamps(self) -> NDArray[np.uint64]:
        """A number for each picture that changes with its name or content (of a file with its size or time), [N]."""
        if self.places is None:
            states: Iterable[object] = (_size_and_time(self.root / name) for name in self.names)
        else:
            states = self.places[:, 2].tolist()
        texts = (os.fsencode(f"{name} {state}") for name, state in zip(self.names, states, strict=True))
        return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts), np.uint64)

    def fingerprint(self) -> str:
        """Of the names; the contents are not read."""
        return hashlib.sha256(os.fsencode("\n".join(self.names))).hexdigest()[:16]


def _read_member(path: Path, offset: int, size: int, crc: int, method: int) -> bytes:
    """The content of a file in a ZIP, without reading the ZIP's directory.

    Raises:
        zipfile.BadZipFile, zlib.error: if it is damaged.
    """
    with open(path, "rb") as file:
        enter_member(file, offset)
        data = file.read(size)
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    if zlib.crc32(data) != crc:
        raise zipfile.BadZipFile("its checksum in the ZIP is wrong")
    return data


def enter_member(file: IO[bytes], offset: int) -> None:
    """Go to the content of the ZIP's member whose header lies at the offset. Raises zipfile.BadZipFile if none does."""
    file.seek(offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("its header in the ZIP is damaged")
    file.seek(sum(struct.unpack("<HH", header[26:])), os.SEEK_CUR)  # behind its name and extra field


def _size_and_time(path: Path) -> str:
    try:
        status = os.stat(path)
    except OSError:  # a link to nothing: whoever decodes it names it
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def image_files(path: str | Path) -> ImageFiles:
    """`find_pictures`, whose line rank 0 prints."""
    files = find_pictures(path)
    if detect_world().is_main:
        say(files)
    return files


def find_pictures(path: str | Path) -> ImageFiles:
    """The pictures of a folder, ZIP or Parquet files, sorted; each subfolder is a class, with all that lies under it.

    A folder that holds nothing but one folder of folders stands for that one; beside val or test, train is taken. Where
    EDM's dataset_tool wrote a dataset.json, the labels are in it and folders mean nothing.

    Raises:
        FileNotFoundError: if there is nothing at the path.
        ValueError: in one sentence, if it holds no pictures, or they are laid out in another way.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"there are no images at {root}: check the path")
    archive: dict[str, zipfile.ZipInfo] | None = None
    if root.suffix.lower() == ".parquet" and root.is_file():
        root, entries = root.parent, [root.name]
    elif root.is_dir():
        entries = sorted(_walk(root))
    else:
        archive = _archive(root)
        entries = sorted(archive)
    suffixes = {entry: os.path.splitext(entry)[1].lower() for entry in entries if not entry.endswith("/")}
    top = _top(root, [entry for entry, suffix in suffixes.items() if suffix in SUFFIXES])
    edm_labels: dict[str, int] | None = None
    for end in [end for end in range(len(top), -1, -1) if not end or top[end - 1] == "/"]:  # the innermost counts
        entry = f"{top[:end]}{_EDM_LABELS}"
        if edm_labels is None and entry in suffixes:
            edm_labels = _edm_labels(root, entry, archive)
            if edm_labels is not None:
                top = top[:end]
                del suffixes[entry]
    names = tuple(entry for entry, suffix in suffixes.items() if suffix in SUFFIXES and entry.startswith(top))
    ignored = Counter(s for entry, s in suffixes.items() if s not in SUFFIXES and entry.startswith(top))
    if names:
        if edm_labels is None:
            class_names, labels = _folder_classes(root, top, names, entries)
        else:
            class_names, labels = _edm_classes(f"{root}/{top}{_EDM_LABELS}", [n[len(top) :] for n in names], edm_labels)
        if archive is None:
            return ImageFiles(root, names, labels, class_names, ignored)
        places = _places(root, [archive[name] for name in names])
        return ImageFiles(root, names, labels, class_names, ignored, places, partial(_read_member, root))
    if ignored[".parquet"] and archive is None:
        from diffit.data.parquet import parquet_images  # which is a kind of what is here

        del ignored[".parquet"]
        return parquet_images(root, [entry for entry, suffix in suffixes.items() if suffix == ".parquet"], ignored)
    others = f" (only {_counts(ignored)})" if ignored else ""
    raise ValueError(f"{root} holds no images{others}: name a folder or a ZIP of images")


def _counts(ignored: Counter[str]) -> str:
    """How many files of each suffix, the five most frequent."""
    return first_few([f"{count} {suffix or 'without suffix'}" for suffix, count in ignored.most_common()])


def _folder_classes(
    root: Path, top: str, names: Sequence[str], entries: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names and labels [N] of folders: in the order of their numbers if all are whole numbers, else sorted."""
    classes = [_class_of(name[len(top) :]) for name in names]
    present = {*classes} - {""}
    if "" in classes and present:
        stray = names[classes.index("")]
        raise ValueError(f"{root} holds both class folders and loose images such as {stray}: move those into a class")
    empty = {_class_of(entry[len(top) :]) for entry in entries if entry.startswith(top)} - {"", *present}
    if present and empty:
        raise ValueError(f"the class folder '{min(empty)}' of {root} holds no images: fill it, or remove it")
    class_names = sorted(present)
    if are_numbers(class_names):
        class_names.sort(key=int)
    number = {name: label for label, name in enumerate(class_names)}
    return tuple(class_names), np.array([number.get(name, 0) for name in classes], np.int64)


def are_numbers(class_names: Sequence[str]) -> bool:
    """Whether every class is named by a whole number."""
    return bool(class_names) and all(re.fullmatch("-?[0-9]+", name) for name in class_names)


def _edm_labels(root: Path, entry: str, archive: dict[str, zipfile.ZipInfo] | None) -> dict[str, int] | None:
    """The labels in a dataset.json by name of the file; empty if it says that there are none, None if it is another's.

    It holds {"labels": null} or {"labels": [["00000/img00000000.png", 6], ...]}.
    """
    try:
        if archive is None:
            content = (root / entry).read_bytes()
        else:
            content = _read_member(root, *_places(root, [archive[entry]])[0].tolist())
        tree = json.loads(content)
        if not isinstance(tree, dict) or "labels" not in tree:
            return None
        labels = {name.replace("\\", "/"): label for name, label in dict(tree["labels"] or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{root}/{entry} holds no list of file names and labels ({first_line(error)})") from error
    for name, label in labels.items():
        if type(label) is not int or not 0 <= label < MOST_CLASSES:
            raise ValueError(f"{root}/{entry} gives {name} the label {label}: labels must be class numbers from 0")
    return labels


def _edm_classes(
    source: str, names: Sequence[str], stored: dict[str, int]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Class names (the numbers) and labels [N] of a dataset.json; folders are no classes."""
    if not stored:
        return (), np.zeros(len(names), np.int64)
    missing = [name for name in names if name not in stored]
    if missing:
        raise ValueError(
            f"{source} has no label for {len(missing)} images such as {missing[0]}: add them, or remove it"
        )
    return tuple(map(str, range(max(stored.values()) + 1))), np.array([stored[name] for name in names], np.int64)


def _walk(root: Path) -> Iterator[str]:
    """Relative names of all files, and of folders with a slash at the end; hidden ones are left out.

    Links are followed, after the folders that are no links; a folder that was seen already is left out, and named.
    """
    starts, seen = [root], set()
    while starts:
        for folder, subfolders, files in os.walk(starts.pop(0), onerror=_refuse_folder):
            place, status = Path(folder), os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                if detect_world().is_main:
                    warn(f"left out {folder}: it links to {place.resolve()}, which is read already")
                continue
            seen.add((status.st_dev, status.st_ino))
            subfolders[:] = sorted(name for name in subfolders if not _hidden(name))
            starts += [place / name for name in subfolders if (place / name).is_symlink()]
            prefix = "" if place == root else f"{place.relative_to(root).as_posix()}/"
            if prefix:
                yield prefix
            yield from (f"{prefix}{name}" for name in files if not _hidden(name))


def _refuse_folder(error: OSError) -> None:
    raise ValueError(f"cannot read the folder {error.filename} ({error.strerror}): fix its permissions") from error


def _archive(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries of a ZIP by name, hidden ones left out; names are those that a folder would have."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is neither a folder nor a readable ZIP ({error}): check the path") from error
    # Windows writes \; other tools write /a, ./a or a//b, all of which are unpacked as a or a/b.
    named = {re.sub(r"(^|/)(\.?/)+", r"\1", info.filename.replace("\\", "/")): info for info in infos}
    return {name: info for name, info in named.items() if name and not any(map(_hidden, name.split("/")))}


def _places(path: Path, infos: Sequence[zipfile.ZipInfo]) -> NDArray[np.int64]:
    """Where a ZIP holds these entries: offset, compressed size, CRC-32, method; [N, 4]."""
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{path} holds {info.filename} encrypted or in a rare compression: unpack it to a folder")
    return np.array([(i.header_offset, i.compress_size, i.CRC, i.compress_type) for i in infos], np.int64)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")  # left behind by macOS and by Synology


def _top(root: Path, names: list[str]) -> str:
    """The prefix of pictures' names under which the classes lie."""
    top = ""
    while True:
        below = [name[len(top) :] for name in names if name.startswith(top)]
        folders = {_class_of(name) for name in below}
        if len(folders) > 1 and all(name.lower() in TRAIN | HELD_OUT for name in folders):
            training = [name for name in folders if name.lower() in TRAIN]
            if len(training) != 1:
                raise ValueError(f"{root / top} holds the splits {', '.join(sorted(folders))}: name the one to read")
            top += f"{training[0]}/"
        elif len(folders) == 1 and folders != {""} and all(name.count("/") > 1 for name in below):
            top += f"{folders.pop()}/"
        else:
            return top


def _class_of(name: str) -> str:
    """The first folder of a relative name; empty for a file outside folders."""
    first, slash, _ = name.partition("/")
    return first if slash else ""


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


def picture_of(image: NDArray[np.uint8]) -> Image.Image:
    """An image [H, W, C] as Pillow has it: grey for one channel, else RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def is_grey(picture: Image.Image) -> bool:
    """Whether a picture's mode has no colours (a palette counts as colours)."""
    return picture.mode in _GREY_MODES


def square_pixels(picture: Image.Image, size: int | None, channels: int) -> NDArray[np.uint8]:
    """The centre crop of a picture as uint8 [S, S, C]; [H, W, C] for a size of None.

    Transparency is dropped and a rotation note (EXIF) is not followed, as in ADM.

    Raises:
        ValueError: if its values have no known white, or Pillow reads them wrongly.
    """
    tags = getattr(picture, "tag_v2", {})  # of a TIFF: bits of each channel, photometric interpretation, planes
    if 16 in tags.get(258, ()) and (tags.get(262) == 0 or tags.get(284) == 2):
        raise ValueError("Pillow misreads 16-bit TIFFs whose zero is white, or with a plane for each channel")
    # Pillow opens 16-bit greys as I;16 or (of PGM, and older releases of PNG) as 32-bit numbers up to 65535.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM")):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))  # convert() would clip them at 255
    elif picture.mode in ("I", "F"):
        raise ValueError("its greys are 32-bit numbers, of which none is known to be white: save it with 8 or 16 bits")
    picture = picture.convert(MODES[channels])
    pixels = np.array(picture if size is None else centre_crop(picture, size))
    return pixels.reshape(*pixels.shape[:2], channels)
