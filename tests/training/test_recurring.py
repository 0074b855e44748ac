"""Checkpoints and previews by time: when they come, what they leave, and that the training does not notice."""

import shutil

import numpy as np
import pytest

from diffit.training import loop, recurring
from diffit.training.recurring import FIRST, Recurring
from diffit.training.tracker import TensorBoard, read_picture
from tests.training.runs import begun, log_of, poisoned, run, tiny_flags


@pytest.fixture(scope="module")
def by_time(tmp_path_factory):
    """Flags of runs that save by time."""
    flags = tiny_flags(tmp_path_factory.mktemp("by_time"))
    at = flags.index("--save_every")
    return [*flags[:at], *flags[at + 2 :]]


@pytest.fixture
def often(monkeypatch):
    """Whatever comes by time comes after every step."""
    monkeypatch.setattr(recurring, "FIRST", 0.0)
    monkeypatch.setattr(recurring, "_SHARE", float("inf"))
    create = loop.create_recurring

    def without_gaps(*args):
        made = create(*args)
        for each in made:
            each.gap, each.growth = 0.0, 0.0
        return made

    monkeypatch.setattr(loop, "create_recurring", without_gaps)


@pytest.mark.parametrize(
    ("cost", "gap", "growth"), [(0.1, 0.0, 1.2), (5.0, 0.0, 1.2), (0.1, 60.0, 1.0), (60.0, 60.0, 1.0)]
)
def test_what_comes_by_time_takes_one_percent(monkeypatch, cost, gap, growth):
    now, came = [0.0], []
    monkeypatch.setattr(recurring.time, "monotonic", lambda: now[0])
    each = Recurring(lambda logger, last: None, None, gap=gap, growth=growth, begun=0.0)
    while now[0] < 200_000:
        if each.by_clock(ending=False):
            came.append(now[0])
            with each.timed():
                now[0] += cost
        now[0] += 0.5
    assert came[0] == FIRST < 120 - 60  # time for imports and a slow first step
    for number, at in enumerate(came[1:], start=2):
        assert number * cost <= 0.01 * at + 1e-6
    gaps = np.diff(came)
    assert (gaps >= gap).all()
    if growth > 1:
        assert (gaps[1:] >= 0.19 * np.array(came[1:-1])).all()
    assert each.by_clock(ending=True)
    assert len(came) > 20 or cost >= 5


def test_a_run_by_time_is_the_same_to_the_bit(by_time, tmp_path, often):
    """With previews and checkpoints after every step, and with none; also in the lines of its log."""
    both = ["--log_every", "4", "--steps", "10"]
    path = run(by_time, tmp_path / "often", *both, "--tracker", "none")
    plain = run(by_time, tmp_path / "plain", *both, "--save_every", "100", "--preview_every", "0")
    assert path.read_bytes() == plain.read_bytes()
    assert log_of(tmp_path / "often") == log_of(tmp_path / "plain")
    assert [line["step"] for line in log_of(tmp_path / "often")] == [4, 8, 10]
    previews = tmp_path / "often" / "previews"
    grids = sorted(previews.glob("0*.png"))
    assert [int(grid.stem) for grid in grids] == list(range(1, 11))
    assert (previews / "latest.png").read_bytes() == grids[-1].read_bytes()
    strip = read_picture(previews / "strip.png")
    assert strip.shape == (156 + 8, 10 * 136 + 8, 3)
    first, last = read_picture(grids[0]), read_picture(grids[-1])
    tile = np.s_[28 : 28 + 128, 8 : 8 + 128]
    np.testing.assert_array_equal(strip[tile], first[tile])
    np.testing.assert_array_equal(strip[:, -136 - 8 :][tile], last[tile])
    assert not (tmp_path / "plain" / "previews").exists()


