"""How runs end that have data workers: after errors, lost workers, signals; nothing waits, and no worker is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from diffit.system.device import explained_memory
from diffit.system.ranks import World
from diffit.training.stopping import EXIT_CODE, INTERRUPTED, StopSignals
from tests.conftest import ROOT
from tests.training.runs import TRAIN, log_of

WORKERS = ["--data.workers", "2", "--steps", "100000", "--save_every", "100000"]


def start(command, run_dir):
    """A run in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *WORKERS, "--run_dir", str(run_dir)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def workers_of(process, run_dir) -> list[int]:
    """The process ids of a run's workers, once it takes steps."""
    while not (run_dir / "log.jsonl").exists() or len(log_of(run_dir)) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def ended(pids) -> bool:
    """Whether processes end within some seconds."""
    for _ in range(400):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_an_unforeseen_error_ends_the_run(flags, tmp_path):
    failed = tmp_path / "failed"
    script = [sys.executable, str(Path(__file__).parent / "unforeseen.py"), str(failed)]
    process = start([*script, *flags], tmp_path / "run")
    _, errors = process.communicate(timeout=120)
    assert time.time() - failed.stat().st_mtime < 10
    assert process.returncode == 1
    assert "RuntimeError: as nobody foresaw" in errors


def test_a_lost_worker_is_one_sentence(flags, tmp_path):
    process = start([*TRAIN, *flags], tmp_path)
    workers = workers_of(process, tmp_path)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "error: a data worker was ended from outside" in errors
    for flag in ("--batch_size", "--accumulate", "--activation_checkpointing", "--data.workers"):
        assert flag in errors
    assert ended(workers)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_CODE), (signal.SIGINT, INTERRUPTED)])
def test_a_signal_to_all_processes_of_a_job_saves_and_ends_it(flags, tmp_path, number, code):
    process = start([*TRAIN, *flags], tmp_path)
    workers = workers_of(process, tmp_path)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert log_of(tmp_path)[-1]["step"] == int(saved.name)
    assert f"stopped after step {int(saved.name)}: the same command goes on" in errors
    assert ended(workers)


def test_workers_end_with_their_rank(flags, tmp_path):
    process = start([*TRAIN, *flags], tmp_path)
    workers = workers_of(process, tmp_path)
    process.kill()
    assert ended(workers)


def test_a_second_interrupt_stops_at_once():
    with StopSignals(World()) as signals:
        signal.raise_signal(signal.SIGINT)
        assert (signals.stop_requested, signals.exit_code) == (True, 130)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_interrupt_that_a_launcher_passes_on_is_one():
    with StopSignals(World(size=2)) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert signals.exit_code == 130


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_want_of_memory_is_one_sentence(error):
    with (
        pytest.raises(ValueError, match=r"lower the batch($|, or)") as caught,
        explained_memory("lower the batch"),
    ):
        raise error
    assert "\n" not in str(caught.value)


def test_real_want_of_memory_is_known():
    with pytest.raises(ValueError, match="memory has run out"), explained_memory("take less"):
        torch.empty(2**55)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), explained_memory(""):
        raise RuntimeError("shapes do not fit")
