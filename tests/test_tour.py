"""docs/tour.ipynb: what is committed is what the code draws.

After a change that shows in the notebook, `python -m tests.test_tour` executes it anew.
"""

import base64
import io
import os
import re
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image, ImageSequence

from tests.conftest import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"


@pytest.fixture
def tour():
    return nbformat.read(TOUR, as_version=4)


def execute(folder):
    """The notebook as it comes out of a run in a folder; nothing that was shown before is left."""
    notebook = nbformat.read(TOUR, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    settings = {"resources": {"metadata": {"path": str(folder)}}, "coalesce_streams": True, "record_timing": False}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", **settings)
    return client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(Path(folder) / "ipython")})


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: its streams, and the types of its results."""
    return {output.get("name") or tuple(sorted(output.get("data", [output.output_type]))) for output in cell.outputs}


def pictures(notebook):
    """Number of the code cell -> its pictures, a film as frames: uint8 arrays [frames, H, W, 3]."""
    found = {}
    for number, cell in enumerate(code_cells(notebook)):
        encoded = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        for text in encoded:
            frames = ImageSequence.all_frames(Image.open(io.BytesIO(base64.b64decode(text))))
            found[number] = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    return found


def test_the_committed_notebook_is_small_valid_and_executed_in_order(tour):
    nbformat.validate(tour)
    assert TOUR.stat().st_size < 1_000_000
    counts = [cell.execution_count for cell in code_cells(tour)]
    assert counts == list(range(1, len(counts) + 1))
    assert all(output.output_type != "error" for cell in code_cells(tour) for output in cell.outputs)


def test_the_committed_notebook_shows_its_pictures(tour):
    shown = pictures(tour)
    assert len(shown) >= 9
    assert max(len(frames) for frames in shown.values()) >= 20  # the film
    assert all(frames.std() > 10 for frames in shown.values())  # none is blank


def test_the_committed_notebook_knows_nothing_of_the_machine(tour):
    texts = [cell.source for cell in tour.cells]
    for output in (output for cell in code_cells(tour) for output in cell.outputs):
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    assert "100%" in "".join(texts)  # the bar of the training: outputs are looked at
    absolute = re.compile(r"(?<![\w.}*])(?:/\w|[A-Za-z]:\\)|file://|\bat 0x")
    assert [found for text in texts for found in absolute.findall(text)] == []


def test_links_lead_to_files(tour):
    text = "\n".join(cell.source for cell in tour.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    assert links
    assert all((TOUR.parent / link).is_file() for link in links)


@pytest.mark.slow
def test_the_tour_runs_and_shows_what_is_committed(tour, tmp_path):
    """No cell errors, the outputs are of the same kinds, and the pictures of the bundled model are the same.

    The last picture is of a network that was trained in the tour: on another processor, rounding makes it another one.
    """
    executed = execute(tmp_path)
    assert [kinds(cell) for cell in code_cells(executed)] == [kinds(cell) for cell in code_cells(tour)]
    new, committed = pictures(executed), pictures(tour)
    assert {n: frames.shape for n, frames in new.items()} == {n: frames.shape for n, frames in committed.items()}
    last = max(committed)
    for number in set(committed) - {last}:
        assert np.abs(new[number].astype(float) - committed[number]).mean() < 1, f"the pictures of code cell {number}"
    assert new[last].std() > 10


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        nbformat.write(execute(empty), TOUR)