@pytest.mark.parametrize("kept", [2, 3])
def test_a_run_resumes_from_a_checkpoint_between_two_lines_of_its_log(by_time, tmp_path, often, kept):
    more = ["--log_every", "4", "--steps", "8", "--keep", "9", "--preview_every", "0"]
    with poisoned({1}):
        path = run(by_time, tmp_path, *more)
        whole, log = path.read_bytes(), log_of(tmp_path)
        for folder in (tmp_path / "checkpoints").iterdir():
            if int(folder.name) > kept:
                shutil.rmtree(folder)
        assert begun(by_time, tmp_path, *more).state.summed == kept - 1
        assert run(by_time, tmp_path, *more).read_bytes() == whole
    assert log_of(tmp_path) == log


def test_short_runs_leave_the_end_alone(by_time, tmp_path):
    run(by_time, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000006"]
    assert not (tmp_path / "previews").exists()


def test_nothing_but_training_ends_a_training(flags, tmp_path, monkeypatch, capsys):
    """Previews, their folder a file, and a tracker that fails: said once each."""

    def fail(*args):
        raise OSError(28, "No space left on device")

    for name in ("log", "image", "close"):
        monkeypatch.setattr(TensorBoard, name, fail)
    tmp_path.joinpath("previews").write_text("")
    path = run(flags, tmp_path, "--preview_every", "2")
    out = capsys.readouterr().out
    assert out.count("the preview of step 2 could not be made (File exists); the run goes on") == 1
    assert out.count("tensorboard could not log step 1 (the disk is full); the run goes on") == 1
    assert out.count("the run goes on") == 2
    assert path.read_bytes() == run(flags, tmp_path / "plain").read_bytes()


def test_wandb_without_a_key_is_refused_before_work(flags, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match="--tracker wandb has no key: run `wandb login`"):
        run(flags, tmp_path / "run", "--tracker", "wandb")
    wandb.teardown()  # it keeps the settings of this environment
    assert not (tmp_path / "run" / "starts.jsonl").exists()


def test_what_is_said_of_a_start_is_so(flags, tmp_path, capsys):
    def said(*more):
        capsys.readouterr()
        begun(flags, tmp_path, *more)
        return capsys.readouterr().out

    assert "starts" not in said("--steps", "4")
    assert "no checkpoint yet: starts anew\n" in said("--steps", "4")
    run(flags, tmp_path, "--steps", "4")
    assert "goes on from step 4 with other settings (steps: 4, now 7)\n" in said("--steps", "7")
    assert "goes on from step 4\n" in said("--steps", "7")
    starts = tmp_path / "starts.jsonl"
    starts.write_text(starts.read_text().replace('"ranks": 1', '"ranks": 2'))
    assert "goes on from step 4, 1 rank instead of 2\n" in said("--steps", "7")


def test_a_damaged_record_is_named(flags, tmp_path, capsys):
    run(flags, tmp_path, "--steps", "4")
    log, starts = tmp_path / "log.jsonl", tmp_path / "starts.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], lines[2][:20], b"\n\xff[1]\n", *lines[3:], lines[3][:-9]]))
    run(flags, tmp_path)
    assert f"{log}: line 3 was damaged and is left out" in capsys.readouterr().out
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 4, 5, 6]
    for content in ("{", "[]", '{"step": 1}', starts.read_text() + '{"step"'):
        starts.write_text(content)
        with pytest.raises(ValueError, match=r"starts.jsonl is damaged in line \d: remove that line"):
            run(flags, tmp_path, "--steps", "8")


def test_a_broken_checkpoint_without_another(flags, tmp_path, capsys):
    run(flags, tmp_path, "--steps", "2")
    marker = tmp_path / "checkpoints/00000002/complete.json"
    marker.write_text(marker.read_text()[:-9])
    begun(flags, tmp_path)
    out = capsys.readouterr().out
    assert "00000002 is broken (" in out
    assert "there is none before it" in out
    assert "no checkpoint yet: starts anew" in out


def test_another_network_is_named_by_what_differs(flags, tmp_path):
    run(flags, tmp_path, "--steps", "2")
    with pytest.raises(ValueError, match=r"a run of another network \(cond_dim: 8, now 16\): choose another --run_dir"):
        run(flags, tmp_path, "--network.cond_dim", "16")
