"""Weights from and to files: safetensors whose metadata hold the config of the model and how to sample it."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffit.checkpoint.config import METADATA_KEY, CheckpointConfig
from diffit.checkpoint.resolve import find_named
from diffit.models.config import DiffiTConfig, build_model
from diffit.nn.attention import relative_position_index
from diffit.system.files import write_atomically


def load_weights(path: Path, config: CheckpointConfig) -> nn.Module:
    """The network of a config with the weights of a file, float32, in eval mode.

    Raises:
        ValueError: in one sentence, if the file is damaged or its tensors are not those of the network.
    """
    state = _read(path)
    with torch.device("meta"):
        model = build_model(config.network)
    index = {name: state.pop(name) for name in list(state) if name.endswith("relative_position_index")}
    _check_fit(path, state, model.state_dict(), config)
    network = config.network
    window = network.input_size // network.patch_size if isinstance(network, DiffiTConfig) else network.window_size
    # The released files carry the Swin index in every block. It is derived data: it must agree, and is not kept.
    expected = relative_position_index(window)
    for name, value in index.items():
        if not torch.equal(value, expected):
            raise ValueError(f"{path} orders its relative positions differently ({name}): it is not a DiffiT file")
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model.eval()


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or of a .pt file that holds nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a plain file of weights (loading it could run code, so it is refused): "
            "save its state dict with torch.save, or as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or incomplete: copy or download it again") from error
    for key in ("ema", "model", "state_dict"):  # where training scripts commonly put the weights
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: save the model's state_dict() there")
    return state


def _check_fit(path: Path, found: dict[str, Tensor], expected: dict[str, Tensor], config: CheckpointConfig) -> None:
    if isinstance(config.network, DiffiTConfig) and "pos_embed" in found:
        side = round(found["pos_embed"].shape[1] ** 0.5) * config.network.patch_size
        size = side * config.codec.factor
        if side != config.network.input_size:
            raise ValueError(
                f"{path} was trained for {size}x{size} images, not {config.image_size}x{config.image_size}: "
                f"add --image_size {size}, or give another file"
            )
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is not part of it" for name in found if name not in expected]
    wrong += [
        f"{name} is {list(found[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{path} does not hold a {config.model}: {wrong[0]}{more}; check --model and --image_size")


def load_model(path_or_name: str | Path, image_size: int | None = None) -> tuple[nn.Module, CheckpointConfig]:
    """A network with its weights, in eval mode, and what its checkpoint says about it.

    Args:
        path_or_name: a bundled name ("Diffit-Fashion"), "Diffit" or "nvidia/DiffiT" for the released weights, a
            .safetensors file that says what it holds, or a Hub file "owner/repository/file.safetensors".
        image_size: 256 (default) or 512, for the released weights.

    Raises:
        ValueError: in one sentence, if it cannot be found, is damaged or does not fit.
    """
    source, config = find_named(path_or_name, image_size)
    return load_weights(source.fetch(), config), config


def save_checkpoint(path: Path, state: dict[str, Tensor], config: CheckpointConfig) -> None:
    """Write weights and config as one safetensors file, under a temporary name first.

    Raises:
        OSError: if the file cannot be written; an older one of that name is then intact.
    """
    # A single key: safetensors writes several in random order, and equal checkpoints should be equal files.
    content = save({k: v.contiguous() for k, v in state.items()}, {METADATA_KEY: config.to_json()})
    write_atomically(path, content)
