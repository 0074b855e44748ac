"""The records of a run that are lists of JSON, one a line: starts.jsonl, the settings of every start, and log.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from diffit.settings import FREE, SAME, settings_that
from diffit.system.files import as_tree, difference, write_atomically
from diffit.training.config import TrainConfig


def record_start(run_dir: Path, config: TrainConfig, step: int, ranks: int) -> str:
    """Write config.yaml and add the settings to starts.jsonl; returns what this start is, empty for a run's first.

    Raises:
        ValueError: if a run that has taken steps cannot go on with these settings, or starts.jsonl is damaged.
    """
    path, settings = run_dir / "starts.jsonl", as_tree(config)
    starts, damaged = read_lines(path, {"step", "settings"})
    if damaged:
        raise ValueError(
            f"{path} is damaged in line {damaged[0]}: remove that line and give the same command; a line is the "
            "settings of one start, and the newest one is compared with those of now"
        )
    now: dict[str, Any] = {"step": step, "ranks": ranks, "changed": "", "settings": settings}
    before = {"ranks": ranks} | starts[-1] if starts and step else now
    fixed = settings_that(SAME, TrainConfig)
    lost = difference({key: before["settings"].get(key) for key in fixed}, {key: settings[key] for key in fixed})
    if lost:
        raise ValueError(f"{run_dir} holds a run of other settings ({lost}): choose another --run_dir")
    now["changed"] = difference(before["settings"], settings, settings_that(FREE, TrainConfig))
    write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in (*starts, now)).encode())
    write_atomically(run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False).encode())
    if not step:
        return "no checkpoint yet: starts anew" if starts else ""
    moved = f", {ranks} {'rank' if ranks == 1 else 'ranks'} instead of {before['ranks']}"
    other = f" with other settings ({now['changed']})"
    return f"goes on from step {step}{moved * (ranks != before['ranks'])}{other * bool(now['changed'])}"


def forget_later_lines(path: Path, last_step: int) -> str:
    """Drop from a log what was logged after the step that a run goes on from; returns what else was lost, if anything.

    A run that is killed, or whose disk is full, leaves half a line.
    """
    lines, damaged = read_lines(path, {"step"})
    kept = [line for line in lines if line["step"] <= last_step]
    write_atomically(path, "".join(f"{json.dumps(line)}\n" for line in kept).encode())
    return f"{path}: line {damaged[0]} was damaged and is left out" if damaged else ""


def read_lines(path: Path, keys: set[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a file, each an object with at least these keys, and the numbers of lines that are none, from 1."""
    lines, damaged = [], []
    content = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and keys <= line.keys():
            lines.append(line)
        else:
            damaged.append(number)
    return lines, damaged
