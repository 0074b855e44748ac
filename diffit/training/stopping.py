"""A run that is asked to stop by a signal ends with a checkpoint and an exit code of its own."""

from __future__ import annotations

import signal
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL: not done, start it again


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is written and the same command goes on from there."""


class StopSignals:
    """Context in which SIGTERM and SIGUSR1 set `.stop_requested` and nothing else: every step looks at it."""

    def __init__(self) -> None:
        self.stop_requested = False

    def __enter__(self) -> StopSignals:
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
