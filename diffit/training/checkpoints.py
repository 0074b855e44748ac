"""A run's checkpoints on disk. 'Complete' means: every file synced, listed with its checksum in a marker, renamed.

A checkpoint is written into NNNNNNNN.part; the marker is its last file, and the rename to NNNNNNNN makes it count.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

MARKER = "complete.json"
_PIECE = 1 << 24


class Checkpoints:
    """The folder of a run's checkpoints.

    Args:
        folder: where they are, one folder each, named by its step.
        keep: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay for good; 0 is none.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every

    def complete(self) -> list[Path]:
        """Checkpoints with a marker, oldest first."""
        return sorted(path.parent for path in self.folder.glob(f"[0-9]*/{MARKER}") if path.parent.name.isdigit())

    def newest(self) -> Path | None:
        return next(reversed(self.complete()), None)

    def newest_intact(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose files are what the marker says; broken ones are named and put aside."""
        for folder in sorted((f for f in self.folder.glob("[0-9]*") if f.name.isdigit()), reverse=True):
            wrong = fault(folder)
            if wrong is None:
                return folder
            aside = folder.with_suffix(".broken")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            say(f"checkpoint {folder} is broken ({wrong}): it is now {aside.name}, and the one before is used")
        return None

    def begin(self, step: int) -> Path:
        """An empty folder for a checkpoint of this step; what a killed run has left half done goes."""
        for left in self.folder.glob("*.part"):
            shutil.rmtree(left)
        part = self._part(step)
        part.mkdir(parents=True)
        return part

    def finish(self, step: int) -> Path:
        """Sync, mark and rename what was begun; then drop what need not be kept.

        Raises:
            OSError: if it cannot be written.
        """
        part, final = self._part(step), self.folder / f"{step:08d}"
        marker = json.dumps(checksums(part), indent=1).encode()
        with open(part / MARKER, "wb") as file:
            file.write(marker)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(part)
        part.rename(final)
        _sync_folder(self.folder)
        self._prune()
        return final

    def abandon(self, step: int) -> None:
        """Remove what was begun, to give back its space."""
        shutil.rmtree(self._part(step), ignore_errors=True)

    def _part(self, step: int) -> Path:
        return self.folder / f"{step:08d}.part"

    def _prune(self) -> None:
        for old in self.complete()[: -self.keep]:
            if not self.keep_every or int(old.name) % self.keep_every:
                gone = self._part(int(old.name))
                old.rename(gone)  # half a checkpoint never counts, not even one half removed
                shutil.rmtree(gone)


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if nothing is."""
    try:
        expected = json.loads((folder / MARKER).read_text())
        found = checksums(folder)
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    wrong = next((name for name in expected if found.get(name) != expected[name]), None)
    if wrong is None:
        return None
    return f"{wrong} is {'damaged' if wrong in found else 'missing'}"


def checksums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file but the marker, each synced to disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): _checksum(path) for path in files}


def _checksum(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
        os.fsync(file.fileno())
    return [size, crc]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
