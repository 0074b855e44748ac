"""Decays of the EMAs in closed form, and EMAs of any length made of snapshots, beside the same computed directly."""

import itertools
import re

import numpy as np
import pytest
import torch

from diffit import load_model
from diffit.cli.train import parse_train
from diffit.training import loop, snapshots
from diffit.training.ema import EMA, ema_decays, posthoc_coefficients, power_decay, power_exponent, ramped_decay
from diffit.training.estimate import report
from diffit.training.snapshots import find_snapshots, make_ema
from diffit.training.step import train_step
from diffit.training.stopping import Stopped
from tests.training.runs import poisoned, replaced, run

POWERS = ["--ema_power", "0.05", "0.1"]


def test_the_ramp_in_closed_form():
    """While (1 + step) / (10 + step) holds, the initialisation counts as 10! n! 10 / (n + 10)! after n steps."""
    for n in (1, 5, 89):
        kept = np.prod([ramped_decay(0.9999, step) for step in range(1, n + 1)])
        factors = np.arange(n + 2, n + 11) / np.arange(2, 11)  # (n + 10)! / ((n + 1)! 10!)
        assert kept == pytest.approx(1 / np.prod(factors), rel=1e-12)
    assert [ramped_decay(0.9, step) for step in (79, 80, 81, 10**6)] == pytest.approx([80 / 89, 0.9, 0.9, 0.9])
    assert ramped_decay(0.0, 1) == 0


def test_a_half_life_in_closed_form(flags):
    config = parse_train([*flags, "--ema_half_life", "160", "1e9"]).config
    for step in (1, 2, 300, 401, 500):
        seen = 8 * (step - 1)
        expected = [0.5 ** (8 / min(160, 0.05 * seen)) if seen else 0, 0.5 ** (8 / (0.05 * seen)) if seen else 0]
        assert ema_decays(config, step) == pytest.approx(expected)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.05, 0.1, 0.2, 0.28])
def test_the_exponent_has_the_width(sigma_rel):
    gamma = power_exponent(sigma_rel)
    assert gamma >= 0
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-9)
    s = (np.arange(100_000) + 0.5) / 100_000
    weight = (gamma + 1) * s**gamma / len(s)  # its moments, by quadrature
    assert (weight @ (s - weight @ s) ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-3)


def test_a_batch_counts_as_the_integral_of_the_profile_over_its_images():
    """Also where the size of a batch changes on the way."""
    model, one_hot = torch.nn.Linear(6, 1, bias=False, dtype=torch.float64), torch.eye(6, dtype=torch.float64)
    ema, ends = EMA(model), np.cumsum([0, 8, 8, 16, 2, 2, 30])
    for row, (before, now) in zip(one_hot, itertools.pairwise(ends), strict=True):
        model.weight.data[:] = row
        ema.update(model, power_decay(0.15, int(now), int(now - before)))
    expected = np.diff((ends / ends[-1]) ** (power_exponent(0.15) + 1))
    np.testing.assert_allclose(ema.model.weight.data.numpy()[0], expected, rtol=1e-12)


def profile(s, t, sigma_rel):
    gamma = power_exponent(sigma_rel)
    return np.where(s < t, (gamma + 1) * (s / t) ** gamma / t, 0)


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.12, 0.2])
def test_coefficients_sum_to_one_and_are_as_far_off_as_they_say(count, sigma_rel):
    t = np.arange(1, count + 1) * 100 / count
    snapshots = [(end, length) for end in t for length in (0.05, 0.1)]
    coefficients, error = posthoc_coefficients(snapshots, 100, sigma_rel)
    assert coefficients.sum() == pytest.approx(1, abs=1e-9)

    s = (np.arange(100_000) + 0.5) / 1000
    target = profile(s, 100, sigma_rel)

    def distance(coefficients):
        """Root mean square of the difference of profiles, relative to the target's."""
        made = sum(c * profile(s, *each) for c, each in zip(coefficients, snapshots, strict=True))
        return np.sqrt(((made - target) ** 2).mean() / (target**2).mean())

    rounding = np.linalg.norm(coefficients) * 2**-12
    assert error == pytest.approx(np.hypot(distance(coefficients), rounding), rel=0.01, abs=1e-5)
    other = np.random.default_rng(0).normal(size=len(coefficients)) * 0.01
    other -= other.mean()  # no other coefficients of this sum are closer
    assert distance(coefficients + other) > distance(coefficients)
    if count == 40 and sigma_rel >= 0.05:
        assert error < 0.005
        assert np.linalg.norm(coefficients) < 1.01  # fp16's rounding is not amplified


