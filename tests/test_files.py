"""Locks: one command per folder, as two processes see it."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from diffit.system.files import exclusive
from tests.conftest import ROOT
from tests.small_models import write_fashion_files

HOLD = """
import pathlib, sys, time
from diffit.system.files import exclusive
with exclusive(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_is_refused_with_its_holders_name(tmp_path, holder):
    with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on {socket.gethostname()}: wait"):
        exclusive(tmp_path).__enter__()


def test_a_dead_holders_folder_is_taken_over_and_left_clean(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with exclusive(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_that_is_deleted_meanwhile_is_said(tmp_path, anew):
    """Also if it is there again: its lock is then another's, and stays."""
    folder = tmp_path / "run"

    def work():
        with exclusive(folder):
            shutil.rmtree(folder)
            if anew:
                folder.mkdir()
                (folder / ".lock").write_text("of another")

    with pytest.raises(
        ValueError, match="run was deleted while it was written to: what was in it is lost, start again"
    ):
        work()
    assert (folder / ".lock").exists() == anew


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*/file/run \(Not a directory\): choose another folder"):
        exclusive(tmp_path / "file" / "run").__enter__()


@pytest.mark.parametrize(
    "command",
    [
        ["sample.py", "--num_samples", "1", "--num_sampling_steps", "1", "--device", "cpu", "--log_dir"],
        [
            *("-m", "diffit.data.encode", "--data.name", "fashion_mnist", "--vae", "Diffit-Fashion-VAE"),
            *("--image_size", "32", "--device", "cpu", "--data.path", "fashion", "--out"),
        ],
    ],
    ids=["sample", "encode"],
)
def test_commands_share_no_folder(tmp_path, holder, command):
    """As train.py does; see tests/training/test_lost.py."""
    data = str(write_fashion_files(tmp_path / "fashion", count=4))
    command = [data if word == "fashion" else word for word in command]
    result = subprocess.run([sys.executable, *command, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert f"error: {tmp_path} is in use by process {holder.pid} on " in result.stderr
