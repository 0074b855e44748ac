"""Folders, ZIPs and named data sets: what is found, what is refused, and in which words."""

import hashlib
import json
import os
import pickle
import zipfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from diffit.data.checked import decoded_once, unreadable_images
from diffit.data.datasets import ImageDataset, UnreadableImagesError, cifar10, fitting_labels, open_images
from diffit.data.files import image_files
from diffit.system.ranks import World
from tests.data.pictures import cut_off, write_pictures, zipped

CLASSES = {"dog": 2, "cat": 3, "zebra": 1}


def test_class_folders(tmp_path):
    files = image_files(write_pictures(tmp_path, CLASSES))
    assert files.class_names == ("cat", "dog", "zebra")
    assert files.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert files.labels.dtype == np.int64
    assert files.names[3] == "dog/000.png"


def test_pixels_are_those_of_the_files(tmp_path):
    """At its own size a square picture comes through untouched."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = open_images("folder", str(tmp_path), 24, 3)
    assert (images[0][0] == pixels).all()


def test_a_flat_folder_has_no_classes(tmp_path):
    files = image_files(write_pictures(tmp_path, {"": 4}))
    assert (files.class_names, files.labels.tolist()) == ((), [0, 0, 0, 0])


@pytest.mark.parametrize("classes", [CLASSES, {"": 3}])
def test_a_zip_equals_its_folder(tmp_path, classes):
    root = write_pictures(tmp_path / "images", classes)
    folder, archive = (open_images("folder", str(path), 16, 3) for path in (root, zipped(root, tmp_path / "a.zip")))
    assert archive.class_names == folder.class_names
    assert archive.labels.tolist() == folder.labels.tolist()
    assert archive.source.fingerprint() == folder.source.fingerprint()
    for index in range(len(folder)):
        assert (archive[index][0] == folder[index][0]).all()
    assert len(pickle.loads(pickle.dumps(archive))[0][0]) == 16  # as it travels to a worker


def test_wrapping_folders_and_splits_are_seen_through(tmp_path):
    root = write_pictures(tmp_path / "images", CLASSES)
    expected = image_files(root)
    wrapped = image_files(zipped(root, tmp_path / "wrapped.zip", prefix="my/images/"))
    for prefix in ("/", "./", "//", "my//images/./", ".\\", "\\"):  # as ZIP tools write them
        odd = image_files(zipped(root, tmp_path / "odd.zip", prefix=prefix))
        assert odd.class_names == wrapped.class_names
        assert (odd.labels == wrapped.labels).all()
    assert wrapped.class_names == expected.class_names
    write_pictures(tmp_path / "imagenet" / "train", CLASSES)
    write_pictures(tmp_path / "imagenet" / "val", {"cat": 5, "dog": 5})
    split = image_files(tmp_path / "imagenet")
    assert split.class_names == expected.class_names
    assert split.labels.tolist() == expected.labels.tolist()
    # A class of that name beside others is a class.
    assert image_files(write_pictures(tmp_path / "toys", {"train": 1, "car": 1})).class_names == ("car", "train")


def test_nested_and_hidden_files(tmp_path):
    write_pictures(tmp_path, {"cat/young": 1, "cat": 1, "dog": 1, ".thumbs": 2, "__MACOSX/cat": 1, "@eaDir": 1})
    (tmp_path / "readme.txt").write_text("words")
    files = image_files(tmp_path)
    assert files.names == ("cat/000.png", "cat/young/000.png", "dog/000.png")
    assert files.ignored == {".txt": 1}


def test_links_are_followed_once(tmp_path, capsys):
    """A link to a parent would otherwise be read forty times over."""
    root = write_pictures(tmp_path / "images", {"cat": 2, "dog": 1})
    write_pictures(tmp_path / "elsewhere", {"": 3}, seed=1)
    (root / "owl").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "dog")
    files = image_files(root)
    assert files.class_names == ("cat", "dog", "owl")
    assert files.labels.tolist() == [0, 0, 1, 2, 2, 2]
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split(":")[0] for line in said) == [f"left out {root}/again", f"left out {root}/cat/loop"]
    assert all("which is read already" in line for line in said)


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "holds no images: name a folder or a ZIP"),
        ({"": 1, "cat": 1}, "both class folders and loose images such as 000.png"),
        ({"cat": 1, "dog": 0}, "the class folder 'dog'.* holds no images"),
    ],
)
def test_other_layouts_are_refused(tmp_path, kind, classes, message):
    root = tmp_path / "images"
    root.mkdir()
    write_pictures(root, classes)
    path = zipped(root, tmp_path / "a.zip") if kind == "zip" else root
    with pytest.raises(ValueError, match=message) as caught:
        image_files(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_counted_where_there_are_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match=r"holds no images \(only 1 \.txt\)"):
        image_files(tmp_path)


def test_paths_that_are_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no images at"):
        image_files(tmp_path / "nowhere")
    (tmp_path / "no.zip").write_bytes(b"PK not really")
    with pytest.raises(ValueError, match="neither a folder nor a readable ZIP"):
        image_files(tmp_path / "no.zip")
    with pytest.raises(ValueError, match=r"name the images: --data\.path"):
        open_images("folder", None, 32, 3)
    with pytest.raises(ValueError, match="images of 4 channels"):
        open_images("folder", str(tmp_path), 32, 4)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_damaged_image_is_named(tmp_path, suffix):
    root = write_pictures(tmp_path, {"cat": 2})
    Image.effect_noise((64, 64), 50).convert("RGB").save(root / "cat" / f"half.{suffix}")
    cut_off(root / "cat" / f"half.{suffix}")
    images = open_images("folder", str(root), 16, 3)
    pixels, unreadable = images.readable(range(3))
    assert pixels.shape == (2, 16, 16, 3)
    assert [image.index for image in unreadable] == [2]
    with pytest.raises(UnreadableImagesError, match=f"1 image: .*cat/half.{suffix} \\(.+\\): fix or remove"):
        images[2]


def test_damage_inside_a_zip_is_named(tmp_path):
    root = write_pictures(tmp_path / "images", {"cat": 2})
    path = zipped(root, tmp_path / "a.zip")
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("cat/001.png").header_offset
    content = bytearray(path.read_bytes())
    content[start + 200] ^= 255
    path.write_bytes(content)
    _, unreadable = open_images("folder", str(path), 16, 3).readable(range(2))
    assert [image.name for image in unreadable] == [f"{path}/cat/001.png"]


def test_many_damaged_images_are_counted(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.jpg").write_bytes(b"nothing")
    _, unreadable = open_images("folder", str(tmp_path), 16, 3).readable(range(8))
    message = str(UnreadableImagesError(unreadable))
    assert "8 images: " in message
    assert "and 3 more" in message
    assert ("/4.jpg" in message, "/5.jpg" in message) == (True, False)


def test_labels_must_fit_the_network():
    labels = np.array([0, 2, 1])
    assert fitting_labels(labels, 3).tolist() == [0, 2, 1]
    assert fitting_labels(labels, 0).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"a label 2, but the network has 2 classes \(0 to 1\)"):
        fitting_labels(labels, 2)


def test_cifar10_in_its_own_files(tmp_path, monkeypatch):
    """Generated batches in CIFAR-10's format, read by torchvision; only its list of checksums is ours."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels, sums = [], {}
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name in names:
        data = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        pixels.append(data)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [3, 1, 4, 1]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    for name in (*names, "batches.meta"):
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    data = cifar10(tmp_path)
    expected = np.concatenate(pixels[:5]).reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)
    assert (data.images == expected).all()
    assert data.labels.tolist() == [3, 1, 4, 1] * 5
    assert data.class_names == tuple("abcdefghij")
    images = open_images("cifar10", str(tmp_path), 32, 3)
    assert all((image == pixels).all() for (image, _), pixels in zip(images, data.images, strict=True))


