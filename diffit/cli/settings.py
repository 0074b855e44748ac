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
    """A leaf of the tree: its dotted key, its type, its default and what its dataclass says of it."""

    key: str
    hint: Any
    default: Any
    doc: str


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
def settings_of(config_class: type) -> tuple[Setting, ...]:
    """All leaves of a dataclass tree, in the order of its fields."""
    return tuple(_leaves(config_class, ""))


def _leaves(config_class: type, prefix: str) -> Iterator[Setting]:
    hints, docs = get_type_hints(config_class), _field_docs(config_class)
    for each in fields(config_class):
        hint = hints[each.name]
        if is_dataclass(hint):
            yield from _leaves(hint, f"{prefix}{each.name}.")  # type: ignore[arg-type]
        else:
            default = each.default if each.default_factory is MISSING else each.default_factory()
            yield Setting(prefix + each.name, hint, default, docs.get(each.name, ""))


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


def form_of(hint: Any) -> str:
    """How a value of a type is written on the command line, such as 'N N'."""
    forms = []
    for choice in choices_of(hint):
        inner = get_args(choice)
        if choice in _SCALARS:
            forms.append(_SCALARS[choice][0])
        elif get_origin(choice) is Literal:
            forms.append("|".join(map(str, inner)))
        elif get_origin(choice) is tuple:
            forms.append(" ".join(map(form_of, inner)))
        else:
            forms.append(f"{form_of(inner[0])} ..." if get_origin(choice) is list else "'{KEY: VALUE, ...}'")
    return " | ".join(forms)


def words_of(hint: Any) -> str:
    """What a value of a type may be, as it ends the sentence 'it must be'."""
    words = []
    for choice in choices_of(hint):
        inner = get_args(choice)
        if choice in _SCALARS:
            words.append(_SCALARS[choice][1])
        elif get_origin(choice) is Literal:
            words += [str(value) for value in inner]
        elif get_origin(choice) is tuple:
            several = inner[-1] is Ellipsis
            words.append(f"{'one or more' if several else _COUNTS[len(inner)]} {_plural(inner[0])}")
        elif get_origin(choice) is list:
            words.append(f"one or more {_plural(inner[0])}")
        else:
            words.append("a mapping of names to values")
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _plural(hint: Any) -> str:
    return re.sub("^an? ", "", words_of(hint)) + "s"


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
    nodes = dict(_nodes(command.config_class))
    used = {key.rpartition(".")[0] for key in command.everyday} | {""}
    for node in sorted(nodes, key=lambda name: name not in used):
        of = f"; by default {command.follows[node]}" if node in command.follows else ""
        lines += ["", f"{node}: {_title(nodes[node])}{of}" if node else "more settings"]
        for setting in every.values():
            if setting.key.rpartition(".")[0] == node and setting not in everyday:
                follows = command.follows if not of else {setting.key: ""}
                lines += _entry(f"--{setting.key} {form_of(setting.hint)}", _explained(setting, follows), width)
    return "\n".join([*lines, "", command.epilog.strip()]) + "\n"


def _nodes(config_class: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """The dotted name of the root, which is empty, and of every node below it; each with its dataclass."""
    yield prefix.rstrip("."), config_class
    for name, hint in get_type_hints(config_class).items():
        if is_dataclass(hint):
            yield from _nodes(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _title(config_class: type) -> str:
    return (config_class.__doc__ or "").splitlines()[0].rstrip(".")


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
    indent = 26
    wrapped = textwrap.wrap(text, max(width - indent, 30)) or [""]
    beside = len(flag) <= indent - 4
    first = [f"  {flag:<{indent - 2}}{wrapped[0]}"] if beside else [f"  {flag}", " " * indent + wrapped[0]]
    return first + [" " * indent + line for line in wrapped[1:]]
