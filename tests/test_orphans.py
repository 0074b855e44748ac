"""A rank that waits for nobody ends when rank 0 or its launcher is gone, also if they went while it imported."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

RANK = """
import time
from diffit.system import distributed
from diffit.system.ranks import detect_world
distributed._GRACE = 1.0
try:
    with distributed.watching(detect_world(), minutes=0.02):
        print("at work", flush=True)
        time.sleep(float(SECONDS))
    print("done", flush=True)
except ValueError as error:
    print(error, flush=True)
"""
# A launcher that starts one rank, whose output is its own, and waits for it.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


def start(seconds, port, torchrun, *, launcher=False):
    code = RANK.replace("SECONDS", str(seconds))
    named = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    named |= {"TORCHELASTIC_USE_AGENT_STORE": str(torchrun), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LAUNCHER, code] if launcher else [sys.executable, "-c", code]
    return subprocess.Popen(
        command, env=os.environ | named, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture
def store():
    """A socket that listens, as that of the store does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.parametrize("gone", ["launcher", "store", "nobody"])
def test_who_is_gone(store, gone):
    process = start(5 if gone == "nobody" else 600, store.getsockname()[1], torchrun=True, launcher=gone == "launcher")
    connection, _ = store.accept()
    assert process.stdout.readline() == "at work\n"
    begun = time.monotonic()
    if gone == "launcher":
        process.send_signal(signal.SIGKILL)
    elif gone == "store":
        connection.close()
    said = process.stdout.read()  # to the end of the rank, which holds the pipe
    assert time.monotonic() - begun < 30
    assert said == ("done\n" if gone == "nobody" else "rank 1 ends, as rank 0 or its launcher is gone\n")
    process.wait()
    connection.close()


@pytest.mark.parametrize("torchrun", [True, False])
def test_gone_while_it_imported(store, torchrun):
    port = store.getsockname()[1]
    store.close()
    said, _ = start(600, port, torchrun).communicate(timeout=60)
    assert said == "rank 0 or its launcher is gone: start the same command again\n"
