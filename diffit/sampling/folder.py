"""Where samples go: shards as they come, then one .npz in ADM's format, a grid, and a manifest.

A shard holds the samples of one batch and is written under a temporary name, so it is whole or it is not there: a run
that was killed goes on with what is missing. No step holds more than a few shards in memory.

Letters: N samples, B samples of a shard, H x W x C of an image.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffit.system.files import difference, explained_write, npz_member, open_atomically, write_atomically

MANIFEST = "manifest.json"
GRID = "grid.png"
_ADVICE = "free some space and run the same command again"


class SampleFolder:
    """The samples of one command.

    Args:
        path: the folder; created by `prepare`.
        num_samples: N.
    """

    def __init__(self, path: Path, num_samples: int) -> None:
        self.path = path
        self.num_samples = num_samples
        self.shards = path / "shards"

    def prepare(self, settings: dict[str, Any], overwrite: bool) -> None:
        """Make the folder ready for these settings; samples already made with the same ones stay.

        Raises:
            ValueError: if it holds samples of other settings and overwrite is False, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            found = self.read_manifest().get("settings")
            if found != settings:
                made = any(self.path.glob("samples_*.npz")) or any(self.shards.glob("*.npz"))
                if made and not overwrite:
                    what = "no manifest says how" if found is None else difference(found, settings)
                    raise ValueError(
                        f"{self.path} holds samples made with other settings ({what}): choose another --log_dir, or "
                        "add --overwrite True to replace them"
                    )
                # What this program writes goes, and nothing else.
                self.discard_shards()
                shutil.rmtree(self.path / "png", ignore_errors=True)
                for file in (*self.path.glob("samples_*.npz"), self.path / GRID, self.path / MANIFEST):
                    file.unlink(missing_ok=True)
                self.write_manifest({"settings": settings, "complete": False})
            for leftover in self.shards.glob("*.part"):
                leftover.unlink()
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot write samples to {self.path} ({error}): choose another --log_dir") from error

    def read_manifest(self) -> dict[str, Any]:
        """What `write_manifest` wrote; empty if there is none."""
        path = self.path / MANIFEST
        return json.loads(path.read_text()) if path.exists() else {}

    def finished(self) -> Path | None:
        """The .npz of all samples, if it is there."""
        return next(iter(self.path.glob(f"samples_{self.num_samples}x*.npz")), None)

    def write_manifest(self, content: dict[str, Any]) -> None:
        write_atomically(self.path / MANIFEST, json.dumps(content, indent=2).encode())

    def missing(self) -> list[int]:
        """Numbers of the samples that no shard holds yet, ascending."""
        done = {index for first, count, _ in self._sorted_shards() for index in range(first, first + count)}
        return [index for index in range(self.num_samples) if index not in done]

    def _sorted_shards(self) -> list[tuple[int, int, Path]]:
        """(first sample, count, file) of every shard."""
        names = [(file.stem.split("-"), file) for file in self.shards.glob("*.npz")]
        return sorted((int(first), int(count), file) for (first, count), file in names)

    def add(self, first: int, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        """Write samples first, first + 1, ...; images [B, H, W, C], labels [B].

        Raises:
            ValueError: if the disk is full, or the file cannot be written.
        """
        buffer = io.BytesIO()
        np.savez(buffer, images=images, labels=labels)
        with explained_write(f"to {self.shards}", f"{_ADVICE}, it continues from here"):
            self.shards.mkdir(exist_ok=True)
            write_atomically(self.shards / f"{first:08d}-{len(images):05d}.npz", buffer.getvalue())

    def stream(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Images [B, H, W, C] and labels [B] of all shards in order; a sample that two shards hold comes once."""
        next_index = 0
        for first, count, file in self._sorted_shards():
            skip = next_index - first
            if skip < count:
                with np.load(file) as shard:
                    yield shard["images"][skip:], shard["labels"][skip:]
                next_index = first + count

    def merge(self, with_labels: bool) -> Path:
        """Write samples_{N}x{H}x{W}x{C}.npz from the shards: arr_0 uint8 images and, if asked, arr_1 int64 labels.

        Equal samples give equal bytes. The shards stay until `discard_shards`.

        Raises:
            ValueError: if the disk is full.
        """
        shape = (self.num_samples, *next(self.stream())[0].shape[1:])
        path = self.path / f"samples_{'x'.join(map(str, shape))}.npz"
        explained = explained_write(str(path), f"{_ADVICE}; the samples are safe")
        with explained, open_atomically(path) as file, zipfile.ZipFile(file, "w") as archive:
            with npz_member(archive, "arr_0", np.dtype(np.uint8), shape) as member:
                for images, _ in self.stream():
                    member.write(images.tobytes())
            if with_labels:
                with npz_member(archive, "arr_1", np.dtype(np.int64), shape[:1]) as member:
                    for _, labels in self.stream():
                        member.write(labels.tobytes())
        return path

    def discard_shards(self) -> None:
        """Remove the shards, once the file that holds them all is in place."""
        shutil.rmtree(self.shards, ignore_errors=True)


def save_pngs(folder: Path, first: int, images: NDArray[np.uint8]) -> None:
    """Write samples as folder/000000.png, ...

    Raises:
        ValueError: if the disk is full, or a file cannot be written.
    """
    with explained_write(f"to {folder}", f"{_ADVICE}, it continues from here"):
        folder.mkdir(exist_ok=True)
        for offset, image in enumerate(images):
            write_atomically(folder / f"{first + offset:06d}.png", png_bytes(picture(image)))


def picture(image: NDArray[np.uint8]) -> Image.Image:
    """An image [H, W, C] as Pillow has it: grey for one channel, else RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_grid(path: Path, images: Sequence[NDArray[np.uint8]], titles: Sequence[str]) -> None:
    """Write `draw_grid` as a PNG file."""
    write_atomically(path, png_bytes(draw_grid(images, titles)))


def png_bytes(image: Image.Image) -> bytes:
    """A picture as the contents of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw_grid(images: Sequence[NDArray[np.uint8]], titles: Sequence[str], columns: int | None = None) -> Image.Image:
    """A picture of up to some dozens of images [H, W, C], each with its title above; small images are enlarged."""
    count, (height, width) = len(images), images[0].shape[:2]
    zoom = max(1, 128 // width)
    columns = columns or min(count, max(4, round(count**0.5)))
    rows = -(-count // columns)
    gap, title_height = 8, 20
    cell_width, cell_height = width * zoom + gap, height * zoom + gap + title_height
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        left = gap + number % columns * cell_width
        top = gap + number // columns * cell_height
        while font.getlength(title) > width * zoom and len(title) > 1:
            title = title.removesuffix("…")[:-1] + "…"
        draw.text((left, top + 2), title, "black", font)
        enlarged = picture(image).convert("RGB").resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, top + title_height))
    return sheet
