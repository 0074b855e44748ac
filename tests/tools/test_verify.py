"""The command that checks released weights, with a Hub on this machine, small weights and a random Inception."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.evaluation.random_graph import RandomInception
from tests.local_hub import local_hub
from tests.small_models import save_small_image_checkpoint

NAME = "someone/small/small.safetensors"


@pytest.mark.slow
def test_from_the_hub_to_the_table(tmp_path):
    pytest.importorskip("torch_fidelity")
    weights = save_small_image_checkpoint(tmp_path, num_classes=3).read_bytes()
    RandomInception().write(tmp_path / "classify_image_graph_def.pb")
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    command = [sys.executable, str(ROOT / "tools" / "verify.py"), "--model_path", NAME, "--reference", "reference.npz"]
    command += ["--num_samples", "6", "--num_sampling_steps", "2", "--seed", "3"]

    with local_hub() as (address, files):
        files["small.safetensors"] = weights
        folders = {"HF_HOME": str(tmp_path / "hub"), "DIFFIT_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
        environment = os.environ | folders | {"HF_ENDPOINT": address}

        def verify() -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

        done = verify()
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "logs" / "verify_32_6"
        report = (folder / "report.md").read_text()
        assert report in done.stdout
        scores = json.loads((folder / "scores.json").read_text())
        assert f"| FID | - | {scores['fid']:.4f} |" in report
        digest = json.loads((folder / "manifest.json").read_text())["settings"]["weights_sha256"]
        assert f"{digest} (as the Hub has it)" in report
        assert re.search(r'"num_sampling_steps": "?2"?.*"seed": 3', report)

        # A file of the cache whose last weight was altered still loads; nothing is sampled with it.
        (blob,) = (path for path in (tmp_path / "hub").rglob("blobs/*"))
        blob.write_bytes(weights[:-4] + bytes(4))
        (folder / "report.md").unlink()
        refused = verify()
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: ")
    assert f"the Hub's file {digest}" in refused.stderr
    assert "$ " not in refused.stdout
