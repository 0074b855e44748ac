"""Class labels as users write them: numbers, names, or ImageNet's synonyms."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from timm.data import ImageNetInfo
from torch import Tensor

from diffit.checkpoint.config import CheckpointConfig
from diffit.data.files import are_numbers
from diffit.system.files import first_few


def class_names(config: CheckpointConfig) -> Sequence[str]:
    """A name for each class: the checkpoint's; ImageNet's for a model of 1000 unnamed classes; else the numbers.

    Raises:
        ValueError: if the checkpoint names more classes than its network has.
    """
    names, num_classes = config.class_names, config.network.num_classes
    if len(names) > num_classes:
        raise ValueError(
            f"the checkpoint names {len(names)} classes and its network has {num_classes}: its metadata is not its own"
        )
    if num_classes == 1000 and not names:
        return [description.split(",")[0] for description in _imagenet().values()]
    return [*names, *map(str, range(len(names), num_classes))]


def resolve_labels(class_labels: Any, names: Sequence[str]) -> list[int]:
    """Class numbers of labels.

    Args:
        class_labels: one label, or a sequence or an array of them; none for None. Integers are class numbers, a text is
            a name in its exact spelling, else a number (where every name is a number, the name is meant), one of
            ImageNet's synonyms, or a name or synonym in any case. The text 'all' alone, unless it is a class, stands
            for every class in turn.
        names: of the classes, from `class_names`.

    Raises:
        ValueError: if there is no such class, or several.
    """
    if isinstance(class_labels, Tensor | np.ndarray):
        class_labels = class_labels.reshape(-1)
    one = isinstance(class_labels, str) or not isinstance(class_labels, Iterable)
    labels = [] if class_labels is None else [class_labels] if one else list(class_labels)
    if not labels:
        return []
    if not names:
        raise ValueError("the model knows no classes: leave the class labels out")
    if labels == ["all"] and "all" not in names:
        return list(range(len(names)))
    exact, folded = _spellings(names, str), _spellings(names, str.casefold)
    resolved = []
    for label in labels:
        by_name = isinstance(label, str) and are_numbers(names)
        try:
            numbers = _meant(label, names, exact, folded) if isinstance(label, str) else [operator.index(label)]
        except TypeError as error:
            raise ValueError(f"a class label is a name or a whole number, not {label!r}") from error
        if len(numbers) > 1:
            listed = ", ".join(map(str, numbers))
            raise ValueError(f"the name '{label}' means the classes {listed}: give one of these numbers")
        if not numbers or not 0 <= numbers[0] < len(names):
            choices = f"{'' if by_name else f'a number from 0 to {len(names) - 1} or '}one of {first_few(names, 10)}"
            raise ValueError(f"there is no class '{label}': choose {choices}")
        resolved += numbers
    return resolved


def known_labels(names: Sequence[str]) -> dict[str, int]:
    """Every spelling that `resolve_labels` takes for one class, case aside, and its number."""
    exact = _spellings(names, str)
    numbers = {text: _meant(text, names, exact, {}) for text in sorted(exact)}
    return {text: meant[0] for text, meant in numbers.items() if len(meant) == 1}


def _meant(
    text: str, names: Sequence[str], exact: Mapping[str, list[int]], folded: Mapping[str, list[int]]
) -> list[int]:
    """All class numbers that a text may mean, by the first rule that gives any."""
    if text not in exact and are_numbers([text]):
        return [i for i, name in enumerate(names) if int(name) == int(text)] if are_numbers(names) else [int(text)]
    return exact.get(text) or folded.get(text.casefold(), [])


def _spellings(names: Sequence[str], fold: Callable[[str], str]) -> dict[str, list[int]]:
    """Folded spelling -> class numbers: of the names and, where no class has it as its name, of ImageNet's synonyms.

    Classes have synonyms if they are named by WordNet ids, or all of them as ImageNet's.
    """
    imagenet = _imagenet()
    descriptions = [imagenet.get(name, "") for name in names]
    if list(names) == [description.split(",")[0] for description in imagenet.values()]:
        descriptions = list(imagenet.values())
    named, synonyms = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    for number, (name, description) in enumerate(zip(names, descriptions, strict=True)):
        named[fold(name)].append(number)
        for text in {fold(synonym.strip()) for synonym in description.split(",") if description}:
            synonyms[text].append(number)
    return synonyms | named


def _imagenet() -> dict[str, str]:
    """Descriptions of ImageNet's 1000 classes by WordNet id, as in 'n01443537': 'goldfish, Carassius auratus'."""
    info = ImageNetInfo()
    return {wnid: info.index_to_description(number) for number, wnid in enumerate(info.label_names())}
