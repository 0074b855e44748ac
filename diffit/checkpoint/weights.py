"""Weights from and to files: safetensors whose metadata hold the config of the model and how to sample it."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffit.checkpoint.config import METADATA_KEY, CheckpointConfig
from diffit.checkpoint.resolve import STATE_FOLDER, damaged, find_checkpoint, is_safetensors
from diffit.models.config import DiffiTConfig, build_model
from diffit.nn.attention import relative_position_index
from diffit.system.files import first_line, open_atomically

# Where training scripts put the weights, and averaged ones before others.
_NESTED = ("ema", "model_ema", "model", "model_state_dict", "state_dict")
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # of safetensors


def load_model(
    path_or_name: str | Path, image_size: int | None = None, model: str | None = None
) -> tuple[nn.Module, CheckpointConfig]:
    """A network with its weights, in eval mode, and its checkpoint's config.

    Args:
        path_or_name: a bundled name ("Diffit-Fashion"), "Diffit" or "nvidia/DiffiT" for the released weights; a
            .safetensors or .pt file; a run's folder, whose newest whole checkpoint is taken; a checkpoint's folder; a
            saved pipeline; or, on the Hub, "owner/repository" of a pipeline or "owner/repository/file.safetensors".
            It is looked for in this order.
        image_size: 256 (default) or 512, for the released weights.
        model: a name of the zoo, for a file that does not say which model it holds.

    Raises:
        ValueError: in one sentence, if it cannot be found, is damaged or does not fit.
    """
    source, config = find_checkpoint(model, path_or_name, image_size)
    return load_weights(source.fetch(), config), config


def load_weights(path: Path, config: CheckpointConfig) -> nn.Module:
    """The network of a config with the weights of a file or folder (see `Source.path`), float32, in eval mode.

    Raises:
        ValueError: in one sentence, if the file is damaged, or its tensors are not those of the network.
    """
    try:
        with torch.device("meta"):
            model = build_model(config.network)
    except ValueError as error:
        raise ValueError(f"{path} is of a network that cannot be ({error}): give another file") from error
    expected = model.state_dict()
    state = _without_prefix(_read_folder(path, expected) if path.is_dir() else _read_file(path), expected)
    index = {name: state.pop(name) for name in list(state) if name.endswith("relative_position_index")}
    _check_fit(path, state, expected, config)
    network = config.network
    window = network.input_size // network.patch_size if isinstance(network, DiffiTConfig) else network.window_size
    # The released files carry the Swin index in every block. It is derived data: it must agree, and is not kept.
    right = relative_position_index(window)
    for name, value in index.items():
        if not torch.equal(value, right):
            raise ValueError(f"{path} orders its relative positions differently ({name}): it is not a DiffiT file")
    for name, value in state.items():
        dense = value.layout == torch.strided and not value.is_meta
        usable = value.is_floating_point() and dense
        state[name] = value.detach().float() if usable else torch.tensor(torch.nan)
        if not state[name].isfinite().all():
            wrong = "not finite everywhere" if usable else "not dense" if not dense else "no floating point"
            raise ValueError(
                f"{path} holds numbers that no network can use ({name} is {value.dtype} and {wrong}): give another file"
            )
    model.load_state_dict(state, assign=True)
    return model.eval()


def _read_folder(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of a saved pipeline's transformer/, or of the shards that training wrote to state/."""
    if path.name != STATE_FOLDER:
        files = sorted(path.glob("*.safetensors"))
        files = [file for file in files if "." not in file.stem] or files  # a variant, as fp16, only where it is alone
        if not files:
            raise ValueError(f"{path} holds no .safetensors files: save the pipeline again, or download it again")
        return {name: value for file in files for name, value in _read_file(file).items()}
    import torch.distributed.checkpoint as dcp  # takes a second that others do not pay

    state = {name: torch.empty_like(value, device="cpu") for name, value in expected.items()}
    try:
        with plain_errors():
            dcp.load({"model": state}, checkpoint_id=path)  # in place
    except Exception as error:
        raise ValueError(f"the shards in {path} are damaged or incomplete ({first_line(error)})") from error
    return state


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Around dcp: the first error of a rank as itself, not in one that is no Exception; no warning of a single rank."""
    from torch.distributed.checkpoint import CheckpointException

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or of any other that torch.save wrote without code in it."""
    try:
        safe = is_safetensors(path)
        if not safe and zipfile.is_zipfile(path):  # whose checksums torch.load does not compare, and may not write
            with zipfile.ZipFile(path) as archive:
                if any(member.CRC for member in archive.infolist()) and archive.testzip():
                    raise zipfile.BadZipFile
        with open(path, "rb") as file:  # torch.load would go by the name of a path
            tree: Any = load_file(path) if safe else torch.load(file, "cpu", weights_only=True)
    except Exception as error:
        code = re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(error))
        if code is None or not isinstance(error, pickle.UnpicklingError):
            raise damaged(path) from error
        raise ValueError(
            f"{path} is not a plain file of weights (loading {code[1]} could run code, so it is refused): save its "
            "state dict with torch.save, or as safetensors"
        ) from error
    while not _is_state(tree):
        keys = list(tree) if isinstance(tree, Mapping) else [type(tree).__name__]
        nested = next((key for key in _NESTED if key in keys and isinstance(tree[key], Mapping)), None)
        if nested is None:
            raise ValueError(
                f"{path} holds no weights under {', '.join(_NESTED)}, but {', '.join(map(str, keys[:10])) or 'nothing'}"
                ": save the network's state_dict() there"
            )
        tree = tree.pop(nested)  # not [nested]: a tree that holds itself comes to an end
    return dict(tree)


def _is_state(tree: Any) -> bool:
    named = isinstance(tree, Mapping) and bool(tree)
    return named and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tree.items())


def _without_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them: module. of DDP, _orig_mod. of torch.compile, or any other."""
    shared = [cut for cut in range(len(min(state, key=len)) + 1) if len({name[:cut] for name in state}) == 1]
    cut = max(shared, key=lambda cut: sum(name[cut:] in expected for name in state))
    return {name[cut:]: value for name, value in state.items()}


def _check_fit(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: CheckpointConfig
) -> None:
    if isinstance(config.network, DiffiTConfig) and "pos_embed" in state:
        side = round(state["pos_embed"].shape[1] ** 0.5) * config.network.patch_size
        size = side * config.codec.factor
        if side != config.network.input_size:
            raise ValueError(
                f"{path} was trained for {size}x{size} images, not {config.image_size}x{config.image_size}: "
                f"add --image_size {size}, or give another file"
            )
    wrong = [f"{name} is missing" for name in expected if name not in state]
    wrong += [f"{name} is not part of it" for name in state if name not in expected]
    wrong += [
        f"{name} is {list(state[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{path} does not hold a {config.model}: {wrong[0]}{more}; check --model and --image_size")


def save_checkpoint(path: Path, state: Mapping[str, Tensor], config: CheckpointConfig) -> int:
    """Write weights and config as one safetensors file, under a temporary name first; returns its CRC-32.

    The library would copy all tensors first, and order several keys of metadata at random: equal checkpoints are equal
    files.

    Raises:
        OSError: if the file cannot be written; an older one of that name is then intact.
    """
    tensors = sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: config.to_json()}}
    end = 0
    for name, value in tensors:
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": [*value.shape], "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head, checksum = len(text).to_bytes(8, "little") + text, 0
    bodies: Iterator[Any] = (x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for _, x in tensors)
    with open_atomically(path) as file:
        for part in chain[Any]([head], bodies):
            file.write(part)
            checksum = zlib.crc32(part, checksum)
    return checksum
