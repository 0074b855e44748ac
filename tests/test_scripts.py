"""The scripts as a user starts them: from any folder, with mistakes, and quickly."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(script, *arguments, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", ["sample.py", "train.py"])
def test_help_from_a_foreign_folder(script, tmp_path):
    result = run(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "--config" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["sample.py", "train.py"])
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


def test_help_and_dry_run_import_nothing_heavy(tmp_path):
    """Help under a second and a dry run under three rest on this: no tensor library is loaded."""
    code = (
        "import sys, runpy\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'diffusers', 'timm', 'torchvision'} & set(sys.modules)))"
    )
    for script, *flags in (("sample.py", "--help"), ("sample.py", "--dry_run", "True"), ("train.py", "--help")):
        command = [sys.executable, "-c", code, str(ROOT / script), *flags]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0, (script, *flags)
