"""The scripts as a user starts them: from any folder, with mistakes, and quickly."""

import ast
import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffit import load_model
from tests.conftest import ROOT
from tests.data.pictures import write_pictures


def run(script, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", ["sample.py", "train.py", "app.py"])
def test_help_from_a_foreign_folder(script, tmp_path):
    result = run(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "--config" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["sample.py", "train.py", "app.py"])
def test_mistakes_are_one_sentence(script, tmp_path):
    result = run(script, "--model", "Difit", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown model 'Difit'")
    assert len(result.stderr.strip().splitlines()) == 1


def test_mistakes_found_later_are_one_sentence_too(tmp_path):
    result = run("sample.py", "--class_labels", "Trouser", "Hat", "--num_samples", "1", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no class 'Hat'")
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sample", "train", "evaluate"])
def test_commands_of_the_package(command, tmp_path):
    """What `torchrun -m` starts where there is no checkout."""
    words = [sys.executable, "-m", f"diffit.cli.{command}", "--help"]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")


def test_scripts_import_what_there_is():
    """Also below `if __name__ == "__main__"`, where no other test of a tool comes by."""
    missing = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("evaluations/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "diffit":
                module = importlib.import_module(node.module)
                missing += [f"{path.name}: {node.module}.{each.name}" for each in node.names if not known(module, each)]
    assert missing == []


def known(module, imported):
    """Whether a name is in a module, or is a module of a package."""
    if hasattr(module, imported.name) or not hasattr(module, "__path__"):
        return hasattr(module, imported.name)
    return importlib.util.find_spec(f"{module.__name__}.{imported.name}") is not None


COMMANDS = {
    "sample.py": [str(ROOT / "sample.py")],
    "evaluator.py": [str(ROOT / "evaluations" / "evaluator.py")],
    "diffit.data.encode": ["-m", "diffit.data.encode", "--data.path", ".", "--out", "out"],
    "diffit.benchmark": ["-m", "diffit.benchmark"],
    "ablations.py": [str(ROOT / "tools" / "ablations.py"), "table"],
}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is being loaded is read from /proc")
@pytest.mark.parametrize("name", COMMANDS)
def test_an_interruption_while_pytorch_is_imported_is_one_line(name, tmp_path):
    command = [sys.executable, *COMMANDS[name]]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(error.strip().splitlines()) == 1
    assert error.strip().startswith("stopped")


LIGHT = """
import sys, runpy
sys.argv = sys.argv[1:]
try: runpy.run_path(sys.argv[0], run_name='__main__')
except SystemExit: pass
sys.exit(bool({'torch', 'diffusers', 'timm', 'torchvision'} & set(sys.modules)))
"""
SCRIPTS = [str(ROOT / "sample.py"), str(ROOT / "train.py"), str(ROOT / "app.py")]


@pytest.mark.parametrize("script", SCRIPTS, ids=["sample.py", "train.py", "app.py"])
@pytest.mark.parametrize("flags", [["--help"], ["--no_such_flag", "1"], ["--guidance.interval", "5", "1"]])
def test_help_and_mistakes_import_nothing_heavy(script, flags, tmp_path):
    """An answer within a second rests on this: no tensor library is loaded."""
    result = subprocess.run([sys.executable, "-c", LIGHT, script, *flags], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0


def test_a_dry_run_imports_nothing_heavy(tmp_path):
    command = [sys.executable, "-c", LIGHT, SCRIPTS[0], "--dry_run", "True"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0


def test_help_answers_within_a_second(tmp_path):
    """The best of five, since the machine may be busy; a tensor library alone takes longer."""
    seconds = []
    for _ in range(5):
        start = time.monotonic()
        assert run("sample.py", "--help", cwd=tmp_path).returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1


def test_training_without_data_names_what_is_missing_at_once(tmp_path):
    command = [sys.executable, "-c", LIGHT, SCRIPTS[1]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0  # nothing heavy was loaded
    assert result.stderr.startswith("error: name the images: --data.path FOLDER_OR_ZIP")
    assert "configs/debug.yaml" in result.stderr
    assert result.stderr.count("\n") == 1


def torchrun(*arguments, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--redirects=3"]
    command += [f"--log-dir={cwd / 'logs'}", str(ROOT / arguments[0]), *arguments[1:]]
    code = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240).returncode

    return code, [path.read_text() for path in sorted((cwd / "logs").glob("*/attempt_0/*/stderr.log"))]


@pytest.mark.parametrize("flags", [["--precision", "fp8"], []], ids=["a setting", "no data"])
def test_one_rank_says_what_all_know(flags, tmp_path):
    """Rank 0 alone, as its last line: torchrun's own report comes after it."""
    code, (first, second) = torchrun("train.py", *flags, cwd=tmp_path)
    assert code != 0
    assert first.splitlines()[-1].startswith("error: ")
    assert "error: " not in second


def test_a_model_of_pixels_trains_with_its_data_alone(tmp_path):
    data = write_pictures(tmp_path / "images", {"": 4})
    flags = ["--model", "ImageDiffit-Tiny", "--data.path", str(data)]
    small = ["--steps", "1", "--batch_size", "4", "--device", "cpu", "--data.workers", "0"]
    result = run("train.py", *flags, *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    _, config = load_model(tmp_path / "runs/train/checkpoints/00000001/ema.safetensors")
    assert (config.process, config.codec.vae, config.sampling.sampler) == ("edm", "pixels", "heun")
