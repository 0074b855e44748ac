"""Small things about files that every package needs: atomic writes, .npz, hashes, comparisons, and quiet downloads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from huggingface_hub.utils import logging

_PIECE = 1 << 22


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it: it is whole, or it is not there.

    Raises:
        OSError: if it cannot be written; nothing is left behind, and an older file of that name is intact.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def npz_member(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """An array inside an .npz, open for its data in C order; its header is already written."""
    info = zipfile.ZipInfo(f"{name}.npy")  # its date is 1980, so equal arrays make equal files
    with archive.open(info, "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def as_tree(config: Any) -> dict[str, Any]:
    """A dataclass tree as nested dictionaries of plain values, as JSON and YAML have them."""
    return json.loads(json.dumps(asdict(config)))


def difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> str:
    """The settings that differ, as 'seed: 0, now 1; guidance.scale: 1.5, now 4.4'."""
    parts = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            parts.append(difference(a, b, f"{prefix}{key}."))
        elif a != b:
            parts.append(f"{prefix}{key}: {a}, now {b}")
    return "; ".join(part for part in parts if part)


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence huggingface_hub's logs and warnings; progress bars of downloads stay.

    What goes wrong is raised, and said once by the caller.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
