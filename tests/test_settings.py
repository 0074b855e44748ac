"""Ranges and meanings for a resume: every field of every dataclass of settings has them, at every door."""

import dataclasses
import json
import math
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
import yaml

from diffit import load_model, sample_images
from diffit.checkpoint.config import CheckpointConfig, default_config
from diffit.cli.encode import parse_encode
from diffit.cli.parser import build
from diffit.cli.sample import parse_sample
from diffit.cli.settings import settings_of
from diffit.cli.train import parse_train
from diffit.data.config import EncodeConfig
from diffit.models.config import DiffiTConfig, ImageDiffiTConfig, model_config
from diffit.sampling.config import AppConfig, SampleConfig
from diffit.settings import FREE, SAME, Resume, alternatives, check_setting, check_settings, settings_that
from diffit.training.config import TrainConfig

ROOTS = [SampleConfig, AppConfig, TrainConfig, EncodeConfig, DiffiTConfig, ImageDiffiTConfig]
NUMBERS = [math.nan, math.inf, -math.inf, -1, -1.0, 0, 0.0, 1, 0.5, 2, 1e300, 2**64, 10**400]


def numbers_in(hint: Any) -> list[type]:
    """The kinds of number that a value of this type holds."""
    found = []
    for choice in alternatives(hint):
        found += [choice] if choice in (int, float) else numbers_in(choice.__args__[0]) if fits_many(choice) else []
    return found


def fits_many(choice: Any) -> bool:
    return getattr(choice, "__origin__", None) in (tuple, list)


NUMERIC = [
    pytest.param(root, setting, id=f"{root.__name__}-{setting.key}")
    for root in ROOTS
    for setting in settings_of(root)
    if numbers_in(setting.hint)
]


def several(setting: Any, number: float) -> Any:
    """A value of the setting's type that holds the number."""
    for choice in alternatives(setting.hint):
        if choice in (int, float):
            return number
        if fits_many(choice):
            return [number] * (len(choice.__args__) if choice.__args__[-1] is not Ellipsis else 1)
    raise AssertionError


@pytest.mark.parametrize(("root", "setting"), NUMERIC)
def test_a_number_is_accepted_exactly_if_it_is_in_its_range(root, setting):
    """Stated beside the field; what is not of the field's type is never in it, nor is what is not finite."""
    assert setting.range is not None, f"{setting.key} states no range"
    bounds = [bound for bound in dataclasses.astuple(setting.range) if bound is not None]
    assert bounds
    ends = setting.range.at_most, setting.range.below
    assert float not in numbers_in(setting.hint) or ends != (None, None), f"{setting.key} ends nowhere"
    for number in NUMBERS + bounds:
        whole = isinstance(number, int)
        typed = abs(number) < 2**64 if whole else float in numbers_in(setting.hint)
        expected = typed and number in setting.range
        assert not expected or math.isfinite(number)
        values = {setting.key: several(setting, number)}
        if expected:
            check_settings(build(root, values))
        else:
            with pytest.raises(ValueError, match=f"^--{setting.key} must be "):
                build(root, values)


def resumable(root: type) -> list[tuple[str, dataclasses.Field]]:
    """The fields that must take a side: those of a command that resumes, down to where a node takes one for all."""
    found = []
    for each in fields(root):
        found += resumable(type(each.default)) if is_dataclass(each.default) and not side(each) else [(each.name, each)]
    return found


def side(each: dataclasses.Field) -> Resume | None:
    return each.metadata.get("resume")


@pytest.mark.parametrize("root", [SampleConfig, TrainConfig, DiffiTConfig, ImageDiffiTConfig])
def test_every_setting_takes_a_side(root):
    assert [name for name, each in resumable(root) if not isinstance(side(each), Resume)] == []


def test_what_a_resume_may_change():
    """As it was when the names stood in lists of their own; the weights' hash says which ones --model_path names."""
    assert settings_that(SAME, TrainConfig) == {"process", "diffusion", "edm", "flow"}
    assert settings_that(FREE, SampleConfig) == {
        *("log_dir", "batch_size", "save_png", "overwrite", "dry_run", "model_path"),
    }
    differ = {each.name for kind in (DiffiTConfig, ImageDiffiTConfig) for each in fields(kind)}
    differ -= settings_that(SAME, DiffiTConfig) | settings_that(SAME, ImageDiffiTConfig)
    assert differ == {"input_size", "window_size", "num_classes", "dropout", "class_dropout_prob"}