def test_a_snapshot_is_made_of_itself():
    snapshots = [(end, length) for end in (100, 200, 300, 300.001) for length in (0.05, 0.1)]
    coefficients, error = posthoc_coefficients(snapshots, 300, 0.1)
    assert error < 2.0**-11
    np.testing.assert_allclose(coefficients[:4], 0, atol=1e-3)
    assert abs(coefficients).max() < 2  # two that are nearly alike are no reason for large ones
    assert posthoc_coefficients([(300, 0.1)], 300, 0.1)[0] == pytest.approx([1])


def flat(model):
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """A run of 80 steps of which the third is skipped, and its weights after every step."""
    folder, weights = tmp_path_factory.mktemp("posthoc") / "run", []

    def remember(state, *others):
        result = train_step(state, *others)
        weights.append(flat(state.model))
        return result

    with replaced(loop, "train_step", remember), poisoned({2}):
        run(
            flags,
            folder,
            *POWERS,
            "--steps",
            "80",
            "--save_every",
            "40",
            "--optimizer.lr",
            "3e-3",
            "--preview_every",
            "0",
        )
    return folder, weights[:2] + weights[3:]


@pytest.mark.parametrize(
    ("more", "count"), [([], 80), (["--ema_snapshots", "7"], 16), (["--ema_snapshots", "99"], 160)]
)
def test_the_disk_is_known_before(trained, flags, more, count):
    """80 steps: every 2nd, every 11th and the last, every one."""
    said = report(parse_train([*flags, *POWERS, "--steps", "80", *more]).config)
    (size,) = re.findall(rf"snapshots for tools/posthoc_ema.py: {count} files, ([\d.]+) GiB on disk", said)
    found = find_snapshots(trained[0])
    assert float(size) == pytest.approx(count * found[0].path.stat().st_size / 2**30, abs=0.006)


def direct(weights, sigma_rel):
    """In float64, from the weights after each step that was taken."""
    ends = np.arange(len(weights) + 1) / len(weights)
    return np.diff(ends ** (power_exponent(sigma_rel) + 1)) @ np.stack(weights)


