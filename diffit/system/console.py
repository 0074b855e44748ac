"""What a command prints: lines that names from outside cannot break, and progress that a log file can hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_MINUTE = 60.0


def printable(text: str) -> str:
    """A text from outside for one line of a terminal: control characters, and bytes that are no text, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(*lines: object, file: TextIO | None = None) -> None:
    """Print lines, each made printable: the one way of all commands to the console."""
    for line in lines:
        print(printable(str(line)), file=file, flush=True)


def warn(*lines: object) -> None:
    """`say` on the error stream."""
    say(*lines, file=sys.stderr)


def progress(iterable: Iterable[Any] | None = None, title: str = "", *, show: bool = True, **settings: Any) -> tqdm:
    """A progress bar, or a line a minute where the error stream is no terminal; TQDM_DISABLE=1 shows neither.

    Args:
        title: what is done.
        show: whether this rank shows it.
        settings: of tqdm.
    """
    from tqdm import tqdm  # which errors of a command line do not wait for

    if not show:
        settings["disable"] = True
    elif not (sys.stderr.isatty() or "file" in settings):
        settings |= {"file": _Lines(), "mininterval": _MINUTE, "maxinterval": _MINUTE}
    return tqdm(iterable, **{"desc": printable(title)} | settings)


class _Lines:
    """A file that ends each state of a bar by a new line, where tqdm would go back to write over it."""

    def write(self, text: str) -> None:
        line = text.replace("\x1b[A", "").strip()
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
