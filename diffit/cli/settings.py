"""The settings of a command line, read from its dataclass tree: its help, and what --dry_run prints."""

from __future__ import annotations

import functools
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

import yaml
from docstring_parser import parse

from diffit.diffusion.config import ProcessConfig, ProcessSettings, unread_settings
from diffit.settings import Range, described, type_hints
from diffit.system.files import as_tree


@dataclass(frozen=True)
class Setting:
    """A leaf of the tree: its dotted key, type, default and range, and the text on it in its dataclass.

    node and title: key and first words of the dataclass; the key of the root is empty.
    """

    key: str
    hint: Any
    default: Any
    range: Range | None
    doc: str
    node: str
    title: str

    @property
    def written(self) -> str:
        """The flag and how its value is written."""
        return f"--{self.key} {' | '.join(form for form, _ in described(self.hint))}"


@dataclass(frozen=True)
class Command:
    """A command line: its settings and the texts of its help.

    Args:
        config_class: the dataclass tree of its settings.
        prog: how it is started.
        description: what it does, and the simplest command.
        epilog: what help ends with.
        everyday: keys of the settings that help lists first.
        follows: setting or node whose default comes from elsewhere -> the words for where.
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
    hints, docs = type_hints(config_class), _field_docs(config_class)
    title = (config_class.__doc__ or "").splitlines()[0].rstrip(".")
    for each in fields(config_class):
        hint = hints[each.name]
        if is_dataclass(hint):
            found += settings_of(hint, f"{prefix}{each.name}.")  # type: ignore[arg-type]
        else:
            default = each.default if each.default_factory is MISSING else each.default_factory()
            doc = docs.get(each.name, "")
            allowed = each.metadata.get("range")
            found.append(Setting(prefix + each.name, hint, default, allowed, doc, prefix.rstrip("."), title))
    return tuple(found)


def _field_docs(config_class: type) -> dict[str, str]:
    """What the `Args:` of a dataclass and its bases say of each field."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        documented = parse(base.__doc__ or "").params if is_dataclass(base) else []
        docs |= {each.arg_name: " ".join((each.description or "").split()) for each in documented}
    return docs


def help_text(command: Command) -> str:
    """Usage in a line, then the settings: everyday ones, the others, and every node of the tree."""
    width = min(shutil.get_terminal_size().columns, 120)
    every = {setting.key: setting for setting in settings_of(command.config_class)}
    everyday = [every[key] for key in command.everyday]
    lines = [f"usage: {command.prog} [--config FILE] [--SETTING VALUE ...]", "", command.description]
    lines += ["", "everyday settings"]
    lines += _entry("--config FILE", "a YAML file with any of the settings; flags override it", width)
    for setting in everyday:
        lines += _entry(setting.written, _explained(setting, command.follows), width)
    titles = {"": "more settings"} | {s.node: f"{s.node}: {s.title}" for s in every.values() if s.node}
    used = {"", *(setting.node for setting in everyday)}
    for node in sorted(titles, key=lambda name: name not in used):
        whose = command.follows.get(node)
        lines += ["", titles[node] + (f"; by default {whose}" if whose else "")]
        for setting in every.values():
            if setting.node == node and setting not in everyday:
                follows = {setting.key: ""} if whose else command.follows
                lines += _entry(setting.written, _explained(setting, follows), width)
    return "\n".join([*lines, "", command.epilog.strip()]) + "\n"


def _explained(setting: Setting, follows: Mapping[str, str]) -> str:
    """The text on a setting, its range, and its default or whose default it has."""
    default: Any = follows.get(setting.key, follows.get(setting.key.partition(".")[0], setting.default))
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, tuple):
        default = " ".join(map(str, default))
    allowed = f" ({setting.range})" if setting.range else ""
    return setting.doc + allowed + (f" [{default}]" if default not in (None, "", {}) else "")


def _entry(flag: str, text: str, width: int) -> list[str]:
    """A flag and its explanation beside it, or below if it is long."""
    indent, beside = " " * 26, len(flag) <= 22
    first = f"  {flag:<24}" if beside else indent
    wrapped = textwrap.wrap(
        text, max(width, 56), initial_indent=first, subsequent_indent=indent, break_on_hyphens=False
    )
    return wrapped if beside else [f"  {flag}", *wrapped]


def yaml_lines(config: ProcessSettings, num_classes: int) -> list[str]:
    """A config as YAML without what does not apply: other processes, what the sampler does not read, guidance."""
    tree, nodes = as_tree(config), {each.name: getattr(config, each.name) for each in fields(config)}
    for name, node in nodes.items():
        if isinstance(node, ProcessConfig) and node is not config.process_config:
            del tree[name]
    for name in unread_settings(config.process, config.sampling.sampler):
        del tree["sampling"][name]
    for name in ("evaluation", "validation"):
        if not tree.get(name, {"every": 1})["every"]:
            del tree[name]
    if not num_classes and config.guidance.guide is None:  # there is no class to guide to
        del tree["guidance"]
    return yaml.safe_dump(tree, sort_keys=False).splitlines()