def test_snapshots_are_the_exact_averages(trained):
    folder, weights = trained
    found = find_snapshots(folder)
    assert [snapshot[:3] for snapshot in found[-2:]] == [(80, 79 * 8, 0.05), (80, 79 * 8, 0.1)]
    assert len(found) == 2 * 40
    for snapshot, file in zip(found[-2:], ("ema_power_0.05", "ema_power_0.1"), strict=True):
        exact = flat(load_model(folder / "checkpoints/00000080" / f"{file}.safetensors")[0])
        np.testing.assert_allclose(exact, direct(weights, snapshot.sigma_rel), rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(flat(load_model(snapshot.path)[0]), exact.astype(np.float16))


def test_made_averages_are_those_computed_directly(trained):
    folder, weights = trained
    for step, taken in ((80, weights), (60, weights[:59])):
        lengths = [0.05, 0.08, 0.1, 0.12, 0.15, 0.2]
        for length, (path, error) in zip(lengths, make_ema(folder, lengths, step), strict=True):
            model, config = load_model(path)
            expected, made = direct(taken, length), flat(model)
            assert error < 0.01
            assert np.linalg.norm(made - expected) < 0.01 * np.linalg.norm(expected)
            # The rounding of the snapshots is all that one sees: these weights move smoothly.
            assert np.linalg.norm(made - expected) < 2**-11 * np.linalg.norm(expected)
            assert config.made_by.endswith(f"{step} steps of 8 images, EMA of sigma_rel {length} from {step} snapshots")


def test_what_cannot_be_made_is_refused_before_anything_is_written(trained, flags, tmp_path):
    folder, _ = trained
    written = sorted((folder / "posthoc").glob("*"))
    for lengths, step, message in (
        ([0.05], 41, r"has no snapshot of step 41: choose --step 4[02], the nearest"),
        ([0.05], 0, r"has no snapshot of step 0: choose --step 2, the nearest"),
        (
            [0.1, 0.01],
            80,
            r"--sigma_rel 0.01 cannot be made of the 80 snapshots up to step 80: it would be off by 1\d\.\d%",
        ),
        ([0.2], 8, r"--sigma_rel 0.2 cannot be made of the 8 snapshots up to step 8: .* more --ema_snapshots"),
    ):
        with pytest.raises(ValueError, match=message):
            list(make_ema(folder, lengths, step))
    assert sorted((folder / "posthoc").glob("*")) == written
    plain = run(flags, tmp_path / "plain", "--steps", "1").parents[2]
    with pytest.raises(ValueError, match=r"has no snapshots: name a run that was trained with --ema_power 0\.05 0\.1"):
        list(make_ema(plain, [0.05]))
    assert not (plain / "snapshots").exists()
    with pytest.raises(ValueError, match=r"has no ema_power_0\.05.safetensors: go on with the EMAs .*--ema_power"):
        run(flags, tmp_path / "plain", *POWERS)


def files_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "snapshots").iterdir()}


def test_a_resumed_run_has_the_same_snapshots(flags, tmp_path):
    """Also those of another start, killed after step 4, whose later steps are forgotten."""
    more = [*POWERS, "--ema_snapshots", "2", "--ema_decay", "0.9"]
    run(flags, tmp_path / "whole", *more)
    with pytest.raises(RuntimeError, match="killed"), poisoned({3}), replaced(loop, "train_step", killed_at(5)):
        run(flags, tmp_path / "again", *more, "--ema_snapshots", "6", "--save_every", "3")
    (tmp_path / "again/snapshots/00000005_40_0.1.safetensors.77.part").touch()
    assert "00000005_32_0.1.safetensors" in files_of(tmp_path / "again")
    run(flags, tmp_path / "again", *more)
    whole, again = files_of(tmp_path / "whole"), files_of(tmp_path / "again")
    assert sorted(whole) == [f"0000000{n}_{8 * n}_{length}.safetensors" for n in (3, 6) for length in (0.05, 0.1)]
    assert again.items() > whole.items()
    assert {name[:8] for name in again} == {f"0000000{n}" for n in (1, 2, 3, 6)}
    for file in ("ema.safetensors", "ema_power_0.05.safetensors", "ema_power_0.1.safetensors"):
        one, other = (tmp_path / name / "checkpoints/00000006" / file for name in ("whole", "again"))
        assert one.read_bytes() == other.read_bytes()


def killed_at(step):
    take = loop.train_step

    def kill(state, *others):
        if state.step == step:
            raise RuntimeError("killed")
        return take(state, *others)

    return kill


def test_a_run_that_is_stopped_writes_no_snapshot_of_that_step(flags, tmp_path):
    def stop(state, *others):
        return [state.step == 2, *train_step(state, *others)[1:]]

    with replaced(loop, "train_step", stop), pytest.raises(Stopped):
        run(flags, tmp_path, *POWERS, "--ema_snapshots", "3")
    assert {name[:8] for name in files_of(tmp_path)} == {"00000002"}
    assert (tmp_path / "checkpoints/00000003").is_dir()


def test_snapshots_that_cannot_be_written_end_no_run(flags, tmp_path, capsys):
    def full(path, *others):
        raise OSError(28, "No space left on device")

    with replaced(snapshots, "save_checkpoint", full):
        path = run(flags, tmp_path, *POWERS)
    assert path.exists()
    assert "the snapshots of step 1 could not be written (the disk is full); the run goes on" in capsys.readouterr().out
    assert files_of(tmp_path) == {}
