"""What all command lines share: the parser of a dataclass tree, and how a program ends on a user's error."""

from __future__ import annotations

import re
import sys
import time
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from diffit.cli.settings import Command, Setting, fits, form_of, help_text, one_argument, settings_of, words_of
from diffit.ranks import detect_world

_PATIENCE = 5.0  # seconds that the other ranks leave the first one to speak, before the launcher ends it with them
_KEY = re.compile(r'^"([\w.]+)"|^argument --([\w.]+)')
_VALUE = re.compile(r".*(?:Given|Got) value: (.*)")


def fail(message: str) -> NoReturn:
    """Print one sentence and end with exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def refuse(message: str) -> NoReturn:
    """`fail` over what every rank knows, from the command line: the first rank of each machine says it.

    torchrun ends all ranks as soon as one has failed, so that the others wait for the sentence before they fail too.
    """
    if detect_world().local_rank == 0:
        fail(message)
    time.sleep(_PATIENCE)
    raise SystemExit(2)


def build_parser(config_class: type, prog: str, description: str = "", epilog: str = "") -> ArgumentParser:
    """A parser whose flags are the fields of a dataclass tree; YAML files come in by --config."""
    parser = ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        add_help=False,  # see `help_text`
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


def one_value_each(config_class: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with every setting's values in one, as the parser takes them: see `one_argument`."""
    settings = {f"--{setting.key}": setting for setting in settings_of(config_class)}
    given: list[str] = []
    position = 0
    while position < len(arguments):
        start = position
        flag, values, position = take_flag(arguments, position)
        if flag in settings:
            given += [flag, *one_argument(settings[flag], values)]
        else:
            given += arguments[start:position]
    return given


def answer_help(command: Command, argv: Sequence[str]) -> None:
    """Print the help and end the program, if it was asked for."""
    if {"-h", "--help"} & set(argv):
        print(help_text(command), end="")
        raise SystemExit(0)


def parse(parser: ArgumentParser, config_class: type, arguments: Sequence[str]) -> Namespace:
    """The parsed arguments.

    Raises:
        ValueError: in one sentence, for an unknown setting or a value that does not fit.
    """
    try:
        parsed = parser.parse_args(one_value_each(config_class, arguments))
    except ArgumentError as error:
        raise ValueError(f"{_explained(str(error), config_class)}; {parser.prog} --help lists all settings") from error
    wrong = _misfit(parsed, config_class)
    if wrong:
        raise ValueError(f"{wrong}; {parser.prog} --help lists all settings")
    return parsed


def instantiate(parser: ArgumentParser, config_class: type, arguments: Sequence[str]) -> tuple[Any, Namespace]:
    """The config that the arguments make, and all that was parsed. Raises ValueError as `parse` does."""
    tree = parser.instantiate(parse(parser, config_class, arguments))
    return config_class(**{name: tree[name] for name in (each.name for each in fields(config_class))}), tree


def _explained(error: str, config_class: type) -> str:
    """What the parser says, in one line; of a setting, what it may be."""
    settings = {setting.key: setting for setting in settings_of(config_class)}
    sentence = " ".join(error.split()).replace('Parser key "', '"')
    found = _KEY.match(sentence)
    key = (found[1] or found[2]) if found else ""
    if key not in settings:
        return _of_a_node(key) if any(name.startswith(f"{key}.") for name in settings) else sentence
    value = _VALUE.match(sentence)
    if value is not None:
        return _must_be(settings[key], value[1])
    return f"--{key} needs a value, {words_of(settings[key].hint)}: --{key} {form_of(settings[key].hint)}"


def _must_be(setting: Setting, value: Any) -> str:
    return f'"{setting.key}" must be {words_of(setting.hint)}, not {value}: --{setting.key} {form_of(setting.hint)}'


def _of_a_node(key: str) -> str:
    return f'"{key}" is a group of settings and takes no value of its own: set --{key}.NAME'


def _misfit(parsed: Namespace, config_class: type) -> str | None:
    """What the parser lets pass, in a sentence: a value for a group of settings, or a choice that is none."""
    for setting in settings_of(config_class):
        node = setting.key.rpartition(".")[0]
        if node and not hasattr(parsed[node], "__dict__"):
            return _of_a_node(node)
        if not fits(setting.hint, parsed[setting.key]):
            return _must_be(setting, parsed[setting.key])
    return None
