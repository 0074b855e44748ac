"""What all command lines share: the parser of a dataclass tree, and how a program ends on a user's error."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace


def fail(message: str) -> NoReturn:
    """Print one sentence and end with exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def build_parser(config_class: type, prog: str, description: str, epilog: str) -> ArgumentParser:
    """A parser whose flags are the fields of a dataclass tree; YAML files come in by --config."""

    class Formatter(DefaultHelpFormatter):
        """Keeps the line breaks of the epilog."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text

    parser = ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=Formatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the settings; flags override it")
    parser.add_class_arguments(config_class, as_group=True)
    return parser


def take_flag(argv: Sequence[str], position: int) -> tuple[str, list[str], int]:
    """The flag at a position, its values up to the next flag, and the position of that."""
    flag, equals, value = argv[position].partition("=")
    values = [value] if equals else []
    position += 1
    while position < len(argv) and not argv[position].startswith("--"):
        values.append(argv[position])
        position += 1
    return flag, values, position


def config_first(argv: Sequence[str]) -> list[str]:
    """The arguments with --config moved to the front: where it stands, it would override the flags before it."""
    first: list[str] = []
    rest: list[str] = []
    position = 0
    while position < len(argv):
        start = position
        flag, _, position = take_flag(argv, position)
        (first if flag == "--config" else rest).extend(argv[start:position])
    return first + rest


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """The parsed arguments.

    Raises:
        ValueError: in one sentence, for an unknown setting or a value that does not fit.
    """
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        sentence = " ".join(str(error).split()).replace('Parser key "', '"').replace("typing.", "")
        raise ValueError(f"{sentence}; {parser.prog} --help lists all settings") from error