WRONG = [
    ("optimizer.grad_clip", math.nan),
    ("ema_half_life", math.nan),
    ("optimizer.grad_clip", -1),
    ("optimizer.warmup", -5),
    ("network.class_dropout_prob", 2),
    ("sampling.s_churn", math.nan),
    ("edm.sigma_max", 0),
    ("seed", 2**64),
    ("guidance.scale", 1e30),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_the_doors_of_a_command(key, value, tmp_path, capsys):
    """By a flag and in a file, in one sentence that names the flag."""
    written = {math.nan: ".nan"}.get(value, repr(value)) if value == value else ".nan"
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    for arguments in ([f"--{key}={written}"], ["--config", str(recipe)]):
        with pytest.raises(SystemExit, match="2"):
            parse_train(["--model", "ImageDiffit-Tiny", *arguments])
        error = capsys.readouterr().err
        assert error.startswith(f"error: --{key} must be ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "settings",
    [{"cfg_scale": 1e30}, {"cfg_scale": math.nan}, {"num_sampling_steps": 0}, {"seed": 2**64}, {"batch_size": -1}],
)
def test_the_door_of_python(settings):
    with pytest.raises(ValueError, match="must be"):
        sample_images(*load_model("Diffit-Fashion"), 1, **settings)


NODES = ["network", "codec", "diffusion", "edm", "flow", "sampling", "guidance"]


@pytest.mark.parametrize("node", NODES)
def test_the_door_of_a_checkpoint(node):
    """Metadata are refused for a number out of its range, and for a value of another type."""
    config = default_config("Diffit-Fashion")
    assert CheckpointConfig.from_json(config.to_json()) == config
    for each in fields(getattr(config, node)):
        for wrong in (math.nan, -math.inf, "ten", 1.5, [[]], {}):
            tree = json.loads(config.to_json())
            tree[node][each.name] = wrong
            setting = {setting.key: setting for setting in settings_of(type(getattr(config, node)))}[each.name]
            try:
                check_setting(each.name, setting.hint, setting.range, wrong)
            except ValueError:
                with pytest.raises(ValueError, match=f"{each.name} must be "):
                    CheckpointConfig.from_json(json.dumps(tree))


def test_more_names_than_classes():
    config = replace(default_config("Diffit-Fashion"), class_names=("a",) * 11)
    with pytest.raises(ValueError, match="11 class_names for a network of 10 classes"):
        CheckpointConfig.from_json(config.to_json())


def test_levels_and_betas_that_do_not_fit_one_another(capsys):
    for line, words in (
        ("--model ImageDiffit-Tiny --edm.sigma_min 81", "--edm.sigma_min must be below --edm.sigma_max 80.0, not 81"),
        ("--diffusion.diffusion_steps 20", "must be above 20 with the linear schedule, not 20"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parse_train(line.split())
        assert words in capsys.readouterr().err
    assert parse_train(["--diffusion.diffusion_steps", "21"]).config.diffusion.diffusion_steps == 21


@pytest.mark.parametrize("scale", [-1e6, -1.0, 0.0, 1e6])
def test_a_guidance_scale_at_its_edges_makes_pictures(scale):
    """Odd ones, but of finite numbers: x is looked at, as black images would hide NaN."""
    seen = []
    model, config = load_model("Diffit-Fashion")
    config = replace(config, guidance=replace(config.guidance, channels="all"))
    sample_images(model, config, 2, cfg_scale=scale, num_sampling_steps=3, callback=lambda i, n, x: seen.append(x))
    assert len(seen) == 3
    assert all(bool(x.isfinite().all()) for x in seen)


def test_numbers_of_numpy_are_numbers():
    model, config = load_model("Diffit-Fashion")
    one, _ = sample_images(model, config, 1, cfg_scale=np.float32(2), num_sampling_steps=np.int64(2))
    two, _ = sample_images(model, config, 1, cfg_scale=2.0, num_sampling_steps=2)
    np.testing.assert_array_equal(one, two)


def test_sizes_of_networks_are_checked_where_they_are_named():
    for overrides, words in (
        ({"depth": 0}, "--network.depth must be between 1 and 1000, not 0"),
        ({"depth": 12.0}, "--network.depth must be a whole number, not 12.0"),
        ({"num_classes": "ten"}, "--network.num_classes must be a whole number, not ten"),
    ):
        with pytest.raises(ValueError, match=words):
            model_config("Diffit", **overrides)


def test_a_command_runs_at_the_edges(tmp_path):
    """Of what excludes what cannot work: these can."""
    assert parse_sample(["--guidance.scale", "0", "--seed", "18446744073709551615"]).config.seed == 2**64 - 1
    config = parse_train(["--optimizer.lr", "0", "--optimizer.betas", "0", "0", "--ema_decay", "0"]).config
    assert (config.optimizer.lr, config.optimizer.betas, config.ema_rates) == (0, (0, 0), [0])
    assert parse_encode(["--out", str(tmp_path), "--image_size", "1"]).image_size == 1
