"""Trackers, for real and offline: what a run logs arrives, and the next start goes on in the same run."""

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from diffit.cli.train import parse_train
from diffit.training.tracker import check_tracker
from tests.conftest import ROOT
from tests.training.runs import log_of, run


def test_wandb_offline(flags, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    more = ["--tracker", "wandb", "--preview_every", "2"]
    run(flags, tmp_path / "run", *more, "--steps", "2")
    run(flags, tmp_path / "run", *more, "--steps", "4")
    name = (tmp_path / "run" / "tracker_run.txt").read_text()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{name}.wandb"] * 2
    steps = [history_of(path) for path in files]
    losses = [line["loss"] for line in log_of(tmp_path / "run")]
    assert [row["loss"] for rows in steps for row in rows if "loss" in row] == pytest.approx(losses)
    assert any("samples" in row for row in steps[1])


def history_of(path):
    """The rows of an offline run: protocol buffers in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, position, whole, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # no header is split between blocks
            position += 32768 - position % 32768
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a full record, or the last piece of one
            record, whole = wandb_internal_pb2.Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return rows


@pytest.mark.slow
def test_trackio_keeps_a_local_store(flags, tmp_path):
    pytest.importorskip("trackio")
    script = "import sys; from tests.training.runs import run; run(sys.argv[4:], sys.argv[1], *sys.argv[2:4])"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": str(ROOT)}
    for steps in ("2", "4"):
        command = [sys.executable, "-c", script, str(tmp_path / "run"), "--steps", steps, *flags]
        command += ["--tracker", "trackio", "--preview_every", "2"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "store").glob("diffit*.db")
    with sqlite3.connect(path) as store:
        rows = store.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {row[0] for row in rows} == {(tmp_path / "run" / "tracker_run.txt").read_text()}
    losses = [json.loads(row[2])["loss"] for row in rows if b"loss" in row[2]]
    assert losses == pytest.approx([line["loss"] for line in log_of(tmp_path / "run")])


def test_a_tracker_that_is_not_installed_is_named(flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = parse_train([*flags, "--run_dir", str(tmp_path), "--tracker", "wandb"]).config
    with pytest.raises(ValueError, match="--tracker wandb needs that package: pip install wandb"):
        check_tracker(config)


def test_none_is_none(flags, tmp_path):
    run(flags, tmp_path, "--tracker", "none", "--steps", "1")
    assert not (tmp_path / "tensorboard").exists()
    assert len(log_of(tmp_path)) == 1


def test_tensorboard_leaves_tensorflow_alone(flags, tmp_path):
    """It would load it, with a page of log lines, where it is installed; here a module of that name ends the run."""
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    script = "import sys; from tests.training.runs import run; run(sys.argv[2:], sys.argv[1], '--steps', '1')"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", script, str(tmp_path / "run"), *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run" / "tensorboard").iterdir())
