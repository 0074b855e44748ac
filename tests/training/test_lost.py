"""Nothing that a run has learnt is lost: kills, signals, broken files, full disks, numbers that are not finite."""

import json
import random
import resource
import shutil
import signal
import subprocess
import time
from math import isfinite
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffit import load_model
from diffit.checkpoint.resolve import checksum, complete_checkpoints, integrity_error
from diffit.system.files import explained_write, write_failure
from diffit.system.ranks import World
from diffit.training import loop
from diffit.training.stopping import EXIT_CODE, StopSignals
from tests.data.pictures import cut_off, write_pictures
from tests.training.runs import TINY, TRAIN, begun, changed, everything, log_of, poisoned, remembered, replaced, run

FASHION = Path("/usr/share/datasets/fashion-mnist")
COUNT = 20


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def same_end(one: Path, two: Path, step: int) -> bool:
    """Whether two runs ended with the same weights, average, optimizer and log."""
    files = ("ema.safetensors", "state/__0_0.distcp")
    first, second = ([(d / f"checkpoints/{step:08d}/{name}").read_bytes() for name in files] for d in (one, two))
    return first == second and log_of(one) == log_of(two)


def kill_and_resume(flags, run_dir, kills, after, seconds, generator) -> None:
    """Start a run again and again, and kill it some time after its first new checkpoint; then let it end.

    After each kill every checkpoint that counts must be whole, and no step may be lost.
    """
    command, newest = [*TRAIN, *flags, "--run_dir", str(run_dir)], 0
    folder = run_dir / "checkpoints"
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not any(int(f.name) >= newest + after for f in complete_checkpoints(folder)):
            time.sleep(0.005)
        time.sleep(generator.uniform(0, seconds))
        assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = complete_checkpoints(folder)
        assert [integrity_error(each) for each in found] == [None] * len(found)
        assert int(found[-1].name) >= newest
        newest = int(found[-1].name)
    subprocess.run(command, check=True, capture_output=True)
    assert len(names(run_dir)) == 2


def test_a_killed_run_goes_on_bit_for_bit(flags, tmp_path):
    more = ["--steps", "60", "--ema_decay", "[0.9, 0.99]"]
    run(flags, tmp_path / "whole", *more)
    kill_and_resume([*flags, *more], tmp_path / "killed", 1, after=4, seconds=0.1, generator=random.Random(0))
    assert same_end(tmp_path / "whole", tmp_path / "killed", 60)


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="Fashion-MNIST is not on this machine")
def test_killed_20_times_on_fashion_mnist(tmp_path):
    flags = [*TINY, "--data.path", str(FASHION), "--steps", "300", "--log_every", "10"]
    run(flags, tmp_path / "whole")
    kill_and_resume(flags, tmp_path / "killed", COUNT, after=2, seconds=0.5, generator=random.Random(1))
    assert same_end(tmp_path / "whole", tmp_path / "killed", 300)


