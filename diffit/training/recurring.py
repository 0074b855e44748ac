"""What recurs while a run trains: every n steps, or by time, seldom enough to cost nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from diffit.training.logging import MetricLogger

FIRST = 45.0  # seconds after the first step at which what comes by time comes first
_SHARE = 0.01  # of the time that it may take


@dataclass
class Recurring:
    """An action of all ranks, and when it is due.

    By time it comes first after `FIRST`, and again `gap` seconds after the run is `growth` times as old, but not before
    all its times, the next one included, are 1% of the run. Each start of a run counts anew.

    Args:
        act: called with the log, and with whether this is the last step of this start.
        every: steps from one time to the next; 0 is never, None is by time.
        at_end: whether it is due after the last step too.
    """

    act: Callable[[MetricLogger, bool], None]
    every: int | None
    gap: float = 0.0
    growth: float = 1.0
    at_end: bool = False
    begun: float = field(default_factory=time.monotonic)
    spent: float = 0.0
    due_at: float = field(default_factory=lambda: FIRST)

    def by_clock(self, ending: bool) -> bool:
        """Whether it is due by this rank's clock after the next step, or, where that ends the run, once more."""
        return self.every is None and time.monotonic() - self.begun >= (FIRST if ending else self.due_at)

    def by_step(self, step: int, last: bool) -> bool:
        """Whether it is due at a step, whatever the clock says."""
        return (last and self.at_end) or (step % self.every == 0 if self.every else False)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around `act`: what it costs decides when it is due again."""
        before = time.monotonic()
        yield
        now = time.monotonic()
        self.spent += now - before
        self.due_at = max((now - self.begun) * self.growth + self.gap, (self.spent + now - before) / _SHARE)
