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
    conditioning: str = "tmsa"
    time_embedding: str = "positional"


@dataclass(frozen=True)
class ImageDiffiTConfig:
    """The constructor arguments of `diffit.ImageDiffiT`; the defaults are the CIFAR-10 model."""

    input_size: int = 32
    in_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256)
    blocks: tuple[int, ...] = (2, 2, 2)
    window_size: int = 4
    head_dim: int = 64
    mlp_ratio: float = 4.0
    cond_dim: int = 512
    dropout: float = 0.0
    class_dropout_prob: float = 0.1
    num_classes: int = 0
    conditioning: str = "tmsa"
    time_embedding: str = "positional"
    encoder: str = "diffit"
    decoder: str = "diffit"


NetworkConfig = DiffiTConfig | ImageDiffiTConfig

_CIFAR10 = ImageDiffiTConfig()
_FFHQ64 = ImageDiffiTConfig(input_size=64, channels=(128, 256, 256, 256), blocks=(1, 2, 2, 2), window_size=8)

# -S, -B, -L follow the widths, depths and heads that DiT made familiar; -4 has the four blocks a stage of the paper's
# table, where its training section says two.
ZOO: dict[str, NetworkConfig] = {
    "Diffit": DiffiTConfig(),
    "Diffit-L": DiffiTConfig(hidden_size=1024, depth=24, num_heads=16),
    "Diffit-B": DiffiTConfig(hidden_size=768, depth=12, num_heads=12),
    "Diffit-S": DiffiTConfig(hidden_size=384, depth=12, num_heads=6),
    "Diffit-Fashion": DiffiTConfig(input_size=8, patch_size=1, hidden_size=128, depth=12, num_heads=4, num_classes=10),
    "ImageDiffit-CIFAR10": _CIFAR10,
    "ImageDiffit-FFHQ64": _FFHQ64,
    "ImageDiffit-CIFAR10-4": replace(_CIFAR10, blocks=(4, 4, 4)),
    "ImageDiffit-FFHQ64-4": replace(_FFHQ64, blocks=(4, 4, 4, 4)),
    "ImageDiffit-Fashion": ImageDiffiTConfig(
        in_channels=1, channels=(64, 128, 128), head_dim=32, cond_dim=192, num_classes=10
    ),
    "ImageDiffit-Tiny": ImageDiffiTConfig(channels=(16, 32), blocks=(1, 1), head_dim=8, cond_dim=32),
}


def model_config(name: str, **overrides: Any) -> NetworkConfig:
    """The config of a registered size, with some fields replaced; lists, as YAML and JSON have them, become tuples.

    Raises:
        ValueError: if the name is not registered, or an override is not a field of its config.
    """
    if name not in ZOO:
        raise ValueError(f"unknown model '{name}': choose one of {', '.join(ZOO)}")
    known = [field.name for field in fields(ZOO[name])]
    for key in overrides:
        if key not in known:
            raise ValueError(f"unknown network setting '{key}' for {name}: it has {', '.join(known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    return replace(ZOO[name], **values)


def build_model(config: NetworkConfig) -> nn.Module:
    """A freshly initialised network of this config, in training mode."""
    if isinstance(config, ImageDiffiTConfig):
        from diffit.models.image import ImageDiffiT

        return ImageDiffiT(**asdict(config))
    from diffit.models.latent import DiffiT

    return DiffiT(**asdict(config))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """A freshly initialised network of a registered size: `create_model("Diffit", depth=30)`.

    Raises:
        ValueError: see `model_config`.
    """
    return build_model(model_config(name, **overrides))
