"""What all command lines share: the parser of a dataclass tree, and how a program ends on a user's error."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from diffit.cli.settings import Command, Setting, fits, form_of, help_text, one_argument, settings_of, words_of
from diffit.system.ranks import detect_world

_PATIENCE = 5.0  # seconds that the other ranks leave the first one to speak, before the launcher ends it with them
_KEY = re.compile(r'^"([\w.]+)"|^argument --([\w.]+)')
_VALUE = re.compile(r".*(?:Given|Got) value: (.*)")


def fail(message: str) -> NoReturn:
    """Print one sentence and end with exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Around what every rank knows, from the command line: the first rank of each machine says what is wrong with it.

    torchrun ends all ranks as soon as one has failed, so that the others wait for the sentence before they fail too.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if detect_world().local_rank == 0:
            fail(str(error))
        time.sleep(_PATIENCE)
        raise SystemExit(2) from error


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


def split_flags(argv: Sequence[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each flag, its values up to the next flag, and both as they were written."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    for group in groups:
        flag, equals, value = group[0].partition("=")
        yield flag, [value, *group[1:]] if equals else group[1:], group


def given_arguments(command: Command, argv: Sequence[str] | None) -> list[str]:
    """The arguments, by default the program's; prints the help and ends the program if they ask for it.

    --config moves to the front: where it stands, it would override the flags before it.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text(command), end="")
        raise SystemExit(0)
    groups = sorted(split_flags(argv), key=lambda each: each[0] != "--config")
    return [word for _, _, group in groups for word in group]


def parse(parser: ArgumentParser, config_class: type, arguments: Sequence[str], defaults: bool = True) -> Namespace:
    """The parsed arguments, and the defaults of the settings that they leave out.

    Raises:
        ValueError: in one sentence, for an unknown setting or a value that does not fit.
    """
    settings = {setting.key: setting for setting in settings_of(config_class)}
    flags, given, more = {f"--{key}" for key in settings}, [], f"; {parser.prog} --help lists all settings"
    for flag, values, group in split_flags(arguments):
        given += [flag, *one_argument(settings[flag[2:]], values)] if flag in flags else group
    try:
        parsed = parser.parse_args(given, defaults=defaults)
    except ArgumentError as error:
        raise ValueError(_explained(str(error), settings) + more) from error
    for key, setting in settings.items():  # the parser lets a value for a group pass, and some choices that are none
        if setting.node in parsed and not isinstance(parsed[setting.node], Namespace):
            raise ValueError(_of_a_node(setting.node) + more)
        if key in parsed and not fits(setting.hint, parsed[key]):
            raise ValueError(_must_be(setting, parsed[key]) + more)
    return parsed


def instantiate(parser: ArgumentParser, config_class: type, arguments: Sequence[str]) -> tuple[Any, Namespace]:
    """The config that the arguments make, and all that was parsed. Raises ValueError as `parse` does."""
    tree = parser.instantiate(parse(parser, config_class, arguments))
    return config_class(**{each.name: tree[each.name] for each in fields(config_class)}), tree


def check_numbers(config: Any, *positive: str) -> None:
    """Refuse what must be at least 1 and is not, and a seed that is not of 64 bits."""
    for name in positive:
        if getattr(config, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(config, name)}")
    if not 0 <= getattr(config, "seed", 0) < 2**64:
        raise ValueError(f"--seed must be between 0 and 2^64 - 1, not {config.seed}")


def _explained(error: str, settings: Mapping[str, Setting]) -> str:
    """What the parser says, in one line; of a setting, what it may be."""
    sentence = " ".join(error.split()).replace('Parser key "', '"')
    found, value = _KEY.match(sentence), _VALUE.match(sentence)
    key = (found[1] or found[2]) if found else ""
    if any(name.startswith(f"{key}.") for name in settings):
        return _of_a_node(key)
    if key not in settings:
        return sentence
    if value:
        return _must_be(settings[key], value[1])
    return f"--{key} needs a value, {words_of(settings[key].hint)}: --{key} {form_of(settings[key].hint)}"


def _must_be(setting: Setting, value: Any) -> str:
    return f'"{setting.key}" must be {words_of(setting.hint)}, not {value}: --{setting.key} {form_of(setting.hint)}'


def _of_a_node(key: str) -> str:
    return f'"{key}" is a group of settings and takes no value of its own: set --{key}.NAME'
