"""The studies of configs/ablations: their variants, and what differs in them from a base."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from diffit.models.config import DiffiTConfig, model_config
from diffit.system.files import as_tree

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Variant:
    """What differs from the base.

    Args:
        name: of its folder; equal names in several studies are the same runs.
        label: in tables and plots.
        network: fields of the network's config.
        times: widths of the network's config, as multiples of the base's.
        curve: score all checkpoints that are kept, not the last alone.
        paper: published FID by data set.
    """

    name: str
    label: str
    network: dict[str, Any] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    curve: bool = False
    paper: dict[str, float] = field(default_factory=dict)

    def settings(self, model: str, base: dict[str, Any]) -> dict[str, Any]:
        """The fields of the network's config that differ from those of the model's name."""

        def scaled(value: Any, factor: float) -> Any:
            return [int(factor * width) for width in value] if isinstance(value, list) else int(factor * value)

        whole = as_tree(model_config(model, **base))
        return base | self.network | {key: scaled(whole[key], factor) for key, factor in self.times.items()}


@dataclass(frozen=True)
class Study:
    """An ablation of the paper: its first variant is the paper's model, with which the others are compared.

    Args:
        space: image, or both: the networks that it means something to.
        plot: steps (score against iterations), or a field of the network's config; none by default.
        note: what the paper says beside its numbers.
    """

    title: str
    space: str
    variants: tuple[Variant, ...]
    plot: str = ""
    note: str = ""

    def fits(self, model: str) -> bool:
        """Whether the study means something to networks of this name."""
        return self.space == "both" or not isinstance(model_config(model), DiffiTConfig)


def load_studies() -> list[Study]:
    """All of configs/ablations.

    Raises:
        ValueError: if a name stands for two variants.
    """
    studies = []
    known: dict[str, Variant] = {}
    for path in sorted((ROOT / "configs" / "ablations").glob("*.yaml")):
        tree = yaml.safe_load(path.read_text())
        variants = tuple(Variant(**variant) for variant in tree.pop("variants"))
        for variant in variants:
            other = known.setdefault(variant.name, variant)
            if (variant.network, variant.times) != (other.network, other.times):
                raise ValueError(f"{path}: the variant {variant.name} is another one elsewhere: rename it")
        studies.append(Study(variants=variants, **tree))
    return studies


def variants_for(model: str, studies: list[Study]) -> dict[str, Variant]:
    """All variants of networks of this name, by name; one has a curve if any study wants it."""
    found: dict[str, Variant] = {}
    for variant in (variant for study in studies if study.fits(model) for variant in study.variants):
        before = found.get(variant.name, variant)
        found[variant.name] = replace(before, curve=before.curve or variant.curve)
    return found
