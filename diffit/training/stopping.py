"""A run that is asked to stop by a signal ends with a checkpoint and an exit code of its own."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from diffit.system.ranks import World

EXIT_CODE = 75  # EX_TEMPFAIL: not done, start it again
INTERRUPTED = 130  # as shells report Ctrl-C


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is written and the same command goes on from there."""

    def __init__(self, sentence: str, exit_code: int = EXIT_CODE) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class StopSignals:
    """Context in which SIGTERM, SIGUSR1 and the first SIGINT set `.stop_requested` alone: every step looks at it.

    A second SIGINT is a KeyboardInterrupt.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.stop_requested, self.exit_code = False, EXIT_CODE
        self._interrupted = 0.0  # when, if at all

    def __enter__(self) -> StopSignals:
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.stop_requested = True
        if number == signal.SIGINT:
            now = time.monotonic()
            # torchrun passes on the terminal's SIGINT, which the ranks have had already.
            if self._interrupted and (self.world.size == 1 or now - self._interrupted > 1):
                raise KeyboardInterrupt
            if self.world.is_main and not self._interrupted:  # print is not safe in a signal's handler
                os.write(2, b"\nsaving a checkpoint, then stopping; once more stops at once\n")
            self._interrupted, self.exit_code = self._interrupted or now, INTERRUPTED
