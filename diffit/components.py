"""The networks as components of a diffusers pipeline: the same arguments, parameters and `forward`, and its files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

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


class DiffiTTransformer2DModel(ModelMixin, DiffiT, ConfigMixin):
    """`diffit.DiffiT` with the config, loading and saving of diffusers."""

    config: Any
    __init__ = register_to_config(DiffiT.__init__)


class ImageDiffiTTransformer2DModel(ModelMixin, ImageDiffiT, ConfigMixin):
    """`diffit.ImageDiffiT` with the config, loading and saving of diffusers."""

    config: Any
    __init__ = register_to_config(ImageDiffiT.__init__)
    # Diffusers would give the config's `encoder` and `decoder`, which are words, before the parts of these names.
    __getattr__ = nn.Module.__getattr__


Transformer = DiffiTTransformer2DModel | ImageDiffiTTransformer2DModel


def as_component(model: nn.Module, config: NetworkConfig) -> Transformer:
    """A network, with its very tensors, in eval mode."""
    kind = DiffiTTransformer2DModel if isinstance(config, DiffiTConfig) else ImageDiffiTTransformer2DModel
    with torch.device("meta"):
        component = kind(**asdict(config))
    component.load_state_dict(model.state_dict(), assign=True)
    return component.eval()
