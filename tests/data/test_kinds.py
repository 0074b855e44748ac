"""Pictures as people have them: depths, modes, suffixes, splits, dataset.json. All who read them see the same ramp."""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image

from diffit.data.datasets import ImageArrays, UnreadableImagesError, fashion_mnist, open_images
from diffit.data.files import SUFFIXES, image_files
from diffit.evaluation.reader import PictureFiles
from diffit.evaluation.reader import open_images as open_samples
from tests.data.pictures import write_pictures, zipped

RAMP = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)  # [64, 64], black to white
GREY = (RAMP >> 8).astype(np.uint8)
RGB = np.stack([GREY] * 3, -1)


def png16(*channels: np.ndarray) -> bytes:
    """A 16-bit PNG (Pillow writes only grey ones) of 1 to 4 channels: grey, with alpha, RGB, with alpha."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels, kind = np.stack(channels, -1).astype(">u2"), {1: 0, 2: 4, 3: 2, 4: 6}[len(channels)]
    header = struct.pack(">IIBBBBB", 64, 64, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def pnm(kind: str, most: int) -> bytes:
    values = RAMP.astype(float) / 65535 * most
    values = np.stack([values] * 3, -1) if kind == "P6" else values
    return f"{kind} 64 64 {most}\n".encode() + np.round(values).astype(">u2" if most > 255 else np.uint8).tobytes()


def saved(image: Image.Image, kind: str, **settings: object):
    return lambda path: image.save(path, kind, **settings)


def content(data: bytes):
    return lambda path: path.write_bytes(data)


OPAQUE = np.full_like(RAMP, 65535)
EXIF = Image.Exif()
EXIF[0x0112] = 1
SAME = {  # name -> writes the ramp
    "8.png": saved(Image.fromarray(GREY), "PNG"),
    "16.png": content(png16(RAMP)),
    "16alpha.png": content(png16(RAMP, OPAQUE)),
    "16rgb.png": content(png16(RAMP, RAMP, RAMP)),
    "16rgba.png": content(png16(RAMP, RAMP, RAMP, OPAQUE)),
    "16.pgm": content(pnm("P5", 65535)),
    "12.pgm": content(pnm("P5", 4095)),
    "16.ppm": content(pnm("P6", 65535)),
    "16.tif": saved(Image.fromarray(RAMP), "TIFF"),
    "16big.TIFF": saved(Image.fromarray(RAMP.astype(">u2")), "TIFF"),
    "rgb.bmp": saved(Image.fromarray(RGB), "BMP"),
    "rgb.tga": saved(Image.fromarray(RGB), "TGA"),
    "cmyk.tif": saved(Image.fromarray(RGB).convert("CMYK"), "TIFF"),
    "palette.gif": saved(
        Image.fromarray(RGB).quantize(64), "GIF", save_all=True, append_images=[Image.new("P", (64, 64))]
    ),
    "palette.png": saved(Image.fromarray(RGB).quantize(64), "PNG", transparency=0),
    "clear.png": saved(Image.fromarray(np.concatenate([RGB, RGB[..., :1]], -1)), "PNG"),
    "lossless.webp": saved(Image.fromarray(RGB), "WEBP", lossless=True),
    "photo.jfif": saved(Image.fromarray(RGB), "JPEG", quality=100, exif=EXIF),
}
REFUSED = {
    "32.tif": saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
    "float.tif": saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "white.tif": saved(Image.fromarray(65535 - RAMP), "TIFF", tiffinfo={262: 0}),
    "photo.heic": content(b"\0\0\0\x18ftypheic" + bytes(64)),
    "photo.jxl": content(b"\xff\x0a" + bytes(64)),
}


@pytest.mark.parametrize("name", SAME)
def test_all_readers_see_the_same_ramp(tmp_path, name):
    SAME[name](tmp_path / name)
    for channels in (1, 3):
        image = open_images("folder", str(tmp_path), 64, channels)[0][0].astype(int)
        assert abs(image - GREY[..., None]).max() <= 2, name
    file = open_samples(zipped(tmp_path, tmp_path.with_suffix(".zip")))
    (image,) = next(file.batches(1))
    assert abs(image.astype(int) - GREY[..., None]).max() <= 2, name
    training = open_images("folder", str(tmp_path), 64, image.shape[-1])[0][0]
    assert (training == image).all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_by_name(tmp_path, name):
    REFUSED[name](tmp_path / name)
    with pytest.raises(UnreadableImagesError, match=f"1 image: .*{name}"):
        open_images("folder", str(tmp_path), 64, 3)[0]
    with pytest.raises(ValueError, match=f"cannot read .*{name}"):
        open_samples(tmp_path)


def test_the_list_of_suffixes_does_not_depend_on_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "EXTENSION", {})
    monkeypatch.setattr(Image, "ID", [])
    monkeypatch.setattr(Image, "OPEN", {})
    monkeypatch.setattr(Image, "preinit", lambda: None)
    monkeypatch.setattr(Image, "init", lambda: False)
    for suffix in SUFFIXES:
        (tmp_path / f"a{suffix}").write_bytes(b"nothing")
    images = open_images("folder", str(tmp_path), 8, 3)
    _, unreadable = images.readable(range(len(images)))
    assert len(unreadable) == len(SUFFIXES)
    assert {image.reason for image in unreadable} == {
        f"Pillow {PIL.__version__} cannot decode it: convert it to PNG or JPEG"
    }


def test_a_rotation_note_is_followed_by_no_one(tmp_path):
    """As in ADM, and as in earlier trainings."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    assert (open_images("folder", str(tmp_path), 64, 3)[0][0] == RGB).all()
    assert (next(open_samples(tmp_path).batches(1))[0] == RGB).all()


