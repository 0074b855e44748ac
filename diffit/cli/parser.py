"""From a command line to a dataclass tree: values by dotted name, of files and, over them, of flags."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml

from diffit.cli.settings import Command, Setting, help_text, settings_of
from diffit.settings import alternatives, check_setting, check_settings, type_hints, typed, words_of
from diffit.system.console import say

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-4 is one, where YAML 1.1 asks for 1.0e-4, and neither is 010 eight nor 1:30 ninety."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _number in {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)",
    "float": r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_number})$"), [*"-+.0123456789"])


def given_arguments(command: Command, argv: Sequence[str] | None) -> list[str]:
    """The arguments, by default the program's; prints the help and ends the program if they ask for it."""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        say(*help_text(command).splitlines())
        raise SystemExit(0)
    return list(argv)


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


def parse(command: Command, arguments: Sequence[str]) -> dict[str, Any]:
    """What --config files and, over them, flags set: dotted name of a setting -> value.

    Raises:
        ValueError: in one sentence, for an unknown setting or a value that does not fit.
    """
    settings = {setting.key: setting for setting in settings_of(command.config_class)}
    split = [(flag, values) for flag, values, _ in split_flags(arguments)]
    files = [_read_file(values) for flag, values in split if flag == "--config"]
    written = [pair for tree in files for pair in _leaves(tree, settings)]
    for flag, values in split:
        if flag != "--config":
            if not flag.startswith("--"):
                raise ValueError(f"'{flag}' belongs to no flag; {command.prog} --help lists all settings")
            setting = settings.get(flag[2:])
            written.append((flag[2:], _value(setting, values) if setting else _yaml(" ".join(values))))
    given: dict[str, Any] = {}
    for key, value in written:
        node, _, rest = key.partition(".")
        if key in settings:
            given[key] = check_setting(f"--{key}", settings[key].hint, settings[key].range, value)
        elif rest and node in settings and get_origin(settings[node].hint) is dict:  # an entry of a mapping
            given[node] = {**given.get(node, {}), rest: value}
        else:
            raise ValueError(_unknown(key, settings) + f"; {command.prog} --help lists all settings")
    return given


def build(config_class: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass tree of these values by dotted name; the others have their defaults.

    Raises:
        ValueError: in one sentence, for a value that does not fit.
    """
    config = _build(config_class, values, "")
    check_settings(config)
    return config


def _build(config_class: type, values: Mapping[str, Any], prefix: str) -> Any:
    own = {}
    for each in fields(config_class):
        key, hint = f"{prefix}{each.name}", type_hints(config_class)[each.name]
        if is_dataclass(hint):
            own[each.name] = _build(hint, values, f"{key}.")  # type: ignore[arg-type]
        elif key in values:
            own[each.name] = values[key]
    return config_class(**own)


def _read_file(values: Sequence[str]) -> dict[str, Any]:
    path = Path(" ".join(values)).expanduser()
    if not path.exists() or path.is_dir():
        raise ValueError(f"--config {path}: there is no such file")
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise ValueError(f"--config {path} must hold settings as NAME: VALUE")
    return tree


def _leaves(tree: Mapping[str, Any], settings: Mapping[str, Setting], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a file by dotted name."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in settings:
            yield from _leaves(value, settings, f"{key}.")
        else:
            yield key, value


def _value(setting: Setting, values: Sequence[str]) -> Any:
    """The values that follow a flag: several are a list, a switch alone is true, and where a text fits it is one."""
    if list[str] in alternatives(setting.hint):
        return list(values)
    if not values:
        if setting.hint is bool:
            return True
        raise ValueError(f"--{setting.key} needs a value, {words_of(setting.hint)}: {setting.written}")
    if len(values) > 1 and not any(get_origin(choice) in (tuple, list) for choice in alternatives(setting.hint)):
        raise ValueError(f"--{setting.key} takes one value, {words_of(setting.hint)}, not {' '.join(values)}")
    text = values[0] if len(values) == 1 else f"[{', '.join(values)}]"
    value = _yaml(text)
    with contextlib.suppress(TypeError):
        return text if isinstance(value, str) else typed(setting.hint, value)
    return text


def _yaml(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _unknown(key: str, settings: Mapping[str, Setting]) -> str:
    if any(name.startswith(f"{key}.") for name in settings):
        return f"--{key} is a group of settings and takes no value of its own: set --{key}.NAME"
    close = difflib.get_close_matches(key, settings, 1)
    return f"there is no setting --{key}" + (f": did you mean --{close[0]}?" if close else "")
