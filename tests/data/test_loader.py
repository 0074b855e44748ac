"""What a step sees is a function of (seed, images seen), whatever the ranks, workers, interruptions."""

import numpy as np
import pytest
import torch

from diffit.codec import PixelCodec
from diffit.data.augment import augment, draw_augmentation
from diffit.data.checked import unreadable_images
from diffit.data.datasets import ImageArrays, ImageDataset, PixelDataset, UnreadableImagesError, open_images
from diffit.data.files import ImageFiles
from diffit.data.loader import NoisyBatches, training_batches
from diffit.data.sampler import BatchSampler, Key, image_flips, image_order
from diffit.diffusion import GaussianDiffusion, create_diffusion
from diffit.diffusion.noise import RandomStream, keyed_generator
from diffit.system.ranks import World
from tests.data.pictures import cut_off, write_pictures, zipped

CPU = torch.device("cpu")
PROCESS: GaussianDiffusion = create_diffusion()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven pictures, so that epochs end inside batches."""
    return open_images("folder", str(write_pictures(tmp_path_factory.mktemp("images"), {"": 11})), 16, 3)


def sampler(batch_size=4, steps=range(9), **settings):
    return BatchSampler(11, batch_size, **{"seed": 5, "flip": True, "steps": steps} | settings)


def batches(images, sampler, workers=0, **settings):
    made = NoisyBatches(PixelDataset(images), num_classes=0, process=PROCESS, seed=5, label_dropout=0.5, **settings)
    return list(training_batches(made, sampler, workers, CPU))


def assert_equal(one, other):
    for a, b in zip(one[:3], other[:3], strict=True):
        assert torch.equal(a, b)
    assert one.conditions.keys() == other.conditions.keys()
    for name, value in one.conditions.items():
        assert torch.equal(value, other.conditions[name])


def test_every_epoch_is_a_fresh_permutation():
    order = image_order(3, 0, 33, 11).reshape(3, 11)
    assert (np.sort(order) == np.arange(11)).all()
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3
    assert (order.ravel() != image_order(4, 0, 33, 11)).any()


@pytest.mark.parametrize("draw", [image_order, image_flips])
def test_draws_depend_on_the_number_seen_alone(draw):
    whole = draw(3, 0, 40, 11)
    for count in (1, 3, 7):
        parts = [draw(3, first, min(count, 40 - first), 11) for first in range(0, 40, count)]
        assert (np.concatenate(parts) == whole).all()


def test_flips_are_fair_coins():
    flips = image_flips(0, 0, 20000, 1000)
    assert set(flips) == {0, 1}
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / 20000**0.5
    assert (flips[:1000] != flips[1000:2000]).any()  # an image is not mirrored in every epoch


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_what_one_sees(size):
    whole = sampler(8)
    parts = [sampler(8, rank=rank, world_size=size) for rank in range(size)]
    assert any(key.flip for key in whole.keys(0))
    for step in range(4):
        assert [key for part in parts for key in part.keys(step)] == whole.keys(step)


def test_ranks_draw_what_one_draws(images):
    """Noise, times, dropped labels and augmentation belong to the image that is seen."""
    whole = batches(images, sampler(8, range(3)), augment=0.5)
    parts = [batches(images, sampler(8, range(3), rank=rank, world_size=2), augment=0.5) for rank in (0, 1)]
    for one, first, second in zip(whole, *parts, strict=True):
        joined = type(one)(
            *(torch.cat(pair) for pair in zip(first[:3], second[:3], strict=True)),
            {name: torch.cat([first.conditions[name], second.conditions[name]]) for name in one.conditions},
        )
        torch.testing.assert_close(joined.x_start, one.x_start, rtol=0, atol=1e-6)  # resampling adds in another order
        assert_equal(joined._replace(x_start=one.x_start), one)


def test_workers_and_interruptions_change_nothing(images):
    """Against images that are cropped and mirrored one by one."""
    keys = sampler()
    expected = []
    for step in range(9):
        one_by_one = [images[key.image][0][:, :: -1 if key.flip else 1] for key in keys.keys(step)]
        expected.append(PixelCodec().encode(torch.from_numpy(np.stack(one_by_one))))
    assert any(key.flip for step in range(9) for key in keys.keys(step))
    whole = batches(images, keys)
    assert [torch.equal(batch.x_start, x) for batch, x in zip(whole, expected, strict=True)] == [True] * 9
    for workers, first in ((2, 0), (2, 6), (0, 3)):
        for step, batch in enumerate(batches(images, sampler(steps=range(first, 9)), workers), start=first):
            assert_equal(batch, whole[step])


def test_draws_are_those_of_the_image_seen(images):
    (_, batch) = batches(images, sampler(4, range(2)))
    for i, seen in enumerate(range(4, 8)):
        draw = keyed_generator(5, seen, RandomStream.CORRUPTION)
        assert batch.t[i] == PROCESS.draw_t(draw, 1)[0]
        assert batch.conditions["drop_label"][i] == (draw.random() < 0.5)
        assert (batch.noise[i].numpy() == draw.standard_normal((3, 16, 16), np.float32)).all()
    assert batch.conditions["y"].tolist() == [0] * 4


def test_augmented_images_come_with_what_was_done(images):
    (plain,), (changed,) = (batches(images, sampler(4, range(1)), augment=p) for p in (0.0, 1.0))
    assert plain.conditions.keys() == {"y", "drop_label"}
    draws = [keyed_generator(5, seen, RandomStream.CORRUPTION) for seen in range(4)]
    for draw in draws:
        PROCESS.draw_t(draw, 1)
        draw.random()
        draw.standard_normal((3, 16, 16), np.float32)
    done = draw_augmentation(draws, 1.0)
    assert torch.equal(changed.x_start, augment(plain.x_start, done))
    assert torch.equal(changed.conditions["augment_labels"], done.labels())


def test_labels_travel_with_their_images():
    pixels = np.arange(11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    labelled = ImageDataset(ImageArrays(pixels, np.arange(11) % 3, ("a", "b", "c")), 8, 1)
    made = NoisyBatches(PixelDataset(labelled), num_classes=3, process=PROCESS, seed=1, label_dropout=0.1)
    for batch in training_batches(made, sampler(5), 0, CPU):
        number = ((batch.x_start[:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(batch.conditions["y"], number % 3)


def test_an_unreadable_image_stops_with_one_sentence(tmp_path):
    root = write_pictures(tmp_path, {"cat": 6})
    cut_off(root / "cat" / "004.png")
    images = open_images("folder", str(root), 16, 3)
    keys = BatchSampler(6, 6, seed=0, flip=False, steps=range(1))
    with pytest.raises(UnreadableImagesError, match=r"cannot read 1 image: .*cat/004.png \(") as caught:
        batches(images, keys, workers=1)
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_found_and_left_out(tmp_path):
    root = write_pictures(tmp_path, {"cat": 3, "dog": 3})
    for name in ("cat/001.png", "dog/000.png"):
        cut_off(root / name)
    images = open_images("folder", str(root), 16, 3)
    unreadable = unreadable_images(images, 1, tmp_path, World())
    assert [image.index for image in unreadable] == [1, 3]
    data = PixelDataset(images, [1, 3])
    assert data.labels.tolist() == [0, 0, 1, 1]
    for key, index in enumerate((0, 2, 4, 5)):
        x_start, label = data[Key(key, False, 0)]
        assert torch.equal(x_start, PixelCodec().encode(torch.from_numpy(images[index][0])[None])[0])
        assert label == images[index][1]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_are_looked_at_once(tmp_path, monkeypatch, kind):
    root = write_pictures(tmp_path / "images", {"cat": 3, "dog": 3})
    mended = cut_off(root / "cat" / "001.png")
    looked = []
    decode = ImageFiles.picture
    monkeypatch.setattr(ImageFiles, "picture", lambda files, i: looked.append(files.names[i]) or decode(files, i))

    def check():
        path = root if kind == "folder" else zipped(root, tmp_path / "a.zip")
        looked.clear()
        found = unreadable_images(open_images("folder", str(path), 16, 3), 0, tmp_path / "run", World())
        return [image.index for image in found], list(looked)

    assert check() == ([1], ["cat/000.png", "cat/001.png", "cat/002.png", *(f"dog/00{i}.png" for i in range(3))])
    assert check() == ([1], ["cat/001.png"])
    mended.write_bytes((root / "cat" / "000.png").read_bytes())
    assert check() == ([], ["cat/001.png"])
    assert check() == ([], [])