def test_grey_among_rgb(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "0.png")
    assert open_samples(tmp_path).image_shape == (64, 64, 1)
    Image.fromarray(RGB).save(tmp_path / "1.jpg")
    file = open_samples(tmp_path)
    assert file.image_shape == (64, 64, 3)
    assert (next(file.batches(2))[0] == RGB).all()


def test_samples_in_a_folder_are_those_of_an_npz(tmp_path, capsys):
    root = write_pictures(tmp_path / "samples", {"": 0})
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        (root / f"{number % 2}").mkdir(exist_ok=True)
        Image.fromarray(image).save(root / f"{number % 2}" / f"{number}.png")
    order = [*range(0, 9, 2), *range(1, 9, 2)]
    for path in (root, zipped(root, tmp_path / "a.zip")):
        file = open_samples(path)
        assert isinstance(file, PictureFiles)
        assert (file.count, file.image_shape, file.keys) == (9, (8, 8, 3), ("arr_0", "arr_1"))
        assert (np.concatenate([*file.batches(4)]) == pixels[order]).all()
        assert (np.concatenate([*file.batches(2, 3, 8)]) == pixels[order][3:8]).all()
        assert file.array("arr_1").tolist() == [0] * 5 + [1] * 4
        assert file.array("mu") is None
    Image.fromarray(pixels[0][:4]).save(root / "1" / "x.png")
    with pytest.raises(ValueError, match=r"1/x.png is 4x8x3 and the first image is 8x8x3"):
        [*open_samples(root).batches(99)]


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN"])
@pytest.mark.parametrize("other", ["val", "Valid", "validation", "TEST", "testing"])
def test_splits_in_any_spelling(tmp_path, train, other):
    write_pictures(tmp_path / train, {"cat": 1, "dog": 2})
    write_pictures(tmp_path / other, {"cat": 3, "owl": 1})
    files = image_files(tmp_path)
    assert (files.class_names, len(files)) == (("cat", "dog"), 3)


@pytest.mark.parametrize("splits", [("val", "test"), ("train", "Training")])
def test_splits_without_one_to_train_on_are_refused(tmp_path, splits):
    for split in splits:
        write_pictures(tmp_path / split, {"cat": 1})
    with pytest.raises(ValueError, match=f"the splits {', '.join(sorted(splits))}: name the one"):
        image_files(tmp_path)


def test_what_is_there_is_printed_by_rank_0(tmp_path, capsys, monkeypatch):
    root = write_pictures(tmp_path / "images", {f"class {number:02d}\x1b[2J": 1 for number in range(12)})
    for name in ("notes.txt", "class 00\x1b[2J/old.txt", "more.json"):
        (root / name).touch()
    files = image_files(root)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"images in {root}: 12; classes: 12 (class 00\\x1b[2J, ")
    assert line.endswith("class 09\\x1b[2J, ...); left out: 2 .txt, 1 .json")
    assert files.ignored == {".txt": 2, ".json": 1}
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    image_files(root)
    assert capsys.readouterr().out == ""