def test_cifar10_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not hold CIFAR-10"):
        cifar10(tmp_path)


def test_16_bit_greys_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    image, _ = open_images("folder", str(tmp_path), 64, 1)[0]
    assert (image[..., 0] == ramp >> 8).all()


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path):
    root = write_pictures(tmp_path / "images", {"cat": 2})
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    images = open_images("folder", str(root), 16, 3)
    assert [image.name for image in unreadable_images(images, 0, tmp_path, World())] == [f"{root}/cat/gone.png"]


def test_names_need_not_be_utf_8(tmp_path):
    root = write_pictures(tmp_path / "images", {"": 1})
    (root / "000.png").rename(os.fsdecode(os.fsencode(root) + b"/caf\xe9.png"))
    images = open_images("folder", str(root), 16, 3)
    assert len(images.source.fingerprint()) == 16
    assert unreadable_images(images, 0, tmp_path, World()) == []


def test_what_was_checked_is_remembered_as_it_goes(tmp_path, monkeypatch):
    """Stopped in the third batch of 64, or with a memory that a full disk cut off, the next start looks at the rest."""
    images = open_images("folder", str(write_pictures(tmp_path / "images", {"": 140})), 8, 3)
    seen, readable = [], type(images).readable

    def interrupted(self, indices):
        seen.append(len(indices))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return readable(self, indices)

    def check():
        return unreadable_images(images, 0, tmp_path / "memory", World())

    monkeypatch.setattr(type(images), "readable", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check()
    (memory,) = (tmp_path / "memory").iterdir()
    for cut in (0, 3, 0):
        os.truncate(memory, memory.stat().st_size - cut)
        assert check() == []
    assert seen == [64, 64, 12, 12, 1]


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_a_photograph_is_decoded_once(mode, channels, tmp_path):
    """Its square is then read from the memory, as it was; where that is damaged or gone, the file is decoded again."""
    root = tmp_path / "images"
    root.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (5, 60, 90, 3), np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).convert(mode).save(root / f"{number}.png")
    cut_off(root / "3.png")
    images = open_images("folder", str(root), 16, channels)
    truth = [images[index][0] for index in (0, 1, 2, 4)]
    assert [each.index for each in unreadable_images(images, 0, tmp_path / "memory", World())] == [3]
    again = decoded_once(images, tmp_path / "memory", World())
    whole = [path.read_bytes() for path in sorted(root.iterdir())]
    for path in root.iterdir():
        path.write_bytes(b"")
    for index, pixels in zip((0, 1, 2, 4), truth, strict=True):
        np.testing.assert_array_equal(again[index][0], pixels)
    with pytest.raises(UnreadableImagesError, match=r"3\.png"):
        again[3]
    for path, content in zip(sorted(root.iterdir()), whole, strict=True):
        path.write_bytes(content)
    (memory,) = (tmp_path / "memory").iterdir()
    memory.write_bytes(bytes([memory.read_bytes()[0] ^ 1]) + memory.read_bytes()[1:])
    np.testing.assert_array_equal(again[0][0], truth[0])
    records = memory.read_bytes()
    half = len(records) // 2
    memory.write_bytes(records[half:] + records[:half])  # made anew, in another order
    np.testing.assert_array_equal(again[4][0], truth[3])
    memory.write_bytes(b"")
    np.testing.assert_array_equal(again[1][0], truth[1])
    memory.unlink()
    np.testing.assert_array_equal(again[4][0], truth[3])


