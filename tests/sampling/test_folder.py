"""Shards, the merged file and the refusals of a sample folder."""

import itertools
import resource
import subprocess
import sys

import numpy as np
import pytest

from diffit.data.files import picture_of
from diffit.sampling.folder import SampleFolder, draw_grid, save_png
from diffit.system.files import difference
from tests.conftest import ROOT


def images_of(first, count, channels=3):
    """Images that tell their number."""
    numbers = np.arange(first, first + count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return np.broadcast_to(numbers, (count, 4, 5, channels)).copy()


def labels_of(first, count):
    return np.arange(first, first + count) * 10


@pytest.fixture
def folder(tmp_path):
    folder = SampleFolder(tmp_path / "out", 10)
    folder.prepare({"seed": 0}, overwrite=False)
    return folder


def test_merge_is_what_numpy_reads(folder):
    for first, count in ((6, 4), (0, 3), (3, 3)):
        folder.add(first, images_of(first, count), labels_of(first, count))
    assert folder.missing() == []
    path = folder.merge(with_labels=True)
    assert path.name == "samples_10x4x5x3.npz"
    with np.load(path) as samples:
        assert samples.files == ["arr_0", "arr_1"]
        assert (samples["arr_0"].dtype, samples["arr_1"].dtype) == (np.uint8, np.int64)
        np.testing.assert_array_equal(samples["arr_0"], images_of(0, 10))
        np.testing.assert_array_equal(samples["arr_1"], labels_of(0, 10))
    assert folder.finished() == path
    folder.discard_shards()
    assert sorted(file.name for file in folder.path.iterdir()) == ["manifest.json", path.name]


def test_shards_of_any_division_give_the_same_bytes(tmp_path):
    contents = []
    for number, parts in enumerate([[(0, 10)], [(0, 4), (4, 4), (8, 2)], [(0, 6), (4, 6)]]):  # the last ones overlap
        folder = SampleFolder(tmp_path / str(number), 10)
        folder.prepare({}, overwrite=False)
        for first, count in parts:
            folder.add(first, images_of(first, count), labels_of(first, count))
        contents.append(folder.merge(with_labels=True).read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_unconditional_samples_have_no_labels(folder):
    folder.add(0, images_of(0, 10), labels_of(0, 10))
    with np.load(folder.merge(with_labels=False)) as samples:
        assert samples.files == ["arr_0"]


def test_missing_and_leftovers(folder):
    folder.add(2, images_of(2, 3), labels_of(2, 3))
    (folder.shards / "00000005-00002.npz.123.part").write_bytes(b"half")
    assert folder.missing() == [0, 1, 5, 6, 7, 8, 9]
    folder.prepare({"seed": 0}, overwrite=False)
    assert [path.name for path in folder.shards.iterdir()] == [f"00000002-00003-{folder.key}.npz"]


def test_other_settings_are_refused_and_named(folder):
    folder.add(0, images_of(0, 10), labels_of(0, 10))
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        folder.prepare({"seed": 1}, overwrite=False)
    assert folder.missing() == []
    mine = folder.path / "notes.txt"
    mine.write_text("keep me")
    folder.prepare({"seed": 1}, overwrite=True)
    assert folder.missing() == list(range(10))
    assert mine.read_text() == "keep me"


def test_samples_of_unknown_origin_are_refused(folder):
    folder.add(0, images_of(0, 10), labels_of(0, 10))
    path = folder.merge(with_labels=True)
    (folder.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no manifest says how"):
        folder.prepare({"seed": 0}, overwrite=False)
    folder.prepare({"seed": 0}, overwrite=True)
    assert not path.exists()


def test_a_run_that_made_nothing_stands_in_nobodys_way(folder):
    folder.prepare({"seed": 1}, overwrite=False)
    folder.add(0, images_of(0, 1), labels_of(0, 1))
    with pytest.raises(ValueError, match="seed: 1, now 2"):
        folder.prepare({"seed": 2}, overwrite=False)


def test_a_rank_of_an_older_command_is_nobodys(folder):
    """Another command has taken the folder over, or the same one anew: what the orphan writes is not merged."""
    folder.add(0, images_of(0, 2), labels_of(0, 2))
    orphan = SampleFolder(folder.path, 10, folder.key)
    orphan.check_owner()
    again = SampleFolder(folder.path, 10)
    assert again.prepare({"seed": 0}, overwrite=False) == folder.key  # a restart goes on with what was made
    assert again.missing() == list(range(2, 10))
    other = SampleFolder(folder.path, 10)
    for settings in ({"seed": 1}, {"seed": 0}):
        assert other.prepare(settings, overwrite=True) not in ("", folder.key)
        orphan.add(2, images_of(100, 8), labels_of(100, 8))
        with pytest.raises(ValueError, match="was deleted, or taken over by another command"):
            orphan.check_owner()
        assert other.missing() == list(range(10))
    other.add(0, images_of(0, 10), labels_of(0, 10))
    with np.load(other.merge(with_labels=False)) as samples:
        np.testing.assert_array_equal(samples["arr_0"], images_of(0, 10))


@pytest.mark.parametrize("hidden", [(0, 2), (3, 3), (6, 4)])
def test_a_gap_is_refused(folder, hidden):
    """As where a network file system does not list a file yet: nothing is merged, and nothing deleted."""
    shards = [(0, 2), (2, 1), (3, 3), (6, 4)]
    for first, count in shards:
        if (first, count) != hidden:
            folder.add(first, images_of(first, count), labels_of(first, count))
    with pytest.raises(ValueError, match=rf"lacks samples {hidden[0]} to {sum(hidden) - 1}: run the same command"):
        folder.merge(with_labels=True)
    assert folder.finished() is None
    assert len(list(folder.shards.iterdir())) == 3


@pytest.mark.parametrize(
    ("of", "what"),
    [
        *itertools.product(("shard", "file"), ("cut", "flipped", "not an archive")),
        ("shard", "short"),
        ("shard", "other numbers"),
    ],
)
def test_a_damaged_file_costs_no_sample(folder, of, what):
    """It is named; shards go only when the file of all samples has been read back whole."""
    for first in (0, 5):
        folder.add(first, images_of(first, 5), labels_of(first, 5))
    path = folder.merge(with_labels=True) if of == "file" else min(folder.shards.iterdir())
    content = bytearray(path.read_bytes())
    if what == "short":
        np.savez(path, images=images_of(0, 3), labels=labels_of(0, 5))
    elif what == "other numbers":
        np.savez(path, images=images_of(0, 5) / np.float32(255), labels=labels_of(0, 5))
    else:
        middle = len(content) // 2
        damaged = {"cut": content[:middle], "not an archive": b"<html>"}
        content[middle] ^= 1
        path.write_bytes(damaged.get(what, content))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: delete it and run the same command again"):
        folder.discard_shards() if of == "file" else folder.merge(with_labels=True)
    assert len(list(folder.shards.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b'{"settings": {"se', b"[]", b'{"settings": 3}', b"{}", b"\xff\xfe", b"null"])
def test_a_damaged_manifest_is_one_sentence(folder, content):
    manifest = folder.path / "manifest.json"
    folder.add(0, images_of(0, 1), labels_of(0, 1))
    manifest.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        folder.read_manifest()
    with pytest.raises(ValueError, match=r"manifest\.json is damaged and does not say how\): choose another --log_dir"):
        folder.prepare({"seed": 0}, overwrite=False)
    folder.prepare({"seed": 0}, overwrite=True)
    assert folder.read_manifest()["settings"] == {"seed": 0}


def test_difference():
    old = {"seed": 0, "guidance": {"scale": 1.5, "power": 4}}
    new = {"seed": 0, "guidance": {"scale": 4.4, "power": 4}, "vae": "x"}
    assert difference(old, new) == "guidance.scale: 1.5, now 4.4; vae: None, now x"


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="choose another --log_dir"):
        SampleFolder(tmp_path / "file" / "out", 1).prepare({}, overwrite=False)


FULL_DISK = """
import resource, signal, sys, numpy as np
from pathlib import Path
from diffit.sampling.folder import SampleFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = SampleFolder(Path(sys.argv[1]), 100)
folder.prepare({}, overwrite=False)
step = sys.argv[2]
if step == "merge":
    for first in range(0, 100, 10):
        folder.add(first, np.zeros((10, 32, 32, 3), np.uint8), np.zeros(10, np.int64))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    if step == "merge":
        folder.merge(True)
    folder.add(0, np.zeros((100, 32, 32, 3), np.uint8), np.zeros(100, np.int64))
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs limits on the size of files")
@pytest.mark.parametrize("step", ["add", "merge"])
def test_a_full_disk(tmp_path, step):
    """The system refuses to let files grow, as it does when the disk is full."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "out"), step]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "free some space and run the same command again" in result.stdout, result.stderr
    left = sorted(path.name for path in (tmp_path / "out").rglob("*") if path.is_file())
    key = SampleFolder(tmp_path / "out", 100).prepare({}, overwrite=False)
    shards = [f"{first:08d}-00010-{key}.npz" for first in range(0, 100, 10)] if step == "merge" else []
    assert left == [*shards, "manifest.json"]


def test_grid(tmp_path):
    from PIL import Image

    save_png(tmp_path / "grid.png", draw_grid(images_of(0, 10) * 25, [f"a rather long title {i}" for i in range(10)]))
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    present = {tuple(pixel) for pixel in picture.reshape(-1, 3)}
    assert {(25 * i,) * 3 for i in range(10)} <= present


def test_a_grid_of_two_columns_is_filled_row_by_row():
    images = images_of(1, 6) * 25
    sheet = np.asarray(draw_grid(images, [""] * 6, columns=2))
    side = 128 // 5 * 5  # images of width 5, enlarged
    starts = [int(np.argwhere((sheet == 25 * i).all(-1))[0][0]) for i in range(1, 7)]  # the first row of pixels
    assert starts[0] == starts[1] < starts[2] == starts[3] < starts[4] == starts[5]
    assert sheet.shape[1] == 2 * (side + 8) + 8


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_the_image(channels):
    image = images_of(7, 1, channels)[0]
    np.testing.assert_array_equal(np.asarray(picture_of(image)).reshape(image.shape), image)
