"""Class labels as users write them: numbers or names."""

from __future__ import annotations

from collections.abc import Sequence

from timm.data import ImageNetInfo

from diffit.checkpoint.config import CheckpointConfig


def class_names(config: CheckpointConfig) -> Sequence[str]:
    """The checkpoint's class names; ImageNet's for a model of 1000 unnamed classes; else the numbers."""
    num_classes = config.network.num_classes
    if config.class_names:
        return config.class_names
    if num_classes == 1000:
        imagenet = ImageNetInfo()
        return [imagenet.index_to_description(i).split(",")[0] for i in range(1000)]
    return [str(i) for i in range(num_classes)]


def resolve_labels(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Class numbers for numbers or names (in any case).

    Raises:
        ValueError: if there is no such class.
    """
    if wanted and not names:
        raise ValueError("the model knows no classes: leave the class labels out")
    by_name = {name.lower(): index for index, name in reversed(list(enumerate(names)))}
    labels = []
    for text in wanted:
        index = int(text) if text.lstrip("-").isdigit() else by_name.get(text.lower(), -1)
        if not 0 <= index < len(names):
            shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise ValueError(
                f"there is no class '{text}': choose a number from 0 to {len(names) - 1} or one of {shown}"
            )
        labels.append(index)
    return labels
