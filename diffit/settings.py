"""Settings are fields of frozen dataclasses. Type, range and meaning for a resume stand beside each field.

`check_settings` is the one check of values, whichever door they came by: a command line, a file, Python, a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import operator
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Type -> how a value is written on a command line, and what it is in words.
_DESCRIBED: dict[Any, tuple[str, list[str]]] = {
    bool: ("true|false", ["true or false"]),
    int: ("N", ["a whole number"]),
    float: ("X", ["a number"]),
    str: ("TEXT", ["a text"]),
}


class Resume(Enum):
    """What another value means to what was made before: samples of a folder, checkpoints of a run, weights."""

    SAME = "only the same value fits: another one is refused"
    NOTED = "another value fits, and is noted in the log"
    FREE = "the value changes nothing of what is learned or drawn"


SAME, NOTED, FREE = Resume


@cache
def type_hints(config_class: Any) -> dict[str, Any]:
    """The types of a dataclass' fields by name."""
    return get_type_hints(config_class)


_HOLDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}


@dataclass(frozen=True)
class Range:
    """Finite numbers within bounds: `at_least` and `at_most` are in it, `above` and `below` are not."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        given = ((holds, getattr(self, name)) for name, holds in _HOLDS.items())
        return math.isfinite(value) and all(bound is None or holds(value, bound) for holds, bound in given)

    def __str__(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"between {_number(self.at_least)} and {_number(self.at_most)}"
        bounds = {name.replace("_", " "): bound for name, bound in vars(self).items() if bound is not None}
        return " and ".join(f"{name} {_number(bound)}" for name, bound in bounds.items())


def _number(bound: float) -> str:
    return "2^64 - 1" if bound == 2**64 - 1 else str(bound) if isinstance(bound, int) else f"{bound:g}"


def setting(default: Any = None, resume: Resume | None = None, *, factory: Any = None, **bounds: float) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: its default; `factory` makes one that can change.
        resume: what another value means to what was made before; needed in the settings of a command that resumes.
        bounds: of `Range`, for every number in the value.
    """
    metadata = {"resume": resume, "range": Range(**bounds) if bounds else None}
    return field(default_factory=factory, metadata=metadata) if factory else field(default=default, metadata=metadata)


def settings_that(resume: Resume, config_class: Any, prefix: str = "") -> set[str]:
    """Dotted names of the settings of this meaning for a resume; a node of the tree has it for all settings in it."""
    names, hints = set[str](), type_hints(config_class)
    for each in fields(config_class):
        hint, name = hints[each.name], f"{prefix}{each.name}"
        if each.metadata.get("resume") is resume:
            names.add(name)
        elif each.metadata.get("resume") is None and is_dataclass(hint):
            names |= settings_that(resume, hint, f"{name}.")
    return names


def check_settings(config: Any, prefix: str = "--") -> None:
    """Refuse a dataclass tree in which a value is not of its field's type, or a number is out of its range.

    Args:
        config: the tree.
        prefix: what stands before the dotted name of a setting in an error: that of a flag.

    Raises:
        ValueError: in one sentence, for the first such value.
    """
    config_class: Any = type(config)
    hints = type_hints(config_class)
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            check_settings(value, f"{prefix}{each.name}.")
        else:
            check_setting(f"{prefix}{each.name}", hints[each.name], each.metadata.get("range"), value)


def check_setting(name: str, hint: Any, allowed: Range | None, value: Any) -> Any:
    """`check_settings` of one value, under the name that errors use; returns it as its type has it."""
    try:
        value = typed(hint, value)
    except TypeError:
        raise ValueError(f"{name} must be {words_of(hint)}, not {value}") from None
    for number in value if isinstance(value, (tuple, list)) else [value]:
        if allowed is not None and isinstance(number, (int, float)) and number not in allowed:
            raise ValueError(f"{name} must be {allowed}, not {number}")
    return value


def typed(hint: Any, value: Any) -> Any:
    """A value, of YAML say, as a type has it: 1 as 1.0 where a number is meant, a list as a tuple.

    Raises:
        TypeError: if it is not of the type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for choice in inner:
            with contextlib.suppress(TypeError):
                return typed(choice, value)
    elif origin in (tuple, list) and isinstance(value, (tuple, list)):
        items = [inner[0]] * len(value) if origin is list or inner[-1] is Ellipsis else inner
        if len(items) == len(value):
            return origin(map(typed, items, value))
    elif hint in (int, float):
        if isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**64:
            return hint(value)
        if hint is float and isinstance(value, Real) and not isinstance(value, Integral):  # NumPy's too
            return float(value)
    elif value in inner if origin is Literal else isinstance(value, origin or hint):
        return value
    raise TypeError


def words_of(hint: Any) -> str:
    """What a value of a type may be, as it ends the sentence 'it must be'."""
    *others, last = [word for _, words in described(hint) for word in words]
    return f"{', '.join(others)} or {last}" if others else last


def described(hint: Any) -> Iterator[tuple[str, list[str]]]:
    """The ways to write a value on a command line, such as 'N N', each with what it is in words."""
    choices = [choice for choice in alternatives(hint) if choice is not types.NoneType]
    several = [get_args(choice)[0] for choice in choices if get_origin(choice) is list]  # one of them is one item
    for choice in (choice for choice in choices if choice not in several):
        origin, inner = get_origin(choice), get_args(choice)
        if origin is Literal:
            yield "|".join(inner), list(inner)
        elif origin in (tuple, list):
            form, (words,) = next(described(inner[0]))
            many = origin is list or inner[-1] is Ellipsis
            count = "one or more" if many else {2: "two", 3: "three"}[len(inner)]
            yield f"{form} ..." if many else " ".join([form] * len(inner)), [f"{count} {words.partition(' ')[2]}s"]
        else:
            yield _DESCRIBED.get(choice, ("'{KEY: VALUE, ...}'", ["a mapping of names to values"]))


def alternatives(hint: Any) -> list[Any]:
    """The types of a union, or the one type that there is."""
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
