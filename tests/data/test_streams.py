"""What a step sees is a function of (seed, images seen), whatever the processes, workers, interruptions."""

import numpy as np
import pytest
import torch

from diffit.data.datasets import ImageArrays, Images, UnreadableImagesError, open_images
from diffit.data.order import Picks, Plan, image_flips, image_order
from diffit.data.streams import ImageReader, MemoryStream, WorkerStream, find_unreadable, image_stream
from tests.data.pictures import cut_off, write_pictures

CPU = torch.device("cpu")
WHOLE = slice(None)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eleven pictures, so that epochs end inside batches."""
    return open_images("folder", str(write_pictures(tmp_path_factory.mktemp("images"), {"": 11})), 16, 3)


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
def test_processes_share_what_one_sees(size):
    whole = Plan(5, 11, 8, WHOLE, flip=True)
    share = 8 // size
    parts = [Plan(5, 11, 8, slice(rank * share, (rank + 1) * share), flip=True) for rank in range(size)]
    for step in range(4):
        picks = [part.picks(step) for part in parts]
        assert np.concatenate([pick.index for pick in picks]).tolist() == whole.picks(step).index.tolist()
        assert np.concatenate([pick.flip for pick in picks]).tolist() == whole.picks(step).flip.tolist()


def test_workers_and_interruptions_change_nothing(images):
    """Against images that are cropped and mirrored one by one."""
    plan = Plan(5, 11, 4, slice(1, 4), flip=True)
    expected = {}
    for step in range(9):
        picks = plan.picks(step)
        one_by_one = [images.image(i)[:, :: -1 if f else 1] for i, f in zip(picks.index, picks.flip, strict=True)]
        expected[step] = torch.from_numpy(np.stack(one_by_one))
    assert any(plan.picks(step).flip.any() for step in expected)
    for workers, steps in ((0, range(9)), (2, range(9)), (2, (6, 7, 2, 3, 2))):
        stream = WorkerStream(ImageReader(images), plan, workers, CPU)
        for step in steps:
            assert torch.equal(stream[step], expected[step]), (workers, step)


def test_memory_gives_what_workers_give():
    pixels = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 1), dtype=np.uint8)
    images = Images(ImageArrays(pixels, np.zeros(11, np.int64), ()), 8, 1)
    for flip in (True, False):
        plan = Plan(1, 11, 5, WHOLE, flip)
        memory = image_stream(images, plan, 0, CPU)
        assert isinstance(memory, MemoryStream)
        for step in range(5):
            assert torch.equal(memory[step], ImageReader(images).read(plan.picks(step)))


def test_an_unreadable_image_stops_with_one_sentence(tmp_path):
    root = write_pictures(tmp_path, {"cat": 6})
    cut_off(root / "cat" / "004.png")
    images = open_images("folder", str(root), 16, 3)
    stream = WorkerStream(ImageReader(images), Plan(0, 6, 6, WHOLE, flip=False), 1, CPU)
    with pytest.raises(UnreadableImagesError, match=r"cannot read 1 image: .*cat/004.png \(") as caught:
        stream[0]
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_found_and_left_out(tmp_path):
    root = write_pictures(tmp_path, {"cat": 3, "dog": 3})
    for name in ("cat/001.png", "dog/000.png"):
        cut_off(root / name)
    images = open_images("folder", str(root), 16, 3)
    unreadable = find_unreadable(images, workers=1)
    assert [image.index for image in unreadable] == [1, 3]
    kept = images.keep(np.array([0, 2, 4, 5]))
    assert (len(kept), kept.labels.tolist()) == (4, [0, 0, 1, 1])
    assert (kept.image(2) == images.image(4)).all()
    assert (ImageReader(kept).read(Picks(np.arange(4), np.zeros(4, np.int64)))[3].numpy() == images.image(5)).all()
