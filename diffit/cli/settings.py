"""The settings of a command line, read from its dataclass tree: what each may be, in the words of help and errors."""

from __future__ import annotations

import functools
import json
import re
import shutil
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

_SCALARS = {int: ("N", "a whole number"), float: ("X", "a number"), str: ("TEXT", "a text")}
_SCALARS[bool] = ("true|false", "true or false")
_COUNTS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Setting:
    """A leaf of the tree: its dotted key, its type, its default and what its dataclass says of it.

    node and title: key and first words of the dataclass; the key of the root is empty.
    """

    key: str
    hint: Any
    default: Any
    doc: str
    node: str
    title: str


@dataclass(frozen=True)
class Command:
    """What a command line says of itself.

    Args:
        config_class: the dataclass tree of its settings.
        prog: how it is started.
        description: what it does, and the simplest command.
        epilog: what help ends with.
        everyday: keys of the settings that help lists first.
        follows: settings, or nodes of them, whose defaults are not those of the dataclass -> whose they are.
    """

    config_class: type
    prog: str
    description: str
    epilog: str
    everyday: Sequence[str]
    follows: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def settings_of(config_class: type, prefix: str = "") -> tuple[Setting, ...]:
    """All leaves of a dataclass tree, in the order of its fields."""
    found: list[Setting] = []
    hints, docs = get_type_hints(config_class), _field_docs(config_class)
    title = (config_class.__doc__ or "").splitlines()[0].rstrip(".")
    for each in fields(config_class):
        hint = hints[each.name]
        if is_dataclass(hint):
            found += settings_of(hint, f"{prefix}{each.name}.")  # type: ignore[arg-type]
        else:
            default = each.default if each.default_factory is MISSING else each.default_factory()
            doc = docs.get(each.name, "")
            found.append(Setting(prefix + each.name, hint, default, doc, prefix.rstrip("."), title))
    return tuple(found)


def _field_docs(config_class: type) -> dict[str, str]:
    """What the `Args:` of a dataclass and its bases say of each field."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        documented = parse(base.__doc__ or "").params if is_dataclass(base) else []
        docs |= {each.arg_name: " ".join((each.description or "").split()) for each in documented}
    return docs


def choices_of(hint: Any) -> list[Any]:
    """What is written on a command line: the alternatives of a union, but None; one or more for one or several."""
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    choices = [choice for choice in get_args(hint) if choice is not types.NoneType]
    several = [get_args(choice)[0] for choice in choices if get_origin(choice) is list]
    return [choice for choice in choices if choice not in several]


def _alternatives(hint: Any) -> Iterator[tuple[str, list[str]]]:
    """How each choice is written on the command line, and what it may be in words."""
    for choice in choices_of(hint):
        origin, inner = get_origin(choice), get_args(choice)
        if choice in _SCALARS:
            form, words = _SCALARS[choice]
            yield form, [words]
        elif origin is Literal:
            yield "|".join(map(str, inner)), list(map(str, inner))
        elif origin in (tuple, list):
            several = origin is list or inner[-1] is Ellipsis
            form = f"{form_of(inner[0])} ..." if several else " ".join(map(form_of, inner))
            count = "one or more" if several else _COUNTS[len(inner)]
            yield form, [f"{count} {re.sub('^an? ', '', words_of(inner[0]))}s"]
        else:
            yield "'{KEY: VALUE, ...}'", ["a mapping of names to values"]


def form_of(hint: Any) -> str:
    """How a value of a type is written on the command line, such as 'N N'."""
    return " | ".join(form for form, _ in _alternatives(hint))


def words_of(hint: Any) -> str:
    """What a value of a type may be, as it ends the sentence 'it must be'."""
    *others, last = [word for _, words in _alternatives(hint) for word in words]
    return f"{', '.join(others)} or {last}" if others else last


def fits(hint: Any, value: Any) -> bool:
    """Whether a value, as YAML has it, is of a type; lists count as tuples."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(choice, value) for choice in inner)
    if origin is Literal:
        return value in inner
    if origin in (tuple, list):
        if not isinstance(value, (tuple, list)):
            return False
        several = [inner[0]] * len(value) if origin is list or inner[-1] is Ellipsis else inner
        return len(value) == len(several) and all(map(fits, several, value))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def one_argument(setting: Setting, values: Sequence[str]) -> list[str]:
    """The values that follow a flag, as the parser takes them: lists and tuples in one, a switch alone as true."""
    items = [get_args(choice)[0] for choice in choices_of(setting.hint) if get_origin(choice) in (list, tuple)]
    if items == [str]:
        return [json.dumps(list(values))]
    if items and len(values) > 1:
        return [f"[{', '.join(values)}]"]
    return ["true"] if setting.hint is bool and not values else list(values)


def help_text(command: Command) -> str:
    """Usage in a line, then the settings: everyday ones, the others, and every node of the tree."""
    width = min(shutil.get_terminal_size().columns, 120)
    every = {setting.key: setting for setting in settings_of(command.config_class)}
    everyday = [every[key] for key in command.everyday]
    lines = [f"usage: {command.prog} [--config FILE] [--SETTING VALUE ...]", "", command.description]
    lines += ["", "everyday settings"]
    lines += _entry("--config FILE", "a YAML file with any of the settings; flags override it", width)
    for setting in everyday:
        lines += _entry(f"--{setting.key} {form_of(setting.hint)}", _explained(setting, command.follows), width)
    titles = {"": "more settings"} | {s.node: f"{s.node}: {s.title}" for s in every.values() if s.node}
    used = {"", *(setting.node for setting in everyday)}
    for node in sorted(titles, key=lambda name: name not in used):
        whose = command.follows.get(node)
        lines += ["", titles[node] + (f"; by default {whose}" if whose else "")]
        for setting in every.values():
            if setting.node == node and setting not in everyday:
                follows = {setting.key: ""} if whose else command.follows
                lines += _entry(f"--{setting.key} {form_of(setting.hint)}", _explained(setting, follows), width)
    return "\n".join([*lines, "", command.epilog.strip()]) + "\n"


def _explained(setting: Setting, follows: Mapping[str, str]) -> str:
    """The doc of a setting, and its default or whose default it has."""
    default: Any = follows.get(setting.key, follows.get(setting.key.partition(".")[0], setting.default))
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, tuple):
        default = " ".join(map(str, default))
    return setting.doc + (f" [{default}]" if default not in (None, "", {}) else "")


def _entry(flag: str, text: str, width: int) -> list[str]:
    """A flag and its explanation beside it, or below if it is long."""
    indent, beside = " " * 26, len(flag) <= 22
    first = f"  {flag:<24}" if beside else indent
    wrapped = textwrap.wrap(text, max(width, 56), initial_indent=first, subsequent_indent=indent)
    return wrapped if beside else [f"  {flag}", *wrapped]
