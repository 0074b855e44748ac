"""Training on small real files: resume, processes, averages and what the run leaves behind."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffit import load_model
from diffit.cli.train import parse_train
from diffit.data.sampler import image_order
from diffit.training.config import OptimizerConfig
from diffit.training.ema import EMA, ramped_decay
from diffit.training.loop import train
from diffit.training.step import learning_rate
from tests.conftest import ROOT
from tests.data.pictures import write_pictures
from tests.small_models import save_small_vae, write_fashion_files

NETWORK = "{input_size: 16, hidden_size: 16, depth: 1, num_heads: 2, num_classes: 10}"
SMALL = [
    *("--model", "Diffit-S", "--network", NETWORK, "--codec.factor", "2", "--batch_size", "8", "--ema_decay", "0.9"),
    *("--steps", "6", "--save_every", "2", "--log_every", "1", "--precision", "fp32", "--device", "cpu"),
    *("--data.workers", "0", "--optimizer.lr", "1e-2", "--optimizer.schedule", "cosine", "--optimizer.grad_clip", "1"),
]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data = ["--data.name", "fashion_mnist", "--data.path", str(write_fashion_files(folder / "fashion"))]
    return [*SMALL, *data, "--codec.vae", save_small_vae(folder / "vae", channels=1)]


def run(flags, run_dir, *more):
    return train(parse_train([*flags, "--run_dir", str(run_dir), *more]))


def log_of(run_dir, *keys):
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in lines]


def test_a_run_resumes_bit_for_bit(flags, tmp_path):
    whole = run(flags, tmp_path / "whole")
    # As if killed while writing its last checkpoint: what it logged after step 4 is forgotten and written anew.
    again = tmp_path / "again"
    run(flags, again)
    shutil.rmtree(again / "checkpoints" / "00000006")
    resumed = run(flags, again)
    assert resumed.read_bytes() == whole.read_bytes()
    keys = ("step", "images", "lr", "loss", "mse", "vb", "grad_norm")
    assert log_of(again, *keys) == log_of(tmp_path / "whole", *keys)
    assert [step for (step,) in log_of(again, "step")] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (again / "checkpoints").iterdir()) == ["00000004", "00000006"]


def test_two_processes_learn_what_one_does(flags, tmp_path):
    run(flags, tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "train.py"), *flags, "--run_dir", str(tmp_path / "two")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[-1].startswith(str(tmp_path / "two" / "checkpoints" / "00000006" / "ema.safetensors"))
    assert said.count("ema.safetensors  (python sample.py") == 1  # one rank says where the weights are
    one, two = (np.array(log_of(tmp_path / name, "loss", "grad_norm")) for name in ("one", "two"))
    np.testing.assert_allclose(two[:, 0], one[:, 0], rtol=1e-5)
    np.testing.assert_allclose(two[:, 1], one[:, 1], rtol=1e-3)


def test_a_checkpoint_says_what_it_is_and_samples(flags, tmp_path):
    path = run(flags, tmp_path / "run", "--guidance.scale", "1.7", "--sampling.num_sampling_steps", "2")
    _, config = load_model(path)
    assert (config.guidance.scale, config.class_names[0]) == (1.7, "T-shirt/top")
    assert config.made_by == "command line, 6 steps of 8 images"
    command = [sys.executable, str(ROOT / "sample.py"), "--model_path", str(path), "--log_dir", str(tmp_path / "out")]
    subprocess.run([*command, "--num_samples", "2"], check=True, capture_output=True)
    with np.load(tmp_path / "out" / "samples_2x32x32x1.npz") as samples:
        assert samples["arr_0"].shape == (2, 32, 32, 1)


def test_another_network_in_the_same_folder_is_refused(flags, tmp_path):
    run(flags, tmp_path / "run", "--steps", "2")
    with pytest.raises(ValueError, match="another network"):
        run(flags, tmp_path / "run", "--network", NETWORK.replace("size: 16, d", "size: 32, d"))


def test_a_new_run_starts_from_another(flags, tmp_path):
    first = run(flags, tmp_path / "first")
    run(
        flags, tmp_path / "second", "--init_from", str(first), "--steps", "1", "--optimizer.lr", "0", "--ema_decay", "0"
    )
    second, config = load_model(tmp_path / "second" / "checkpoints" / "00000001" / "ema.safetensors")
    assert config.made_by == "command line, 1 steps of 8 images, after command line, 6 steps of 8 images"
    for name, value in load_model(first)[0].state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


def test_a_new_run_starts_from_a_bundled_name(tmp_path, capsys):
    """With other classes, those of the pictures; all other weights are Diffit-Fashion's."""
    pictures = write_pictures(tmp_path / "images", {"cat": 2, "dog": 2})
    settings = ["--init_from", "Diffit-Fashion", "--data.path", str(pictures), "--data.workers", "0"]
    settings += ["--device", "cpu", "--run_dir", str(tmp_path / "run")]
    still = [
        "--batch_size",
        "4",
        "--steps",
        "1",
        "--optimizer.lr",
        "0",
        "--ema_decay",
        "0",
        "--compile",
        "false",
        "--precision",
        "fp32",
    ]
    model, config = load_model(train(parse_train([*settings, *still])))
    assert config.class_names == ("cat", "dog")
    bundled, its_config = load_model("Diffit-Fashion")
    assert config.made_by.endswith(f"after {its_config.made_by}")
    assert "made anew for 2 classes instead of 10; its null class is kept" in capsys.readouterr().out
    for name in ("codec", "process", "diffusion", "sampling", "guidance"):
        assert getattr(config, name) == getattr(its_config, name)
    for name, value in bundled.state_dict().items():
        if name != "y_embedder.embedding_table.weight":
            assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--codec.factor 8", "set --codec.factor 4 and --network.in_channels 4"),
        ("--network.input_size 0", "--network.input_size must be between"),
        ("--network.in_channels 3", "of in_channels 4 instead of 3"),
    ],
)
def test_a_start_that_cannot_fit_is_refused_before_anything_is_encoded(tmp_path, capsys, flags, words):
    pictures = write_pictures(tmp_path / "images", {"cat": 2, "dog": 2})
    settings = ["--init_from", "Diffit-Fashion", "--data.path", str(pictures), "--run_dir", str(tmp_path / "run")]
    with pytest.raises((ValueError, SystemExit)) as raised:
        train(parse_train([*settings, *flags.split(), "--device", "cpu"]))
    assert words in str(raised.value) + capsys.readouterr().err
    assert not (tmp_path / "run" / "cache").exists()


