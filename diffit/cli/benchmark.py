"""The configuration of python -m diffit.benchmark."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffit.cli.parser import build_parser, config_first, fail, parse, take_flag
from diffit.device import Device

CASES = ("Diffit-256", "Diffit-512", "ImageDiffit-CIFAR10", "ImageDiffit-FFHQ64", "Diffit-Fashion")
PARTS = ("sampling", "training")
_LISTS = ("cases", "parts")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured.

    Args:
        cases: the models; all by default.
        parts: sampling, training or, by default, both.
        device: where to run; auto takes a GPU if there is one.
        batch_size: images at once; by default what suits the case and the device.
        model_path: weights of the one case that is named, for errors of real images; random ones by default, but for
            the bundled model.
        rounds: counted turns of every way, at most.
        seconds: no new round of a comparison starts after this time.
        compile: on a CPU too, where that takes longer than most runs.
        json: write all that was measured to this file.
    """

    cases: list[str] = field(default_factory=lambda: list(CASES))
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    device: Device = "auto"
    batch_size: int | None = None
    model_path: str | None = None
    rounds: int = 9
    seconds: float = 120.0
    compile: bool = False
    json: str | None = None


def parse_benchmark(argv: Sequence[str] | None = None) -> BenchmarkConfig:
    """Resolve the command line. Ends the program with one sentence and exit code 2 if it cannot be."""
    parser = build_parser(
        BenchmarkConfig,
        prog="python -m diffit.benchmark",
        description="Measure every fast path against the plain one, in turns, in one run",
        epilog=f"Cases: {', '.join(CASES)}.\nFor example: python -m diffit.benchmark --cases Diffit-Fashion",
    )
    try:
        tree = parser.instantiate(parse(parser, _join_lists(config_first(sys.argv[1:] if argv is None else argv))))
        config = BenchmarkConfig(**{name: tree[name] for name in BenchmarkConfig.__dataclass_fields__})
        _check(config)
    except (ValueError, OSError) as error:
        fail(str(error))
    return config


def _join_lists(argv: Sequence[str]) -> list[str]:
    """--cases A B as the one argument that the parser takes."""
    joined: list[str] = []
    position = 0
    while position < len(argv):
        flag, values, position = take_flag(argv, position)
        joined += [f"{flag}={json.dumps(values)}"] if flag[2:] in _LISTS else [flag, *values]
    return joined


def _check(config: BenchmarkConfig) -> None:
    for name, known in (("cases", CASES), ("parts", PARTS)):
        for value in getattr(config, name):
            if value not in known:
                raise ValueError(f"--{name} {value} is unknown: choose of {', '.join(known)}")
    if config.model_path and len(config.cases) != 1:
        raise ValueError("--model_path belongs to one case: name it with --cases")
    if config.rounds < 1 or (config.batch_size is not None and config.batch_size < 1):
        raise ValueError("--rounds and --batch_size must be at least 1")
