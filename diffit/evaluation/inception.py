"""Inception features in PyTorch: torch-fidelity's port of the network of 2015, with ADM's weights and sFID's features.

The weights are read from TensorFlow's frozen graph without TensorFlow. A block S of the graph is a convolution
`S/conv2d_params` [height, width, in, out] and a batch-norm `S/batchnorm/*`; torch-fidelity's port calls it by another
name. The table below pairs the names of all 94 blocks.

For speed each batch norm is folded into its convolution, images lie channels-last, and a CPU takes a few images at a
time, so that caches hold their activations; features change by rounding alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

_SPATIAL_CHANNELS = 7
_IMAGES_PER_THREAD = 4  # at a time, on a CPU


def load_features(path: Path, device: torch.device) -> Callable[[Tensor], list[Tensor]]:
    """The network with weights from a frozen graph (.pb), or from torch-fidelity's converted file (.pth).

    Returns a function of uint8 images [B, H, W, 3] that gives features [B, 2048], probabilities [B, 1008] and spatial
    features [B, 2023].

    Raises:
        ValueError: if the file does not hold the weights of this network.
        ModuleNotFoundError: without torch-fidelity, or without tensorboard for a graph.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    buffer = io.BytesIO()  # the extractor reads its weights from a file
    torch.save(load_state(path), buffer)
    buffer.seek(0)
    outputs = ["2048", "logits_unbiased"]
    try:
        network = FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=buffer)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} does not hold the weights of the Inception network of 2015") from error
    fold_batch_norms(network)
    network.to(device).to(memory_format=torch.channels_last)
    kept: list[Tensor] = []  # the block that sFID is defined on is none of the extractor's outputs
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output))

    def run(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # No TF32 in here, whatever the training around it has chosen: it would move FID in the third digit.
        matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
        chosen = matmul.allow_tf32, convolution.allow_tf32
        matmul.allow_tf32 = convolution.allow_tf32 = False
        try:
            pool, logits = network(images.permute(0, 3, 1, 2))  # a view: channels-last already
        finally:
            matmul.allow_tf32, convolution.allow_tf32 = chosen
        spatial = kept.pop()[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # [B, 17*17*7]
        return pool, logits.softmax(dim=1), spatial

    def extract(images: Tensor) -> list[Tensor]:
        at_once = _IMAGES_PER_THREAD * torch.get_num_threads() if device.type == "cpu" else len(images)
        pieces = [run(piece) for piece in images.split(at_once)]
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    return extract


def fold_batch_norms(network: nn.Module) -> None:
    """Make one convolution with a bias, in place, of each convolution `conv` and the batch norm `bn` after it."""
    for block in network.modules():
        conv, norm = getattr(block, "conv", None), getattr(block, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            block.conv, block.bn = fuse_conv_bn_eval(conv, norm), nn.Identity()


def _chain(branch: str, tower: str, count: int) -> dict[str, str]:
    return {f"{branch}_{i + 1}": _numbered(f"{tower}/conv", i) for i in range(count)}


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


_STEM = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_FIRST, _POOL = {"branch1x1": "conv"}, {"branch_pool": "tower_2/conv"}
_A = _FIRST | _chain("branch5x5", "tower", 2) | _chain("branch3x3dbl", "tower_1", 3) | _POOL
_B = {"branch3x3": "conv"} | _chain("branch3x3dbl", "tower", 3)
_C = _FIRST | _chain("branch7x7", "tower", 3) | _chain("branch7x7dbl", "tower_1", 5) | _POOL
_D = _chain("branch3x3", "tower", 2) | _chain("branch7x7x3", "tower_1", 4)
_E = _FIRST | _chain("branch3x3", "tower", 1) | _chain("branch3x3dbl", "tower_1", 2) | _POOL
_E |= {"branch3x3_2a": "tower/mixed/conv", "branch3x3_2b": "tower/mixed/conv_1"}
_E |= {"branch3x3dbl_3a": "tower_1/mixed/conv", "branch3x3dbl_3b": "tower_1/mixed/conv_1"}
_MIXED = {"5b": _A, "5c": _A, "5d": _A, "6a": _B, "6b": _C, "6c": _C, "6d": _C, "6e": _C, "7a": _D, "7b": _E, "7c": _E}


def block_names() -> dict[str, str]:
    """Name of each of the 94 blocks in torch-fidelity -> scope in TensorFlow's graph."""
    names = {f"Conv2d_{stem}": _numbered("conv", i) for i, stem in enumerate(_STEM)}
    for i, (mixed, branches) in enumerate(_MIXED.items()):
        names |= {f"Mixed_{mixed}.{branch}": f"{_numbered('mixed', i)}/{tail}" for branch, tail in branches.items()}
    return names


def load_state(path: Path) -> dict[str, Tensor]:
    """The network's weights under torch-fidelity's names, from a frozen graph (.pb) or torch-fidelity's file (.pth).

    Raises:
        ValueError: if the file is neither, or lacks a weight.
    """
    if path.suffix != ".pb":
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpicklers fail in many ways
            raise ValueError(f"{path} cannot be read as PyTorch weights ({error}); name a .pb or .pth file") from error
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.graph_pb2 import GraphDef  # the schema of the graph's format
    from tensorboard.util.tensor_util import make_ndarray

    graph = GraphDef()
    try:
        graph.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(
            f"{path} is not a frozen TensorFlow graph, or not a whole one: delete it and fetch it"
        ) from error
    nodes = {node.name: node for node in graph.node}

    def constant(name: str) -> NDArray[np.float32]:
        if name not in nodes:
            raise ValueError(f"{path} is not the Inception graph of 2015: it has no node '{name}'")
        return make_ndarray(nodes[name].attr["value"].tensor)

    state = {"fc.weight": constant("softmax/weights").T, "fc.bias": constant("softmax/biases")}
    for block, scope in block_names().items():
        state[f"{block}.conv.weight"] = constant(f"{scope}/conv2d_params").transpose(3, 2, 0, 1)
        bias = constant(f"{scope}/batchnorm/beta")
        # The op has a switch for its scale; when it is off, gamma is stored but not used.
        scaled = nodes[f"{scope}/batchnorm"].attr["scale_after_normalization"].b
        state[f"{block}.bn.weight"] = constant(f"{scope}/batchnorm/gamma") if scaled else np.ones_like(bias)
        state[f"{block}.bn.bias"] = bias
        state[f"{block}.bn.running_mean"] = constant(f"{scope}/batchnorm/moving_mean")
        state[f"{block}.bn.running_var"] = constant(f"{scope}/batchnorm/moving_variance")
        state[f"{block}.bn.num_batches_tracked"] = np.array(0)
    return {name: torch.tensor(value) for name, value in state.items()}