def test_a_signal_ends_a_run_after_a_checkpoint(flags, tmp_path):
    command = [*TRAIN, *flags, "--run_dir", str(tmp_path), "--steps", "100000", "--save_every", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.jsonl").exists() or len(log_of(tmp_path)) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_CODE == 75
    (saved,) = names(tmp_path)
    assert log_of(tmp_path)[-1]["step"] == int(saved)
    assert f"stopped after step {int(saved)}: the same command goes on" in errors


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(World()) as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.stop_requested
    assert signal.getsignal(signal.SIGTERM) == before


def damage(folder: Path, how: str) -> None:
    if how == "bit":
        with open(folder / "state/__0_0.distcp", "r+b") as file:
            file.seek(1000)
            byte = file.read(1)[0]
            file.seek(1000)
            file.write(bytes([byte ^ 1]))
    elif how == "cut":
        with open(folder / "ema.safetensors", "r+b") as file:
            file.truncate(500)
    else:
        (folder / how).unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("bit", "state/__0_0.distcp is damaged"),
        ("cut", "ema.safetensors is damaged"),
        ("progress.json", "progress.json is missing"),
        ("complete.json", "it was not written to its end"),
    ],
)
def test_of_a_broken_checkpoint_the_one_before_is_used(flags, tmp_path, capsys, how, said):
    run(flags, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    damage(tmp_path / "broken" / "checkpoints" / "00000006", how)
    assert begun(flags, tmp_path / "broken").state.step == 4
    out = capsys.readouterr().out
    assert said in out
    assert "the one before is used" in out
    run(flags, tmp_path / "broken")
    assert same_end(tmp_path / "whole", tmp_path / "broken", 6)
    assert names(tmp_path / "broken") == ["00000004", "00000006", "00000006.broken"]


def test_a_checkpoint_of_before_goes_on(flags, tmp_path):
    """Those that had weights and optimizer in one file, state.pt."""
    run(flags, tmp_path / "whole")
    run(flags, tmp_path / "old", "--steps", "4")
    state = begun(flags, tmp_path / "old").state
    checkpoint = tmp_path / "old/checkpoints/00000004"
    shutil.rmtree(checkpoint / "state")
    whole = {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
    torch.save(whole, checkpoint / "state.pt")
    files = [checkpoint / name for name in ("ema.safetensors", "progress.json", "state.pt")]
    (checkpoint / "complete.json").write_text(
        json.dumps({path.name: [path.stat().st_size, checksum(path)] for path in files})
    )
    run(flags, tmp_path / "old")
    assert same_end(tmp_path / "whole", tmp_path / "old", 6)


def test_a_checkpoint_says_of_every_file_what_is_there(flags, tmp_path):
    """Though none is read again after it was written."""
    run(flags, tmp_path, "--steps", "2", "--ema_decay", "[0.9, 0.99]")
    folder = tmp_path / "checkpoints" / "00000002"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    del files["complete.json"]
    marker = json.loads((folder / "complete.json").read_text())
    assert marker == {name: [path.stat().st_size, checksum(path)] for name, path in files.items()}
    assert len(marker) == 5


@pytest.fixture
def small_disk():
    """No file may grow beyond 20 kB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_older_checkpoints_alone(flags, tmp_path, small_disk, capsys):
    run(flags, tmp_path, "--steps", "2")
    small_disk()
    with pytest.raises(ValueError, match="the checkpoint of step 6 could not be written"):
        run(flags, tmp_path)
    assert "the checkpoint of step 4 could not be written" in capsys.readouterr().out
    assert names(tmp_path) == ["00000002"]
    assert integrity_error(tmp_path / "checkpoints" / "00000002") is None
    assert log_of(tmp_path)[-1]["step"] == 6


def test_a_full_disk_is_called_so():
    """torch.save hides the system's error behind one of its own; the device is always full."""
    file = open("/dev/full", "wb")  # noqa: SIM115 (closing it fails too)
    with pytest.raises(RuntimeError, match="unexpected pos") as caught:
        torch.save({"weights": torch.zeros(100_000)}, file)
    with pytest.raises(OSError, match="No space"):
        file.close()
    assert write_failure(caught.value) == "the disk is full"


@pytest.mark.parametrize(("write", "reason"), [(torch.save, "the disk is full"), (save_file, "File too large")])
def test_writers_with_errors_of_their_own_are_explained(write, reason, tmp_path, small_disk):
    """They name neither the file nor, of PyTorch's, what the system said."""
    small_disk()
    with (
        pytest.raises(ValueError, match=rf"cannot write weights \({reason}\): free some space"),
        explained_write("weights", "free some space"),
    ):
        write({"weights": torch.zeros(100_000)}, tmp_path / "weights")


def test_a_second_run_in_the_folder_is_refused(flags, tmp_path):
    command = [*TRAIN, *flags, "--run_dir", str(tmp_path)]
    first = subprocess.Popen([*command, "--steps", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "log.jsonl").exists():
        time.sleep(0.02)
    second = subprocess.run(command, capture_output=True, text=True)
    first.kill()
    first.wait()
    assert second.returncode == 2
    assert f"error: {tmp_path} is in use by process {first.pid} on " in second.stderr


def test_other_settings_are_named_and_kept(flags, tmp_path, capsys):
    run(flags, tmp_path, "--steps", "2")
    capsys.readouterr()
    run(flags, tmp_path, "--steps", "4", "--batch_size", "16", "--log_every", "2")
    assert "goes on from step 2 with other settings (batch_size: 8, now 16; steps: 2, now 4)" in capsys.readouterr().out
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(start["step"], start["settings"]["batch_size"]) for start in starts] == [(0, 8), (2, 16)]
    with pytest.raises(ValueError, match=r"holds a run of other settings \(edm.sigma_data: 0.5, now 0.4\): choose"):
        run(flags, tmp_path, "--steps", "6", "--edm.sigma_data", "0.4")


def test_damaged_images_are_found_before_the_first_step(flags, tmp_path):
    """And are not decoded again when the run goes on."""
    images = write_pictures(tmp_path / "images", {str(label): 2 for label in range(10)})
    mended = cut_off(images / "7" / "001.png")
    more = ["--data.name", "folder", "--data.path", str(images), "--steps", "1"]
    with pytest.raises(ValueError, match=r"cannot read 1 image: .*7/001.png"):
        run(flags, tmp_path / "run", *more)
    assert not (tmp_path / "run" / "checkpoints").exists()
    mended.write_bytes((images / "7" / "000.png").read_bytes())
    run(flags, tmp_path / "run", *more)


def test_a_log_that_cannot_be_written_does_not_end_the_run(flags, tmp_path, capsys):
    take = loop.train_step

    def fill(state, *others):
        if state.step == 3:
            (tmp_path / "log.jsonl").unlink()
            (tmp_path / "log.jsonl").symlink_to("/dev/full")
        return take(state, *others)

    with replaced(loop, "train_step", fill):
        run(flags, tmp_path)
    assert "step 4 could not be logged (the disk is full); the run goes on" in capsys.readouterr().out
    assert names(tmp_path) == ["00000004", "00000006"]


def test_a_run_needs_its_starting_weights_once(flags, tmp_path):
    first = run(flags, tmp_path / "first", "--steps", "2")
    start = tmp_path / "start.safetensors"
    start.write_bytes(first.read_bytes())
    take = loop.train_step

    def remove(state, *others):
        start.unlink(missing_ok=True)
        return take(state, *others)

    with replaced(loop, "train_step", remove):
        path = run(flags, tmp_path / "second", "--init_from", str(start))
    assert load_model(path)[1].made_by.endswith("after command line, 2 steps of 8 images")


def test_other_classes_in_the_same_folder_are_refused(flags, tmp_path):
    images = write_pictures(tmp_path / "images", {"a": 3, "b": 3})
    more = ["--data.name", "folder", "--data.path", str(images), "--network.num_classes", "2"]
    run(flags, tmp_path / "run", *more, "--steps", "2", "--preview_every", "2")
    (images / "a").rename(images / "z")
    with pytest.raises(ValueError, match=r"a run of other classes \(a, b\), the data now have b, z: give"):
        run(flags, tmp_path / "run", *more)


def test_a_preview_with_more_classes_than_names(flags, tmp_path):
    images = write_pictures(tmp_path / "images", {"a": 4, "b": 4})
    more = ["--data.name", "folder", "--data.path", str(images), "--steps", "1", "--preview_every", "1"]
    run(flags, tmp_path / "run", *more)
    assert (tmp_path / "run" / "previews" / "00000001.png").exists()


def test_the_last_and_every_nth_checkpoint_stay(flags, tmp_path):
    run(flags, tmp_path, "--steps", "10", "--keep", "2", "--keep_every", "4")
    assert names(tmp_path) == ["00000004", "00000008", "00000010"]


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(flags, tmp_path, fused):
    create = loop.create_state

    def create_state(*args):
        state = create(*args)
        if not fused:  # as on a device that has no fused AdamW
            state.optimizer = torch.optim.AdamW(state.optimizer.param_groups[0]["params"], fused=False)
        return state

    with replaced(loop, "create_state", create_state), poisoned({2, 3}), remembered() as states:
        run(flags, tmp_path, "--ema_decay", "[0.9, 0.2]")
    assert states[3] == states[2] == states[1]
    kinds = {"weights", "ema.safetensors", "ema_0.2.safetensors", "exp_avg", "exp_avg_sq", "step"}
    assert changed(states[4], states[3]) == kinds
    assert [line["skipped"] for line in log_of(tmp_path)] == [0, 0, 1, 2, 2, 2]
    assert json.loads((tmp_path / "checkpoints/00000006/progress.json").read_text())["skipped"] == 2
    restored = begun(flags, tmp_path, "--ema_decay", "[0.9, 0.2]", "--steps", "7").state
    assert everything(restored) == states[5]
    assert restored.optimizer.param_groups[0]["fused"]  # whatever the checkpoint was written with


def test_a_run_that_begins_with_a_skip_learns_the_rest(flags, tmp_path):
    with poisoned({0}), remembered() as states:
        run(flags, tmp_path)
    assert not any(key.startswith(("exp_avg", "step")) for key in states[0])  # no moments yet
    assert "weights" in changed(states[0], {key: states[1][key] for key in states[0]})
    restored = begun(flags, tmp_path, "--steps", "7").state
    assert everything(restored) == states[5]
    assert {float(moments["step"]) for moments in restored.optimizer.state.values()} == {5}


@pytest.mark.parametrize("save_every", [3, 6])
def test_skips_are_all_known_where_they_are_written(flags, tmp_path, save_every):
    """The last step before a line of the log or a checkpoint is counted with the others; its sums leave it out."""
    with poisoned({1, 2, 5}):
        run(flags, tmp_path, "--log_every", "6", "--save_every", str(save_every))
    saved = {int(name): tmp_path / "checkpoints" / name / "progress.json" for name in names(tmp_path)}
    skipped = {step: json.loads(path.read_text())["skipped"] for step, path in saved.items()}
    assert skipped == {step: {3: 2, 6: 3}[step] for step in range(save_every, 7, save_every)}
    lines = log_of(tmp_path)
    assert [line["skipped"] for line in lines] == list(skipped.values())
    assert all(isfinite(line[key]) for line in lines for key in ("loss", "grad_norm"))


def test_the_log_holds_the_means_over_the_steps_that_were_taken(flags, tmp_path):
    for name, every in (("each", "1"), ("means", "6")):
        with poisoned({2}):
            run(flags, tmp_path / name, "--log_every", every, "--save_every", "6")
    each, (means,) = log_of(tmp_path / "each"), log_of(tmp_path / "means")
    for key in ("loss", "grad_norm"):
        taken = [line[key] for line in each if line[key] is not None]
        assert len(taken) == 5
        assert means[key] == pytest.approx(sum(taken) / 5, rel=1e-6)


def test_a_run_that_stays_not_finite_ends(flags, tmp_path):
    with (
        poisoned({1, 2, 3}),
        pytest.raises(ValueError, match="not finite in 3 steps in a row, the last of them step 4: l"),
    ):
        run(flags, tmp_path, "--max_skipped", "3")
    assert names(tmp_path) == ["00000002"]
