"""Small things about files that every package needs: atomic writes, locks, .npz, hashes, comparisons."""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import os
import re
import socket
import warnings
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.utils import logging
from huggingface_hub.utils.sha import sha_fileobj
from numpy.typing import NDArray

from diffit.system.console import warn

try:
    import fcntl
except ImportError:  # Windows has no record locks: two commands can write to one folder there
    fcntl = None  # type: ignore[assignment]

_WRITER = re.compile(r"PytorchStreamWriter|inline_container|os error (\d+)")  # in errors of PyTorch and safetensors


def cache_folder() -> Path:
    """Where downloads live, and what is known of images: $DIFFIT_CACHE, or diffit/ in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DIFFIT_CACHE") or Path(caches, "diffit"))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it, rename it: it is whole, or it is not there.

    Raises:
        OSError: if it cannot be written; nothing is left behind, and an older file of that name is intact.
    """
    with open_atomically(path) as file:
        file.write(content)


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """The same for a file that is written bit by bit; an error in the block leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def explained_write(what: str, advice: str) -> Iterator[None]:
    """Says of an error of writing, by ValueError, what cannot be written, why, and what to do."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and (isinstance(error, ValueError) or not _WRITER.search(str(error))):
            raise
        raise ValueError(f"cannot write {what} ({write_failure(error)}): {advice}") from error


def check_apart(out: Path, source: str | Path | None, flag: str, inside: bool = True) -> None:
    """Make sure that what is written is not what is read, nor (if `inside`) lies in it.

    Raises:
        ValueError: naming the flag of the output.
    """
    if source is None or not Path(source).expanduser().exists():
        return
    there, read = out.expanduser().resolve(), Path(source).expanduser().resolve()
    if there == read or (inside and there.is_relative_to(read)) or (there.exists() and there.samefile(read)):
        raise ValueError(f"{out} is or lies in {source}, which is read: choose another {flag}")


@contextlib.contextmanager
def exclusive(folder: Path, name: str = "") -> Iterator[None]:
    """Have a folder, which is made if need be, or a file in it for this process alone until the block ends.

    What killed writers left of that file, or of files in the folder, is removed.

    It is a POSIX record lock on a file that names its holder: the system frees it when the process dies, forked workers
    do not inherit it, and network file systems know it.

    Raises:
        ValueError: naming host and process of who has it, or if the folder cannot be written to; at the end of the
            block, if the folder was deleted meanwhile.
    """

    def is_mine() -> bool:
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(file.fileno()), path.stat())
        return False

    if fcntl is None:
        yield
        return
    path = folder / (f".{name}.lock" if name else ".lock")
    while True:
        with explained_write(f"to {folder}", "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115 (it stays open as long as the lock)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "another process"
            file.close()
            raise ValueError(
                f"{folder / name} is in use by {holder}: wait for it or stop it, or choose another"
                f"{'' if name else ' folder'}"
            ) from None
        if is_mine():
            break
        file.close()  # its last holder has just removed it
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for leftover in folder.glob(f"{glob.escape(name)}*.part"):
            if leftover.is_file() and re.search(r"\.\d+\.part$", leftover.name):  # as open_atomically names them
                leftover.unlink(missing_ok=True)
        try:
            yield
            if not is_mine():
                raise ValueError(f"{folder} was deleted while it was written to: what was in it is lost, start again")
        finally:
            if is_mine():
                path.unlink()


@contextlib.contextmanager
def npz_member(archive: zipfile.ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """An array inside an .npz, open for its data in C order; its header is already written."""
    info = zipfile.ZipInfo(f"{name}.npy")  # its date is 1980, so equal arrays make equal files
    with archive.open(info, "w", force_zip64=True) as member:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        yield member


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as the contents of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read piece by piece."""
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def as_tree(config: Any) -> dict[str, Any]:
    """A dataclass tree as nested dictionaries of plain values, as JSON and YAML have them."""
    return json.loads(json.dumps(asdict(config)))


def differing(
    trees: Sequence[dict[str, Any]],
    free: Collection[str] = (),
    prefix: str = "",
    defaults: dict[str, Any] | None = None,
) -> dict[str, list[Any]]:
    """Dotted names of the settings that are not the same in all trees, each with its value in every tree.

    The free ones are left out. What a tree lacks has its default: it may be older than the setting.
    """
    found, defaults = dict[str, list[Any]](), defaults or {}
    for key in sorted({key for tree in trees for key in tree if f"{prefix}{key}" not in free}):
        values: list[Any] = [tree.get(key, defaults.get(key)) for tree in trees]
        if all(isinstance(value, dict) for value in values):
            found |= differing(values, free, f"{prefix}{key}.", defaults.get(key))
        elif any(value != values[0] for value in values):
            found[f"{prefix}{key}"] = values
    return found


def difference(
    old: dict[str, Any], new: dict[str, Any], free: Collection[str] = (), defaults: dict[str, Any] | None = None
) -> str:
    """`differing` in words, as 'seed: 0, now 1; guidance.scale: 1.5, now 4.4'."""
    found = differing([old, new], free, defaults=defaults)
    return "; ".join(f"{name}: {before}, now {now}" for name, (before, now) in found.items())


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Names for a sentence: as many as `most`, and dots if there are more."""
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def write_failure(error: BaseException) -> str:
    """Why a file could not be written: PyTorch and safetensors hide the system's error behind one of their own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if cause is None and (hidden := _WRITER.search(str(error))):
        number = int(hidden[1] or errno.ENOSPC)
        cause = OSError(number, os.strerror(number))
    if cause is None:
        return first_line(error)
    return "the disk is full" if cause.errno in (errno.ENOSPC, errno.EDQUOT) else cause.strerror or first_line(cause)


@contextlib.contextmanager
def quiet_hub(name: str | None) -> Iterator[None]:
    """Print the name that is looked up on the Hub, which may take half a minute to fail; silence its logs and warnings.

    Progress bars of downloads stay. Errors are raised, for the caller to explain.
    """
    if name is not None:
        hint = "on this disk alone: HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "HF_HUB_OFFLINE=1: on this disk alone"
        warn(f"looking for {name} on the Hugging Face Hub ({hint})")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
