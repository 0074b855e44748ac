"""Two processes over gloo: they learn what one does, FSDP2 what DDP does, and they agree on everything that matters."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from diffit import load_model
from diffit.cli.train import parse_train
from diffit.sampling.images import ImageSampler
from diffit.system.ranks import World
from diffit.training.snapshots import find_snapshots
from diffit.training.validation import create_validation
from tests.conftest import ROOT
from tests.training.runs import TWO, log_of, run


@pytest.fixture(scope="module")
def folder(flags, tmp_path_factory) -> Path:
    """What two processes left behind; see ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [*TWO, str(Path(__file__).parent / "ranks.py"), str(folder), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def curve(run_dir, key="loss"):
    return np.array([line[key] for line in log_of(run_dir) if key in line])


def weights(run_dir, file="ema.safetensors", step=6):
    return flat(run_dir / "checkpoints" / f"{step:08d}" / file)


def flat(path):
    model, _ = load_model(path)
    return np.concatenate([value.numpy().ravel() for value in model.state_dict().values()])


def test_two_learn_what_one_does_for_50_steps(folder, flags, tmp_path):
    run(flags, tmp_path, "--steps", "50", "--save_every", "50")
    one, two = curve(tmp_path), curve(folder / "long")
    assert len(one) == 50
    assert len(set(one)) == 50
    np.testing.assert_allclose(two, one, rtol=1e-5)


def test_fsdp_learns_what_ddp_does(folder):
    np.testing.assert_allclose(curve(folder / "fsdp"), curve(folder / "ddp"), rtol=1e-5)
    np.testing.assert_allclose(curve(folder / "fsdp", "grad_norm"), curve(folder / "ddp", "grad_norm"), rtol=1e-4)


def test_fsdp_resumes_bit_for_bit(folder):
    np.testing.assert_array_equal(curve(folder / "fsdp_half"), curve(folder / "fsdp"))
    for file in ("ema.safetensors", "ema_0.2.safetensors", "ema_power_0.1.safetensors"):
        np.testing.assert_array_equal(weights(folder / "fsdp_half", file), weights(folder / "fsdp", file))
    assert np.ptp(weights(folder / "fsdp") - weights(folder / "fsdp", "ema_0.2.safetensors")) > 0
    assert (folder / "fsdp_half" / "previews" / "00000006.png").exists()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_take_the_snapshots_that_one_takes(folder, flags, tmp_path, kind):
    run(flags, tmp_path, "--ema_power", "0.1")
    one, two = find_snapshots(tmp_path), find_snapshots(folder / kind)
    assert [snapshot[:3] for snapshot in two] == [snapshot[:3] for snapshot in one]
    assert len(two) == 6
    for ours, theirs in zip(two, one, strict=True):
        np.testing.assert_allclose(flat(ours.path), flat(theirs.path), rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(
        weights(folder / kind, "ema_power_0.1.safetensors").astype(np.float16), flat(two[-1].path)
    )


def test_ddp_resumes_bit_for_bit(folder):
    np.testing.assert_array_equal(curve(folder / "ddp_half"), curve(folder / "ddp"))
    for file in ("ema.safetensors", "state"):
        np.testing.assert_array_equal(weights(folder / "ddp_half", file), weights(folder / "ddp", file))


def test_one_rank_reads_or_each_its_part(seen):
    """Of whole copies rank 0 reads EMA and shards for all; of sharded ones each rank its part, and 0 what both hold."""
    assert [rank["ddp_read"] for rank in seen] == [["ema", "shard", "shard"], []]
    assert [rank["fsdp_read"] for rank in seen] == [["ema", "ema", "ema", "shard", "shard"], ["shard"]]


@pytest.fixture
def one_thread():
    """As torchrun's ranks have it: more threads add up in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_ranks_share_the_held_out_images(folder, flags):
    """Of the same weights, three parts of 70 images give two ranks the very loss that one rank computes."""
    config = parse_train([*flags, "--validation.every", "3"]).config
    for kind in ("ddp", "fsdp"):
        pictures = ImageSampler.create(*load_model(folder / kind), torch.device("cpu"))
        one = create_validation(pictures, config, World())()
        two = log_of(folder / kind)[-1]
        assert two["step"] == 6
        assert two.items() >= one.items()
        assert len(one) == 9


def test_shards_are_read_without_the_ranks_that_wrote_them(folder):
    """The weights without EMA, after the same training."""
    sharded, config = load_model(folder / "fsdp" / "checkpoints" / "00000006" / "state")
    whole, _ = load_model(folder / "ddp" / "checkpoints" / "00000006" / "state")
    for (name, ours), theirs in zip(sharded.state_dict().items(), whole.state_dict().values(), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-3, atol=1e-5, err_msg=name)
    averaged, same_config = load_model(folder / "fsdp")
    assert same_config == config
    assert any(not torch.equal(averaged.state_dict()[name], value) for name, value in sharded.state_dict().items())
    np.testing.assert_array_equal(
        np.concatenate([v.numpy().ravel() for v in averaged.state_dict().values()]), weights(folder / "fsdp")
    )


def test_shards_that_are_missing_are_named(folder, tmp_path):
    checkpoint = shutil.copytree(folder / "fsdp" / "checkpoints" / "00000006", tmp_path / "00000006")
    next((checkpoint / "state").glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match=r"the shards in .*state are damaged or incomplete"):
        load_model(checkpoint / "state")


def test_what_fails_on_one_rank_fails_on_all_and_ends_no_training(seen):
    for number, rank in enumerate(seen):
        assert (rank["own"], rank["odd"]) == (number, True)


def test_all_ranks_share_what_rank_0_entered(seen):
    for rank in seen:
        assert (rank["entered"], rank["refused"]) == (1, "in use")  # rank 0's, everywhere


@pytest.mark.parametrize("kind", ["to_fsdp", "to_ddp"])
def test_a_run_changes_its_kind_of_parallelism(folder, kind):
    np.testing.assert_allclose(curve(folder / kind), curve(folder / "ddp"), rtol=1e-5)
    np.testing.assert_allclose(weights(folder / kind), weights(folder / "ddp"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(folder, seen, kind):
    assert [rank[f"skipped_{kind}"] for rank in seen] == [1, 1]
    everything = ["ema.safetensors", "exp_avg", "exp_avg_sq", "step", "weights"]
    assert [rank[f"changed_{kind}"] for rank in seen] == 2 * [[[], everything]]
    lines = log_of(folder / f"poisoned_{kind}")
    assert [line["loss"] is None for line in lines] == [False, False, False, True, False, False]
    assert [line["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1]


def test_one_changed_bit_in_one_process_is_found(folder, seen):
    for rank in seen:
        assert "different values of head.weight at step 0" in rank["apart"]
    assert not list((folder / "apart" / "checkpoints").glob("*"))


def test_a_rank_that_hangs_is_not_waited_for_days(flags, tmp_path):
    command = [*TWO, str(Path(__file__).parent / "hang.py"), str(tmp_path), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as runs:
        said = next(line for line in runs.stdout if "another rank" in line)
        runs.terminate()
    assert "did not come to the same step in time" in said
    assert "--rank_timeout" in said


def test_a_signal_to_one_process_stops_all_at_the_same_step(folder, seen):
    assert seen[0]["stopped"] == seen[1]["stopped"]
    kind, step = seen[0]["stopped"]
    assert kind == "Stopped"
    assert [path.name for path in (folder / "stopped" / "checkpoints").iterdir()] == [f"{step:08d}"]
