"""Whatever is written for a user is whole or not there: all writers of the project, read from its source."""

import ast
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from diffit.cli.evaluate import main as evaluate
from diffit.system.files import check_apart, exclusive, open_atomically, write_atomically
from evaluations.make_reference import main as make_reference
from tests.conftest import ROOT
from tests.data.pictures import write_pictures
from tests.evaluation.conftest import CLASSIFIER

# (module, function) -> why it need not pass `open_atomically`
EXCEPTIONS = {
    ("diffit/system/files.py", "open_atomically"): "is the one",
    ("diffit/system/files.py", "exclusive"): "a lock",
    ("diffit/system/files.py", "npz_member"): "inside a file that is open",
    ("diffit/training/checkpointing.py", "_write_state"): "into a folder that is synced and renamed when whole",
    ("diffit/training/logging.py", "_write"): "a log grows line by line",
    ("diffit/data/checked.py", "look"): "a memory grows record by record, each with a checksum",
    ("diffit/data/checked.py", "unreadable_images"): "the same",
    ("diffit/cli/pipeline.py", "main"): "a folder of diffusers, whose index comes last",
    ("diffit/pipeline.py", "save_pretrained"): "the same",
    ("diffit/pipeline.py", "push_to_hub"): "a temporary folder",
    ("tools/vae.py", "make_vae"): "a folder of diffusers",
}
NAMES = {"write_text", "write_bytes", "savez", "savez_compressed", "savetxt", "save", "savefig", "save_file", "tofile"}
NAMES |= {"to_csv", "imsave", "dump", "copyfile", "copy2", "urlretrieve", "save_pretrained"}


def writes(call: ast.Call, buffers: set[str]) -> bool:
    """Whether a call may write a file: not where its target is a buffer in memory, or a file opened by the writer."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if ast.unparse(call.func) == "save":  # of safetensors, which returns bytes
        return False
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if any(isinstance(argument, ast.Name) and argument.id in buffers for argument in arguments):
        return False
    if name in ("open", "ZipFile"):
        texts = [a.value for a in arguments if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return any(set(text) <= set("rwaxbt+") and set(text) & set("wax+") for text in texts)
    return name in NAMES


def writers():
    folders = [ROOT / name for name in ("diffit", "evaluations", "tools")]
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                nodes = [*ast.walk(function)]
                made = [(node.targets[0], node.value) for node in nodes if isinstance(node, ast.Assign)]
                made += [(item.optional_vars, item.context_expr) for item in nodes if isinstance(item, ast.withitem)]
                harmless = ("BytesIO()", "open_atomically(", "npz_member(")
                buffers = {
                    ast.unparse(to) for to, by in made if to and any(name in ast.unparse(by) for name in harmless)
                }
                calls = [ast.unparse(node) for node in nodes if isinstance(node, ast.Call) and writes(node, buffers)]
                if calls:
                    yield (path.relative_to(ROOT).as_posix(), function.name), calls


def test_all_writers_of_the_project_pass_the_one():
    found = dict(writers())
    assert {place: calls for place, calls in found.items() if place not in EXCEPTIONS} == {}
    assert EXCEPTIONS.keys() <= found.keys()  # no exception without a writer


def test_a_killed_writer_leaves_the_old_file_and_the_next_holder_tidies(tmp_path):
    path = tmp_path / "out.npz"
    write_atomically(path, b"old")
    code = f"""
import os, pathlib, signal
from diffit.system.files import exclusive, open_atomically
path = pathlib.Path({str(path)!r})
with exclusive(path.parent, path.name), open_atomically(path) as file:
    file.write(b"half"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (tmp_path / "film.part").touch()  # another program's
    (tmp_path / "other.npz.1.part").touch()
    assert len(list(tmp_path.glob("out.npz.*.part"))) == 1
    with exclusive(tmp_path, "out.npz"), exclusive(tmp_path, "other"), open_atomically(path) as file:
        file.write(b"new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["film.part", "out.npz"]
    assert path.read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "a", b"old")
    with pytest.raises(OSError, match="full"), open_atomically(tmp_path / "a"):
        raise OSError(28, "full")
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"a": b"old"}


def test_two_references_into_one_file(tmp_path):
    """The second is refused while the first is at work; the file is that of the first."""
    images = write_pictures(tmp_path / "images", {"": 4})
    out, flags = tmp_path / "out.npz", ["--image_size", "32", "--features", CLASSIFIER, "--device", "cpu"]
    hold = f"""
import pathlib, sys
from diffit.system.files import exclusive
with exclusive(pathlib.Path({str(tmp_path)!r}), "out.npz"):
    print("held", flush=True); sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        command = [sys.executable, "evaluations/make_reference.py", str(images), str(out), *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"error: {out} is in use by process {holder.pid} on " in done.stderr
        holder.stdin.close()
    assert not out.exists()


def test_what_is_read_is_never_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    images, data = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1), dtype=np.uint8), tmp_path / "data.npz"
    np.savez(data, arr_0=images)
    (tmp_path / "link.npz").symlink_to(data)
    os.link(data, tmp_path / "hard.npz")
    flags = ["--features", CLASSIFIER, "--device", "cpu"]
    for out in ("data.npz", "link.npz", "hard.npz", "folder/../data.npz"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(SystemExit, match="2"):
            make_reference([str(data), str(tmp_path / out), *flags])
        assert "which is read: choose another OUT" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            evaluate([str(data), str(data), "--json", str(tmp_path / out), *flags])
        assert "which is read: choose another --json" in capsys.readouterr().err
    assert (np.load(data)["arr_0"] == images).all()
    for folder in (tmp_path, tmp_path / "run", tmp_path / "run" / "deep"):
        with pytest.raises(ValueError, match="choose another --run_dir"):
            check_apart(folder, str(tmp_path), "--run_dir")
    check_apart(tmp_path / "run", str(tmp_path / "images"), "--run_dir")
    check_apart(tmp_path / "run", None, "--run_dir")
