"""What turns images into features: Inception in PyTorch or TensorFlow, or any classifier of your own.

A classifier joins in by a Python module with one function, as `inception.py` has it:

    load_features(path: Path | None, device: torch.device)
        -> callable (images: uint8 tensor [B, H, W, C] on that device) -> (features [B, D], probabilities [B, K])

It is named `--features module:path`: an importable module or a .py file, and the checkpoint to hand to it, which may be
left out. Without probabilities, (features,), there is no Inception Score. Those in `NAMED` have a short name.
Letters: B images of a batch, D features, K classes, S spatial features.
"""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffit.evaluation import inception, inception_tensorflow
from diffit.evaluation.downloads import INCEPTION_GRAPH, INCEPTION_STATE, cached, verify
from diffit.evaluation.reader import Images
from diffit.system.files import cache_folder, first_line, sha256

INCEPTION = "inception-2015"
CLASSIFIER = Path(__file__).parents[1] / "bundled/fashion_classifier.safetensors"
NAMED = {"dinov2": "diffit.evaluation.dinov2", "fashion": f"diffit.evaluation.fashion:{CLASSIFIER}"}
Extract = Callable[[Tensor], Sequence[Any]]
_INCEPTION: dict[str, Callable[[Path, torch.device], Extract]] = {
    "torch": inception.load_features,
    "tensorflow": inception_tensorflow.load_features,
}


class Features(NamedTuple):
    """What a backend says about a batch, float32."""

    pool: NDArray[np.float32]  # [B, D]
    probabilities: NDArray[np.float32] | None = None  # [B, K]
    spatial: NDArray[np.float32] | None = None  # [B, S], where sFID is defined


@dataclass(frozen=True)
class Backend:
    """Images [B, H, W, C] uint8 -> features. Backends of one name give the same features, so they share references."""

    name: str
    device: torch.device  # where images are handed over, and distances computed later
    extract: Extract  # what `load_features` returned; may give spatial features [B, S] as a third

    @torch.no_grad()
    def __call__(self, images: Images) -> Features:
        found = self.extract(torch.from_numpy(images.copy()).to(self.device))
        return Features(*(torch.as_tensor(part).float().cpu().numpy() for part in found))


def create_backend(
    kind: str = "torch",
    weights: str | Path | None = None,
    features: str | None = None,
    device: str | torch.device = "cpu",
) -> Backend:
    """The backend that these choices name.

    kind: 'torch' or 'tensorflow', both with the Inception weights of 2015; weights: their file, else it is looked for
    in the cache and fetched; features: 'module', 'module:path' or a short name, of features that are used instead.

    Raises:
        ValueError: if a choice is unknown, a file is damaged, or a package is missing.
        FileNotFoundError: if the weights are not there and cannot be fetched.
    """
    device = torch.device(device)
    if features is not None:
        return _classifier(features, device)
    if kind not in _INCEPTION:
        raise ValueError(f"unknown backend '{kind}': choose {' or '.join(_INCEPTION)}")
    folders = [cache_folder(), Path(torch.hub.get_dir()) / "checkpoints"]  # the second one is torch-fidelity's
    converted = [folder / INCEPTION_STATE for folder in folders if (folder / INCEPTION_STATE).is_file()]
    if weights is None and (kind == "tensorflow" or (cache_folder() / INCEPTION_GRAPH).is_file() or not converted):
        try:
            path = cached(INCEPTION_GRAPH)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; or do without Inception: --features fashion (bundled, for 32x32 images), --features "
                "dinov2:FILE (a copy of its weights) or --features MODULE[:FILE] (a network of your own)"
            ) from error
    else:
        path = Path(weights or converted[0])
        if not path.is_file():
            raise FileNotFoundError(f"the Inception weights {path} do not exist: name a {INCEPTION_GRAPH}")
        if kind == "tensorflow" and path.suffix != ".pb":
            raise ValueError(f"the tensorflow backend reads a frozen graph (.pb), not {path.name}: use --backend torch")
        verify(path)
    try:
        extract = _INCEPTION[kind](path, device)
    except ModuleNotFoundError as error:
        extra = "tensorflow" if kind == "tensorflow" else "eval"
        raise ValueError(f"--backend {kind} needs the package {error.name}: pip install 'diffit[{extra}]'") from error
    return Backend(INCEPTION, device, lambda images: extract(to_rgb(images)))


def to_rgb(images: Tensor) -> Tensor:
    """Grey images [B, H, W, 1] with their channel three times; colour images as they are."""
    return images.expand(-1, -1, -1, 3).contiguous()


def _classifier(spec: str, device: torch.device) -> Backend:
    """The backend of 'module' or 'module:path' (see above)."""
    module, _, path = spec.partition(":")
    module, _, usual = NAMED.get(module, module).partition(":")
    path = path or usual
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"--features {spec}: the checkpoint {path} does not exist")
    try:
        if not module.endswith(".py"):
            members = vars(importlib.import_module(module))
        elif Path(module).is_file():
            members = runpy.run_path(module)
        else:
            raise ModuleNotFoundError("there is no such file")
    except (ModuleNotFoundError, ValueError) as error:
        raise ValueError(
            f"--features {spec}: {module or 'a module'} cannot be imported ({first_line(error)}): write "
            f"MODULE:CHECKPOINT, as in my_classifier.py:weights.safetensors, MODULE alone, or {' or '.join(NAMED)}"
        ) from error
    if "load_features" not in members:
        raise ValueError(f"--features {spec}: {module} has no function load_features(path, device)")
    name = re.split(r"[./\\]", module.removesuffix(".py"))[-1] + (f"-{sha256(Path(path))[:12]}" if path else "")
    return Backend(name, device, members["load_features"](Path(path) if path else None, device))
