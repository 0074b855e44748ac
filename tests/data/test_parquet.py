"""Parquet in the layout of Hugging Face data sets, made here: the same pictures, labels and refusals as of folders."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffit.cli.train import parse_train
from diffit.codec import create_codec
from diffit.data.checked import unreadable_images
from diffit.data.datasets import open_images
from diffit.data.files import image_files
from diffit.data.loader import open_training_set
from diffit.data.parquet import _read_group
from diffit.data.sampler import Key
from diffit.evaluation.reader import open_images as open_samples
from diffit.system.distributed import World
from tests.conftest import ROOT

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 16, 16, 3), dtype=np.uint8)
NAMES = ("cat", "dog", "owl")


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, pixels=PIXELS, labels=None, names=NAMES, column="image", group=5, metadata=True):
    """A file as `datasets.Dataset.to_parquet` writes it."""
    labels = np.arange(len(pixels)) % 3 if labels is None else labels
    images = [{"bytes": png(image) if len(image) else b"nothing", "path": f"{i}.png"} for i, image in enumerate(pixels)]
    features = {column: {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    table = pa.table({column: images, "label": pa.array(labels, pa.int64())})
    about = {"huggingface": json.dumps({"info": {"features": features}})} if metadata else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(about), path, row_group_size=group)
    return path


def test_shards_are_read_in_order(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", PIXELS[:12])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", PIXELS[12:], np.arange(12, 23) % 3)
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", PIXELS[:2])
    (tmp_path / "README.md").touch()
    images = open_images("folder", str(tmp_path), 16, 3)
    assert images.class_names == NAMES
    assert images.labels.tolist() == (np.arange(23) % 3).tolist()
    assert images.source.ignored == {".md": 1}
    _read_group.cache_clear()
    assert all((images[index][0] == PIXELS[index]).all() for index in range(23))
    assert _read_group.cache_info().misses == 6  # row groups of 5, 5, 2, and 5, 5, 1
    file = open_samples(tmp_path)
    assert (np.concatenate([*file.batches(7, 3)]) == PIXELS[3:]).all()
    assert file.array("arr_1").tolist() == images.labels.tolist()
    assert images.source.name(13) == f"{tmp_path}/data/train-00001-of-00002.parquet, row group 0, row 1"


@pytest.mark.parametrize("labels", [None, [-1] * 23])
def test_a_single_file(tmp_path, labels, capsys):
    files = image_files(write(tmp_path / "0000.parquet", labels=labels))
    assert files.class_names == (() if labels else NAMES)
    assert not labels or not files.labels.any()
    assert capsys.readouterr().out.startswith(f"images in {tmp_path}: 23; ")


def test_without_metadata_columns_go_by_their_names(tmp_path):
    files = image_files(write(tmp_path / "a.parquet", column="img", metadata=False))
    assert files.class_names == ("0", "1", "2")
    with pytest.raises(ValueError, match=r"has no column of pictures \(it has photo, label\)"):
        image_files(write(tmp_path / "b.parquet", column="photo", metadata=False))


def test_splits_and_damage(tmp_path):
    write(tmp_path / "default" / "test" / "0000.parquet")
    assert len(image_files(tmp_path)) == 23  # the only one there is
    write(tmp_path / "default" / "valid" / "0000.parquet")
    with pytest.raises(ValueError, match="holds the splits test, valid: name the one"):
        image_files(tmp_path)
    path = write(tmp_path / "default" / "train" / "0000.parquet", PIXELS[:3])
    assert len(image_files(tmp_path)) == 3
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"train/0000\.parquet is not a whole Parquet file"):
        image_files(tmp_path)
    empty = write(tmp_path / "empty" / "a.parquet", PIXELS[:0])
    with pytest.raises(ValueError, match="have no rows"):
        image_files(empty)


def test_pictures_that_cannot_be_read_are_named_and_remembered(tmp_path):
    pixels = [*PIXELS[:6], [], *PIXELS[7:9]]
    images = open_images("folder", str(write(tmp_path / "a.parquet", pixels)), 16, 3)
    (unreadable,) = unreadable_images(images, 0, tmp_path / "run", World())
    assert unreadable.name == f"{tmp_path}/a.parquet, row group 1, row 1"
    (memory,) = (tmp_path / "run").iterdir()
    assert memory.stat().st_size == 8 * (8 + 4 + 16 * 16 * 3)  # stamp, checksum, square


def test_pixels_are_drawn_from_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", group=4)
    flags = "--model ImageDiffit-Tiny --network.input_size 16 --process edm --codec.vae pixels --codec.factor 1"
    config = parse_train([*flags.split(), "--sampling.sampler", "heun", "--data.path", str(path)]).config
    settings = {"seed": 0, "run_dir": tmp_path / "run", "world": World()}
    data = open_training_set(config.data, create_codec(config.codec, "cpu"), 16, 3, **settings)
    path.unlink()
    for index in (22, 0, 13, 7):
        x_start, label = data[Key(index, False, 0)]
        assert (((x_start + 1) * 127.5).round().permute(1, 2, 0).numpy() == PIXELS[index]).all()
        assert label == index % 3
    write(path)
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    with pytest.raises(ValueError, match=r"too much for pixels in 1e-09 GB of memory: unpack it"):
        open_training_set(config.data, create_codec(config.codec, "cpu"), 16, 3, **settings)


def test_the_fingerprint_is_of_the_files(tmp_path):
    fingerprints = {
        image_files(write(tmp_path / f"{name}.parquet", PIXELS[:n])).fingerprint()
        for name, n in (("a", 5), ("b", 5), ("b", 6))
    }
    assert len(fingerprints) == 3


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'diffit\[parquet\]'"):
        image_files(path)
    assert (ROOT / "pyproject.toml").read_text().count("pyarrow>=") == 2
