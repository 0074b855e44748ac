"""The sizes by name. A size is a frozen config; no tensor library is needed to read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class DiffiTConfig:
    """The constructor arguments of `diffit.DiffiT`; the defaults are the released 561 M model at 256 pixels."""

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    num_classes: int = 1000
    learn_sigma: bool = True


# -S, -B, -L follow the widths, depths and heads that DiT made familiar.
ZOO: dict[str, DiffiTConfig] = {
    "Diffit": DiffiTConfig(),
    "Diffit-L": DiffiTConfig(hidden_size=1024, depth=24, num_heads=16),
    "Diffit-B": DiffiTConfig(hidden_size=768, depth=12, num_heads=12),
    "Diffit-S": DiffiTConfig(hidden_size=384, depth=12, num_heads=6),
    "Diffit-Fashion": DiffiTConfig(input_size=8, patch_size=1, hidden_size=128, depth=12, num_heads=4, num_classes=10),
}


def model_config(name: str, **overrides: Any) -> DiffiTConfig:
    """The config of a registered size, with some fields replaced.

    Raises:
        ValueError: if the name is not registered, or an override is not a field of its config.
    """
    if name not in ZOO:
        raise ValueError(f"unknown model '{name}': choose one of {', '.join(ZOO)}")
    known = [field.name for field in fields(ZOO[name])]
    for key in overrides:
        if key not in known:
            raise ValueError(f"unknown network setting '{key}' for {name}: it has {', '.join(known)}")
    return replace(ZOO[name], **overrides)


def build_model(config: DiffiTConfig) -> nn.Module:
    """A freshly initialised network of this config, in training mode."""
    from diffit.models.latent import DiffiT

    return DiffiT(**asdict(config))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """A freshly initialised network of a registered size: `create_model("Diffit", depth=30)`.

    Raises:
        ValueError: see `model_config`.
    """
    return build_model(model_config(name, **overrides))
