"""Where samples go: shards as they come, then one .npz in ADM's format, a grid, and a manifest.

A shard holds the samples of one batch and is written under a temporary name, so it is whole or it is not there: a run
that was killed goes on with what is missing. No step holds more than a few shards in memory.

Letters: N samples, B samples of a shard, H x W x C of an image.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffit.data.files import picture_of
from diffit.system.console import printable
from diffit.system.files import difference, explained_write, npz_member, open_atomically, write_atomically

MANIFEST = "manifest.json"
GRID = "grid.png"
OLDER = {"conversion": "truncated"}  # settings that older manifests lack
_GAP, _TITLE_HEIGHT = 8, 20  # pixels
_ADVICE = "free some space and run the same command again"


class SampleFolder:
    """The samples of one command.

    Shards are named by a key, the hash of the settings and of the folder's generation, which --overwrite makes anew:
    what a rank of an older command still writes is not read.

    Args:
        path: the folder; created by `prepare`.
        num_samples: N.
        key: of the command, which `prepare` returns.
    """

    def __init__(self, path: Path, num_samples: int, key: str = "") -> None:
        self.path = path
        self.num_samples = num_samples
        self.key = key
        self.shards = path / "shards"

    def prepare(self, settings: dict[str, Any], overwrite: bool, defaults: dict[str, Any] | None = None) -> str:
        """Make the folder ready for these settings; samples already made with the same ones stay. Returns the key.

        Args:
            settings: of the samples, a tree of plain values.
            overwrite: replace samples of other settings.
            defaults: values of the settings that an older manifest lacks beside those of `OLDER`, a tree alike.

        Raises:
            ValueError: if it holds samples of other settings and overwrite is False, or cannot be written.
        """
        with explained_write(f"samples to {self.path}", "choose another --log_dir"):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                manifest = self.read_manifest()
                old = manifest.get("settings")
                what = (
                    "no manifest says how"
                    if old is None
                    else difference(old, settings, defaults=OLDER | (defaults or {}))
                )
            except ValueError:
                manifest, what = {}, f"{MANIFEST} is damaged and does not say how"
            if what:
                made = any(self.path.glob("samples_*.npz")) or any(self.shards.glob("*.npz"))
                if made and not overwrite:
                    raise ValueError(
                        f"{self.path} holds samples made with other settings ({what}): choose another --log_dir, or "
                        "add --overwrite True to replace them"
                    )
                # What this program writes goes, and nothing else.
                for folder in (self.shards, self.path / "png"):
                    shutil.rmtree(folder, ignore_errors=True)
                for file in (*self.path.glob("samples_*.npz"), self.path / GRID, self.path / MANIFEST):
                    file.unlink(missing_ok=True)
                manifest = {"settings": settings, "complete": False, "generation": uuid4().hex}
                self.write_manifest(manifest)
            for leftover in self.shards.glob("*.part"):
                leftover.unlink()
        self.key = _key(manifest)
        return self.key

    def read_manifest(self) -> dict[str, Any]:
        """What `write_manifest` wrote; empty if there is none.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.path / MANIFEST
        if not path.exists():
            return {}
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            manifest = json.loads(path.read_bytes())
            if isinstance(manifest["settings"], dict):
                return manifest
        raise ValueError(f"{path} is damaged: put an intact copy in its place, or sample anew into another folder")

    def finished(self) -> Path | None:
        """The .npz of all samples, if it is there."""
        return next(iter(self.path.glob(f"samples_{self.num_samples}x*.npz")), None)

    def write_manifest(self, content: dict[str, Any]) -> None:
        write_atomically(self.path / MANIFEST, json.dumps(content, indent=2).encode())

    def missing(self) -> list[int]:
        """Numbers of the samples that neither the .npz nor a shard holds yet, ascending."""
        if self.finished():
            return []
        done = {index for first, count, _ in self._sorted_shards() for index in range(first, first + count)}
        return [index for index in range(self.num_samples) if index not in done]

    def _sorted_shards(self) -> list[tuple[int, int, Path]]:
        """(first sample, count, file) of every shard of this command."""
        names = [(file.stem.split("-"), file) for file in self.shards.glob(f"*-*-{self.key}.npz")]
        return sorted((int(first), int(count), file) for (first, count, _), file in names)

    def check_owner(self) -> None:
        """Before something is written: raise ValueError if the folder is gone, or another command has taken it over."""
        if _key(self.read_manifest()) != self.key:
            raise ValueError(
                f"{self.path} was deleted, or taken over by another command, while samples were made: start the same "
                "command again, or choose another --log_dir"
            )

    def add(self, first: int, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Write samples first, first + 1, ...; images [B, H, W, C], labels [B].

        Raises:
            ValueError: if the disk is full, or the file cannot be written.
        """
        with explained_write(f"to {self.shards}", f"{_ADVICE}, it continues from here"):
            self.shards.mkdir(exist_ok=True)
            with open_atomically(self.shards / f"{first:08d}-{len(images):05d}-{self.key}.npz") as file:
                np.savez(file, images=images, labels=labels)

    def stream(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Images [B, H, W, C] and labels [B] of all shards in order; a sample that two shards hold comes once.

        Raises:
            ValueError: if samples are missing, or a shard is damaged.
        """
        next_index, shape = 0, ()
        for first, count, file in [*self._sorted_shards(), (self.num_samples, 0, self.shards)]:
            if first > next_index:
                raise ValueError(f"{self.shards} lacks samples {next_index} to {first - 1}: run the same command again")
            skip = next_index - first
            if skip < count:
                try:
                    with np.load(file) as shard:
                        images, labels = shard["images"], shard["labels"]
                    shape = shape or images.shape[1:]
                    kinds = (images.dtype, labels.dtype)
                    if images.shape != (count, *shape) or labels.shape != (count,) or kinds != (np.uint8, np.int64):
                        raise ValueError("other samples than its name says")
                except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                    raise ValueError(f"{file} is damaged: delete it and run the same command again") from error
                yield images[skip:], labels[skip:]
                next_index = first + count

    def merge(self, with_labels: bool) -> Path:
        """Write samples_{N}x{H}x{W}x{C}.npz from the shards: arr_0 uint8 images and, if asked, arr_1 int64 labels.

        Equal samples give equal bytes. The shards stay until `discard_shards`.

        Raises:
            ValueError: if the disk is full, samples are missing, or a shard is damaged.
        """
        shape = (self.num_samples, *next(self.stream())[0].shape[1:])
        path = self.path / f"samples_{'x'.join(map(str, shape))}.npz"
        explained = explained_write(str(path), f"{_ADVICE}; the samples are safe")
        with explained, open_atomically(path) as file, zipfile.ZipFile(file, "w") as archive:
            labels = b""
            with npz_member(archive, "arr_0", np.dtype(np.uint8), shape) as member:
                for images, own in self.stream():
                    member.write(images.data)
                    labels += own.tobytes()
            if with_labels:
                with npz_member(archive, "arr_1", np.dtype(np.int64), shape[:1]) as member:
                    member.write(labels)
        return path

    def discard_shards(self) -> None:
        """Remove the shards, once the file that holds them all has been read back whole.

        Raises:
            ValueError: if that file is damaged; the shards stay.
        """
        path = self.finished()
        if path is None or not self.shards.exists():
            return
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():  # the first array that is not as its checksum says
                    raise zipfile.BadZipFile
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged: delete it and run the same command again") from error
        shutil.rmtree(self.shards, ignore_errors=True)


def _key(manifest: dict[str, Any]) -> str:
    """The hash of a manifest's settings and generation; empty without a manifest."""
    parts = {name: manifest.get(name) for name in ("settings", "generation")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16] if manifest else ""


def save_pngs(folder: Path, first: int, images: NDArray[np.uint8]) -> None:
    """Write samples as folder/000000.png, ...

    Raises:
        ValueError: if the disk is full, or a file cannot be written.
    """
    with explained_write(f"to {folder}", f"{_ADVICE}, it continues from here"):
        folder.mkdir(exist_ok=True)
        for offset, image in enumerate(images):
            save_png(folder / f"{first + offset:06d}.png", picture_of(image))


def save_png(path: Path, image: Image.Image) -> None:
    """Write a picture as a PNG file, whole or not at all."""
    with open_atomically(path) as file:
        image.save(file, "PNG")


def draw_grid(images: Sequence[NDArray[np.uint8]], titles: Sequence[str], columns: int | None = None) -> Image.Image:
    """A picture of up to some dozens of images [H, W, C], each with its title above; small images are enlarged."""
    count, (height, width) = len(images), images[0].shape[:2]
    zoom = max(1, 128 // width)
    columns = columns or min(count, max(4, round(count**0.5)))
    rows = -(-count // columns)
    gap, title_height = _GAP, _TITLE_HEIGHT
    cell_width, cell_height = width * zoom + gap, height * zoom + gap + title_height
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        left = gap + number % columns * cell_width
        top = gap + number // columns * cell_height
        title = printable(title)
        while font.getlength(title) > width * zoom and len(title) > 1:
            title = title.removesuffix("…")[:-1] + "…"
        draw.text((left, top + 2), title, "black", font)
        enlarged = picture_of(image).convert("RGB").resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top + title_height))
    return sheet


def first_of_grid(path: Path, side: int) -> NDArray[np.uint8]:
    """The first image of a grid file, whose images are `side` pixels wide and high: enlarged, [H, W, 3]."""
    end = side * max(1, 128 // side)
    with Image.open(path) as grid:
        return np.asarray(grid.crop((_GAP, _GAP + _TITLE_HEIGHT, _GAP + end, _GAP + _TITLE_HEIGHT + end)))
