"""A run's log as JSON lines, one object a line."""

import json
from pathlib import Path
from typing import Any


class JsonLog:
    """Appends to a file; a resumed run first forgets what was logged after the step it goes on from.

    Args:
        path: the file.
        last_step: lines of later steps are dropped.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step(line) <= last_step]
        path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        with open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    """The step of a line; a line that was cut off when the run was killed belongs to no step."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):
        return float("inf")
