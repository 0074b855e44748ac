"""The folder of a checkpoint: the names of its files, and whether it is whole.

ema.safetensors     the first EMA of the weights, which is sampled from
state.pt, state/    weights without averaging and the optimizer: in one file, or in shards
complete.json       the marker, written last: size and CRC-32 of every other file
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

EMA_FILE, STATE_FILE, STATE_FOLDER, MARKER = "ema.safetensors", "state.pt", "state", "complete.json"
_PIECE = 1 << 24


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a marker, oldest first."""
    return sorted(path.parent for path in folder.glob(f"[0-9]*/{MARKER}") if path.parent.name.isdigit())


def integrity_error(folder: Path, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint's files, in a few words; None if nothing is.

    only: a file whose checksum is computed; that of all by default. Sizes are compared in any case.
    """
    try:
        for name, (size, crc) in json.loads((folder / MARKER).read_text()).items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or (only in (None, name) and checksum(path) != crc):
                return f"{name} is damaged"
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def checksum(path: Path) -> int:
    """The CRC-32 of a file, read piece by piece."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return crc
