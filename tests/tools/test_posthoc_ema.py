"""EMAs made of a run's snapshots are checkpoints that sample, and a user reads one sentence where there can be none."""

import numpy as np
import pytest
import torch

from diffit import ImageSampler
from tests.training.runs import run, tiny_flags


def test_a_run_then_its_emas_then_samples(tmp_path, capsys):
    import posthoc_ema

    run(tiny_flags(tmp_path), tmp_path / "run", "--ema_power", "0.05", "0.1")
    arguments = [str(tmp_path / "run"), "--sigma_rel", "0.05"]
    with pytest.raises(SystemExit, match="2"):
        posthoc_ema.main([*arguments, "0.3"])
    assert "error: --sigma_rel must be above 0 and at most 0.28, not 0.3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        posthoc_ema.main([*arguments, "0.2"])
    assert "--sigma_rel 0.2 cannot be made of the 12 snapshots up to step 6" in capsys.readouterr().err
    assert not (tmp_path / "run" / "posthoc").exists()

    posthoc_ema.main([str(tmp_path / "run"), "--sigma_rel", "0.05", "0.1", "--step", "4"])
    paths = [line.partition("  (")[0] for line in capsys.readouterr().out.splitlines()]
    assert paths == [f"{tmp_path}/run/posthoc/00000004_{length}.safetensors" for length in (0.05, 0.1)]
    drawn = [ImageSampler.load(path, device="cpu").draw(range(2), torch.tensor([0, 1])) for path in paths]
    assert [images.shape for images in drawn] == 2 * [(2, 32, 32, 1)]
    assert np.ptp(drawn[0].numpy()) > 0