def test_a_memory_that_cannot_be_written_stops_nobody(tmp_path):
    images = open_images("folder", str(write_pictures(tmp_path / "images", {"": 2})), 8, 3)
    (tmp_path / "file").touch()
    assert unreadable_images(images, 0, tmp_path / "file", World()) == []


def check_part(rank: int, root: Path) -> None:
    """What each of two ranks does: which images it looks at, and what it knows then."""
    dist.init_process_group("gloo", f"file://{root}/store", rank=rank, world_size=2)
    seen, readable = [], ImageDataset.readable
    images = open_images("folder", str(root / "images"), 8, 3)
    with patch.object(ImageDataset, "readable", lambda self, indices: seen.extend(indices) or readable(self, indices)):
        for _ in range(2):
            found = unreadable_images(images, 0, root / "memory", World(rank, 2))
            seen.append(-1)
    (root / f"{rank}.json").write_text(json.dumps([seen, [image.index for image in found]]))
    dist.destroy_process_group()


def test_ranks_share_the_looking(tmp_path):
    root = write_pictures(tmp_path / "images", {"": 9})
    for broken in (1, 7):
        cut_off(root / f"{broken:03d}.png")
    torch.multiprocessing.spawn(check_part, [tmp_path], nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == [[0, 1, 2, 3, 4, -1, 1, -1], [1, 7]]
    assert second == [[5, 6, 7, 8, -1, 7, -1], [1, 7]]
