"""What one sees of a run: estimates, log, pictures, TensorBoard, --dry_run."""

import os
import subprocess

import numpy as np
import pytest
import torch
import yaml

from diffit.cli.train import parse_train
from diffit.models.config import DiffiTConfig, build_model
from diffit.training.estimate import estimate, report
from diffit.training.tracker import read_picture
from tests.conftest import ROOT
from tests.training.runs import TIMING, TRAIN, log_of, run


def test_operations_are_those_of_the_formula():
    """Counted by hand: two per weight and token in every linear map, and the two products of attention."""
    N, C, depth, classes = 16, 32, 3, 10
    network = DiffiTConfig(input_size=8, hidden_size=C, depth=depth, num_heads=4, num_classes=classes)
    block = N * (3 * C * C + C * C + 8 * C * C) + 3 * C * C + 2 * N * N * C
    ends = N * (16 * C + C * 32) + 256 * C + C * C
    found = estimate(network)
    assert found.flops == 3 * 2 * (depth * block + ends)
    assert found.parameters == sum(p.numel() for p in build_model(network).parameters())
    assert found.activations > depth * N * (12 * C) * 4


def test_the_published_model_costs_what_was_published():
    found = estimate(DiffiTConfig())
    assert found.parameters == 561_330_144
    assert found.flops / 6e9 == pytest.approx(
        114, rel=0.05
    )  # "GFLOPs" of a forward pass are products and additions as one


def test_dry_run_tells_the_config_and_the_cost():
    command = [*TRAIN, "--config", "configs/debug.yaml", "--dry_run", "true"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert yaml.safe_load(result.stdout)["steps"] == 60
    assert "# parameters: " in result.stdout
    assert "# steps: 60 of 16 images (960 images), on 1 rank with 16 images at once" in result.stdout
    assert "# memory per rank, estimated: " in result.stdout


def test_a_misspelt_key_is_one_clear_error(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: Diffit-S\noptimizer:\n  learning_rate: 1.0e-4\n")
    result = subprocess.run([*TRAIN, "--config", str(recipe)], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "learning_rate" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def shown(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    run(flags, folder / "with", "--preview_every", "3")
    run(flags, folder / "without")
    return folder


def test_pictures_disturb_nothing_and_show_16_images(shown):
    assert log_of(shown / "with") == log_of(shown / "without")
    pictures = sorted((shown / "with" / "previews").glob("0*.png"))
    assert [path.name for path in pictures] == ["00000003.png", "00000006.png"]
    first, second = map(read_picture, pictures)
    assert first.shape == (4 * 156 + 8, 4 * 136 + 8, 3)
    assert not np.array_equal(first, second)


def test_the_log_holds_speed_memory_and_decay(shown):
    lines = log_of(shown / "with")
    assert [line["ema_decay"] for line in lines] == [pytest.approx((1 + s) / (10 + s)) for s in range(1, 7)]
    full = (shown / "with" / "log.jsonl").read_text()
    for key in (*TIMING, "grad_norm", "mse", "vb", "skipped"):
        assert f'"{key}"' in full
    assert '"mfu": null' in full  # nobody has measured what this CPU could reach


def test_tensorboard_has_the_curve(shown):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(shown / "with" / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(line["step"], float(np.float32(line["loss"]))) for line in log_of(shown / "with")]
    assert losses == expected
    assert [event.step for event in events.Images("samples")] == [3, 6]


def test_an_estimate_computes_nothing():
    before = torch.get_rng_state()
    estimate(DiffiTConfig(depth=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_and_costed(recipe):
    config = parse_train(["--config", str(recipe)]).config
    assert config.run_dir == f"runs/{recipe.stem}"
    assert "parameters: " in report(config)
    assert f"configs/{recipe.name}" in recipe.read_text()


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.stem)
def test_slurm_scripts_set_what_they_use(script):
    """Run by bash itself, strict about unset variables, with Slurm's programs replaced by ones that only tell."""
    tell = 'srun() { echo "$@"; return 75; }; scontrol() { echo "scontrol $@"; }; '
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    environment = slurm | {"PATH": os.environ["PATH"]}
    result = subprocess.run(
        ["bash", "-c", tell + script.read_text()], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 75, result.stderr
    assert f"train.py --config configs/{script.stem}.yaml --data.path {ROOT}/imagenet/train" in result.stdout
    assert "scontrol requeue 7" in result.stdout
