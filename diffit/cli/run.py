"""How a command ends: with one sentence where the user can help, one line where it was interrupted, else a traceback.

Nothing is imported here that takes time: in `imported`, Ctrl-C is one line even while PyTorch is imported.
"""

from __future__ import annotations

import contextlib
import pkgutil
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from diffit.system.console import warn
from diffit.system.ranks import detect_world

INTERRUPTED = 130  # as a shell says of a command that SIGINT has ended
_PATIENCE = 5.0  # seconds that other ranks leave the first one of a machine to speak, before torchrun ends them with it


@contextlib.contextmanager
def one_sentence(stopped: str = "stopped") -> Iterator[None]:
    """Around a command: errors that a user can correct are printed in a sentence and end the program with 2.

    They are ValueErrors and what the system says of files; any other error keeps its traceback. An interruption prints
    `stopped` and ends with 130. Most errors are those of all ranks alike, of which the first of each machine speaks.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if detect_world().local_rank:
            time.sleep(_PATIENCE)
        fail(str(error))
    except KeyboardInterrupt:
        if detect_world().is_main:
            warn("", stopped)
        raise SystemExit(INTERRUPTED) from None


def fail(message: str) -> NoReturn:
    """Print one sentence and end with exit code 2."""
    warn(f"error: {message}")
    raise SystemExit(2)


@one_sentence()
def imported(command: str) -> Callable[[], int | None]:
    """The function `module:name` of a command, which returns its exit code."""
    return pkgutil.resolve_name(command)