def edm(root: Path, labels: object, count: int = 6) -> Path:
    """A folder as EDM's dataset_tool writes it, here with 4 images a folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = root / f"{number // 4:05d}" / f"img{number:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


NAMES = [f"{number // 4:05d}/img{number:08d}.png" for number in range(6)]


@pytest.mark.parametrize("kind", ["folder", "zip", "wrapped zip"])
@pytest.mark.parametrize("count", [3, 6])
def test_dataset_json_is_where_labels_are(tmp_path, kind, count):
    numbers = [6, 2, 0, 6, 1, 2]
    root = edm(tmp_path / "edm", [[name, label] for name, label in zip(NAMES, numbers, strict=True)][::-1], count)
    prefix = "my/" if kind == "wrapped zip" else ""
    path = root if kind == "folder" else zipped(root, tmp_path / "a.zip", prefix)
    files = image_files(path)
    assert files.names == tuple(f"{prefix}{name}" for name in NAMES[:count])
    assert files.labels.tolist() == numbers[:count]
    assert files.class_names == tuple("0123456")  # those between count too, as in EDM
    assert files.ignored == {}


def test_dataset_json_without_labels_means_no_classes(tmp_path):
    files = image_files(edm(tmp_path, None))
    assert (files.class_names, files.labels.tolist()) == ((), [0] * 6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[name, 1] for name in NAMES[:5]], r"no label for 1 images such as 00001/img00000005\.png"),
        ([[name, -1] for name in NAMES], "the label -1: labels must be class numbers"),
        ([[name, 10**12] for name in NAMES], "labels must be class numbers"),
        ([[name, [0.5, 0.5]] for name in NAMES], "labels must be class numbers"),
        (["cat"], "no list of file names and labels"),
        (5, "no list of file names and labels"),
    ],
)
def test_wrong_labels_in_dataset_json_are_refused(tmp_path, labels, message):
    with pytest.raises(ValueError, match=rf"dataset\.json.* {message}"):
        image_files(edm(tmp_path, labels))


def test_another_dataset_json_is_a_file_like_others(tmp_path):
    root = write_pictures(tmp_path, {"cat": 1, "dog": 1})
    (root / "dataset.json").write_text('{"name": "pets"}')
    files = image_files(root)
    assert (files.class_names, files.ignored) == (("cat", "dog"), {".json": 1})


@pytest.mark.parametrize(
    ("folders", "order"),
    [
        (["10", "9", "0", "2"], ("0", "2", "9", "10")),
        (["007", "12", "3"], ("3", "007", "12")),
        (["10", "9", "b"], ("10", "9", "b")),
    ],
)
def test_folders_of_numbers_are_in_their_order(tmp_path, folders, order):
    """The order of images stays, and with it what is cached of them."""
    files = image_files(write_pictures(tmp_path, dict.fromkeys(folders, 1)))
    assert files.class_names == order
    assert [name.split("/")[0] for name in files.names] == sorted(folders)
    assert [order[label] for label in files.labels] == sorted(folders)


def test_zips_as_windows_and_others_write_them(tmp_path):
    """Backslashes, ./ in front, a name written twice, bytes in front of the ZIP, compression of every kind."""
    root = write_pictures(tmp_path / "images", {"cat": 1, "dog": 1})
    path = tmp_path / "a.zip"
    with open(path, "wb") as file:
        file.write(b"#!/bin/sh\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("cat\\000.png", b"old")
            archive.writestr("./dog/000.png", (root / "dog/000.png").read_bytes())
            with pytest.warns(UserWarning, match="Duplicate"):
                archive.writestr("cat\\000.png", (root / "cat/000.png").read_bytes())
    folder, images = (open_images("folder", str(path), 16, 3) for path in (root, path))
    assert images.class_names == ("cat", "dog")
    assert all((images[index][0] == folder[index][0]).all() for index in (0, 1))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.write(root / "cat/000.png", "000.png")
    with pytest.raises(ValueError, match=r"000\.png encrypted or in a rare compression: unpack it"):
        image_files(path)


def test_counts_that_disagree_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hold 4 images and 3 labels"):
        ImageArrays(np.zeros((4, 8, 8, 1), np.uint8), np.zeros(3, np.int64), ())
    header = bytes([0, 0, 8, 3]) + np.array([4, 28, 28], ">i4").tobytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + bytes(3 * 28 * 28))
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is damaged"):
        fashion_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + bytes(4 * 28 * 28))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + np.array([3], ">i4").tobytes() + bytes(3))
    with pytest.raises(ValueError, match="hold 4 images and 3 labels"):
        fashion_mnist(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_of_a_pictures_name_is_refused_and_not_waited_for(tmp_path):
    write_pictures(tmp_path, {"": 1})
    os.mkfifo(tmp_path / "pipe.png")
    images = open_images("folder", str(tmp_path), 8, 3)
    _, unreadable = images.readable(range(len(images)))
    assert [image.name for image in unreadable] == [f"{tmp_path}/pipe.png"]
