"""Shared fixtures: golden numbers of reference implementations, and small networks."""

from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test reads or writes the user's cache, nor do the commands that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden_latent() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "latent.npz"))


@pytest.fixture(scope="session")
def golden_diffusion() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "gaussian_diffusion.npz"))