def test_order_is_a_permutation_per_epoch_and_knows_no_batches():
    order = image_order(seed=3, first=0, count=35, num_images=10)
    for epoch in range(3):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    for first in range(0, 30, 7):
        assert image_order(3, first, 5, 10).tolist() == order[first : first + 5].tolist()


def test_ema_is_its_recursion():
    model = torch.nn.Linear(2, 1)
    ema = EMA(model)
    expected = model.weight.detach().clone()
    for step in range(1, 20):
        torch.nn.init.normal_(model.weight)
        decay = ramped_decay(0.7, step)
        ema.update(model, decay)
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.model.weight, expected)
    assert ramped_decay(0.7, 1) == 2 / 11
    assert ramped_decay(0.7, 100) == 0.7


def test_learning_rate():
    config = OptimizerConfig(lr=2.0, warmup=4, schedule="cosine")
    assert learning_rate(config, 0, 100) == pytest.approx(0.5)
    assert learning_rate(config, 50, 100) == pytest.approx(1.0)
    assert learning_rate(config, 100, 100) == pytest.approx(0.0)
    assert learning_rate(OptimizerConfig(lr=2.0), 77, 100) == 2.0


def test_an_unshareable_batch_is_refused(flags, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "train.py"), *flags, "--run_dir", str(tmp_path / "run"), "--batch_size", "7"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "error: --batch_size 7 cannot be shared by 2 ranks" in result.stderr
