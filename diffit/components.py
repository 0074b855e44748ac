"""The networks as components of a diffusers pipeline: the same arguments, parameters and `forward`, and its files."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffit.models.config import DiffiTConfig, NetworkConfig
from diffit.models.image import ImageDiffiT
from diffit.models.latent import DiffiT

# The code in a saved pipeline, for DiffusionPipeline.from_pretrained; the first in transformer/, the other above it.
NETWORK_MODULE, PIPELINE_MODULE = "modeling_diffit", "pipeline"
MODULE_SOURCE = """try:
    from diffit.components import DiffiTTransformer2DModel, ImageDiffiTTransformer2DModel
    from diffit.pipeline import DiffiTPipeline
except ModuleNotFoundError as error:
    raise ImportError("this pipeline needs the package diffit: pip install diffit") from error

__all__ = ["DiffiTPipeline", "DiffiTTransformer2DModel", "ImageDiffiTTransformer2DModel"]
"""


class _Trained(PeftAdapterMixin, nn.Module):
    """Training as diffusers users know it: adapters, and blocks that are computed again in the backward pass."""

    blocks_in_order: Any  # of both networks
    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        """func: called with (forward, *arguments) in place of PyTorch's `checkpoint`."""
        self.disable_gradient_checkpointing()
        recompute = gradient_checkpointing_func or partial(checkpoint, use_reentrant=False)
        for block in self.blocks_in_order():
            block.forward = partial(recompute, block.forward)
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        for block in self.blocks_in_order():
            block.__dict__.pop("forward", None)
        self.gradient_checkpointing = False


class DiffiTTransformer2DModel(_Trained, ModelMixin, DiffiT, ConfigMixin):
    """`diffit.DiffiT` with the config, loading and saving of diffusers."""

    config: Any
    __init__ = register_to_config(DiffiT.__init__)


class ImageDiffiTTransformer2DModel(_Trained, ModelMixin, ImageDiffiT, ConfigMixin):
    """`diffit.ImageDiffiT` with the config, loading and saving of diffusers."""

    config: Any
    __init__ = register_to_config(ImageDiffiT.__init__)

    def __getattr__(self, name: str) -> Any:
        # Diffusers would give the config's `encoder` and `decoder`, which are words, before the parts of these names.
        parts = self.__dict__.get("_modules", {})
        return parts[name] if name in parts else super().__getattr__(name)


Transformer = DiffiTTransformer2DModel | ImageDiffiTTransformer2DModel


def as_component(model: nn.Module, config: NetworkConfig) -> Transformer:
    """A network, with its very tensors, in eval mode."""
    kind = DiffiTTransformer2DModel if isinstance(config, DiffiTConfig) else ImageDiffiTTransformer2DModel
    with torch.device("meta"):
        component = kind(**asdict(config))
    component.load_state_dict(model.state_dict(), assign=True)
    return component.eval()
