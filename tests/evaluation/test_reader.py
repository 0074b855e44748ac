"""Streaming out of .npz files, and one clear error for each kind of wrong file."""

import re
import zipfile

import numpy as np
import pytest
import torch

from diffit.evaluation.checks import check_images, check_labels, check_pair
from diffit.evaluation.features import to_rgb
from diffit.evaluation.reader import ImageFile
from diffit.system.files import npz_member

RAMP = np.linspace(0, 1, 960).reshape(5, 8, 8, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_are_the_images(tmp_path, pictures, save):
    save(tmp_path / "a.npz", arr_0=pictures, arr_1=np.arange(240))
    file = ImageFile(tmp_path / "a.npz")
    assert (file.count, file.image_shape, file.keys) == (240, (32, 32, 1), ("arr_0", "arr_1"))
    np.testing.assert_array_equal(np.concatenate(list(file.batches(50))), pictures)
    np.testing.assert_array_equal(np.concatenate(list(file.batches(7, 33, 81))), pictures[33:81])
    np.testing.assert_array_equal(file.array("arr_1"), np.arange(240))
    assert file.array("mu") is None


@pytest.mark.parametrize(("save", "most"), [(np.savez, 2.5e6), (np.savez_compressed, 40e6)])
def test_a_later_part_is_read_without_the_earlier(tmp_path, save, most):
    """Of 65 MB a batch is held: compressed, also what is inflated to skip it (16 MB, twice); else nothing is read."""
    import tracemalloc

    images = np.zeros((1000, 128, 170, 3), np.uint8)
    images[500:] = np.arange(500, dtype=np.uint8)[:, None, None, None]
    save(tmp_path / "a.npz", arr_0=images, arr_1=np.arange(1000))
    tracemalloc.start()
    for first, batch in enumerate(ImageFile(tmp_path / "a.npz").batches(10, 500)):
        assert (batch == images[500 + 10 * first :][:10]).all()
    assert tracemalloc.get_traced_memory()[1] < most
    tracemalloc.stop()


def test_an_array_that_is_shorter_than_its_header_says(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive, npz_member(archive, "arr_0", np.dtype("u1"), (9, 8, 8, 3)) as member:
        member.write(bytes(9 * 192 - 1))
    with pytest.raises(ValueError, match="ends before the last of 9 images"):
        ImageFile(path)


def test_grey_becomes_colour(pictures):
    grey = torch.from_numpy(pictures[:4])
    assert (to_rgb(grey) == grey).all()
    assert to_rgb(grey).shape == (4, 32, 32, 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((5, 8, 8, 3), np.uint8)}, "no array 'arr_0' .*images"),
        ({"arr_0": np.zeros((5, 8, 8), np.uint8)}, r"shape \[5, 8, 8\]"),
        ({"arr_0": np.zeros((5, 3, 8, 8), np.uint8)}, r"shape \[5, 3, 8, 8\]"),
        ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "is empty"),
        ({"arr_0": np.linspace(-1, 1, 960, dtype=np.float32).reshape(5, 8, 8, 3)}, "float32 images between -1 and 1"),
        ({"arr_0": np.full((5, 8, 8, 3), np.nan)}, "float64 images, 960 of the first 960 values NaN"),
        ({"arr_0": np.array([{}] * 4)}, "shape"),
        ({"arr_0": np.zeros((5, 3, 8, 8), np.uint8)}, r"transpose them by \(0, 2, 3, 1\)"),
        ({"arr_0": RAMP * 2 - 1}, r"convert them by \(\(x \+ 1\) \* 127\.5\)\.round"),
        ({"arr_0": RAMP}, r"between 0 and 1, .*convert them by \(x \* 255\)\.round"),
        ({"arr_0": RAMP * 255}, r"between 0 and 255, .*convert them by x\.round\(\)"),
        ({"arr_0": (RAMP * 255).astype(np.int64)}, r"int64 images between 0 and 255, .*by x\.round\(\)\.astype"),
        ({"arr_0": RAMP * 65535}, r"bring them to 0\.\.255"),
        ({"arr_0": RAMP > 0.5}, r"bool images between 0 and 1, .*x \* 255"),
        ({f"a{number}": np.zeros(1) for number in range(9)}, r"it holds a0, a1, a2, a3, a4, \.\.\.\)"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        ImageFile(tmp_path / "a.npz")


def test_damaged_files(tmp_path, pictures):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageFile(path)
    path.touch()
    with pytest.raises(ValueError, match="empty file"):
        ImageFile(path)
    np.savez(path, arr_0=pictures)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"not a whole \.npz"):
        ImageFile(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"not a whole \.npz"):
        list(ImageFile(path).batches(100))


def save(path, **arrays):
    np.savez(path, **arrays)
    return ImageFile(path)


def test_images_that_cannot_be_meant(tmp_path, pictures):
    path = tmp_path / "a.npz"
    check_images(save(path, arr_0=pictures))
    with pytest.raises(ValueError, match="without scaling"):
        check_images(save(path, arr_0=(pictures > 100).astype(np.uint8)))
    with pytest.raises(ValueError, match="are the same"):
        check_images(save(path, arr_0=np.repeat(pictures[:1], 300, 0)))


def test_labels(tmp_path, pictures):
    path = tmp_path / "a.npz"

    def labels_of(labels):
        shown, found = check_labels(save(path, arr_0=pictures, arr_1=labels))
        return shown, " | ".join(found)

    even = np.random.default_rng(0).integers(0, 10, 240)
    shown, found = labels_of(even)
    assert re.search("^10 classes, .* images each .mean 24.0", shown)
    assert found == ""
    assert "more uneven than chance" in labels_of(even // 5 * 9)[1]
    assert "8 of 10 classes have none" in labels_of(even // 5 * 9)[1]
    assert "not one label per image" in labels_of(even[:-1])[1]
    assert "not class numbers" in labels_of(even / 2)[1]
    assert "not class numbers" in labels_of(even + 10**12)[1]  # a table of counts would take 7 TiB
    assert check_labels(save(path, arr_0=pictures)) == ("none stored", [])


def test_pairs(tmp_path, pictures):
    np.savez(tmp_path / "samples.npz", arr_0=pictures)
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((9, 64, 64, 3), np.uint8), mu=np.zeros(2), sigma=np.eye(2))
    samples, reference = ImageFile(tmp_path / "samples.npz"), ImageFile(tmp_path / "reference.npz")
    found = " | ".join(check_pair(reference, samples))
    assert "240 samples instead of 50000" in found
    assert "samples are 32x32x1 and reference images are 64x64x3" in found
    with pytest.raises(ValueError, match="swapped"):
        check_pair(samples, reference)
    np.savez(tmp_path / "few.npz", arr_0=pictures[:3])
    with pytest.raises(ValueError, match="at least 4"):
        check_pair(reference, ImageFile(tmp_path / "few.npz"))
