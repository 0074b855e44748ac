"""The sizes by name. A size is a frozen config; no tensor library is needed to read it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from diffit.settings import NOTED, SAME, check_settings, setting

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class DiffiTConfig:
    """The constructor arguments of `diffit.DiffiT`; the defaults are the released 561 M model at 256 pixels."""

    input_size: int = setting(32, NOTED, at_least=1, at_most=8192)
    patch_size: int = setting(2, SAME, at_least=1, at_most=8192)
    in_channels: int = setting(4, SAME, at_least=1, at_most=4096)
    hidden_size: int = setting(1152, SAME, at_least=4, at_most=65536)
    depth: int = setting(28, SAME, at_least=1, at_most=1000)
    num_heads: int = setting(16, SAME, at_least=1, at_most=65536)
    mlp_ratio: float = setting(4.0, SAME, at_least=0.01, at_most=100)
    class_dropout_prob: float = setting(0.1, NOTED, at_least=0, at_most=1)
    num_classes: int = setting(1000, NOTED, at_least=0, at_most=10**7)
    learn_sigma: bool = setting(True, SAME)
    conditioning: str = setting("tmsa", SAME)
    time_embedding: str = setting("positional", SAME)


@dataclass(frozen=True)
class ImageDiffiTConfig:
    """The constructor arguments of `diffit.ImageDiffiT`; the defaults are the CIFAR-10 model."""

    input_size: int = setting(32, NOTED, at_least=1, at_most=8192)
    in_channels: int = setting(3, SAME, at_least=1, at_most=4096)
    channels: tuple[int, ...] = setting((128, 256, 256), SAME, at_least=1, at_most=65536)
    blocks: tuple[int, ...] = setting((2, 2, 2), SAME, at_least=1, at_most=1000)
    window_size: int = setting(4, NOTED, at_least=1, at_most=8192)
    head_dim: int = setting(64, SAME, at_least=1, at_most=65536)
    mlp_ratio: float = setting(4.0, SAME, at_least=0.01, at_most=100)
    cond_dim: int = setting(512, SAME, at_least=2, at_most=65536)
    dropout: float = setting(0.0, NOTED, at_least=0, at_most=1)
    class_dropout_prob: float = setting(0.1, NOTED, at_least=0, at_most=1)
    num_classes: int = setting(0, NOTED, at_least=0, at_most=10**7)
    conditioning: str = setting("tmsa", SAME)
    time_embedding: str = setting("positional", SAME)
    encoder: str = setting("diffit", SAME)
    decoder: str = setting("diffit", SAME)


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
    "ImageDiffit-Small": ImageDiffiTConfig(
        channels=(16, 64, 96), blocks=(1, 1, 2), window_size=8, head_dim=16, cond_dim=128
    ),
    "ImageDiffit-Tiny": ImageDiffiTConfig(channels=(16, 32), blocks=(1, 1), head_dim=8, cond_dim=32),
}


def model_config(name: str, **overrides: Any) -> NetworkConfig:
    """The config of a registered size, with some fields replaced; lists, as YAML and JSON have them, become tuples.

    Raises:
        ValueError: if the name is not registered, or an override is not a field of its config, or out of its range.
    """
    if name not in ZOO:
        raise ValueError(f"unknown model '{name}': choose one of {', '.join(ZOO)}")
    known = [field.name for field in fields(ZOO[name])]
    for key in overrides:
        if key not in known:
            raise ValueError(f"unknown network setting '{key}' for {name}: it has {', '.join(known)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()}
    config = replace(ZOO[name], **values)
    check_settings(config, "--network.")
    return config


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
