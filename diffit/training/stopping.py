"""When a run stops before its end: asked to by a signal, or because nothing it computes is finite."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

EXIT_CODE = 75  # EX_TEMPFAIL: not done, start it again


class Stopped(Exception):
    """The run was asked to stop; its checkpoint is written and the same command goes on from there."""


class StopSignals:
    """Context in which SIGTERM and SIGUSR1 set `.asked` and nothing else: the loop looks at it between steps."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class Skips:
    """Counts the steps that were skipped because their loss or gradient was not finite.

    Args:
        limit: so many in a row are an error.
        total: those of earlier starts of this run.
    """

    def __init__(self, limit: int, total: int = 0) -> None:
        self.limit, self.total, self.in_a_row = limit, total, 0

    def count(self, skipped: bool, step: int) -> None:
        """Take note of a step.

        Raises:
            ValueError: if there were too many in a row.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"loss or gradient was not finite in {self.in_a_row} steps in a row, the last of them step {step}: "
                "lower --optimizer.lr, set --optimizer.grad_clip, or choose --precision bf16 or fp32; the same command "
                "goes on from the newest checkpoint"
            )
