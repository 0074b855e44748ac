"""The two small reference networks of golden/latent.npz."""

import numpy as np
import torch

from diffit import DiffiT

NAMES = ("tiny_a", "tiny_b")


def golden_network(golden: dict[str, np.ndarray], name: str) -> DiffiT:
    config = {key.split("/")[-1]: int(golden[key]) for key in golden if key.startswith(f"{name}/config/")}
    model = DiffiT(**config).eval()
    prefix = f"{name}/state_dict/"
    state = {key[len(prefix) :]: torch.from_numpy(golden[key]) for key in golden if key.startswith(prefix)}
    model.load_state_dict({key: value for key, value in state.items() if not key.endswith("relative_position_index")})
    return model


def golden_tensors(golden: dict[str, np.ndarray], name: str, *keys: str) -> list[torch.Tensor]:
    return [torch.from_numpy(golden[f"{name}/{key}"]) for key in keys]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out - reference).abs().max() / reference.abs().max())
