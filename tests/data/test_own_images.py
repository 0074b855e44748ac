"""train.py on a user's own images: classes are counted, or there are none, and mistakes are one sentence."""

import shutil

import pytest
import torch

from diffit import load_model
from diffit.cli.train import parse_train
from diffit.codec import create_codec
from diffit.data.loader import open_training_set
from diffit.data.sampler import Key
from diffit.system.distributed import World
from diffit.training.config import TrainConfig
from diffit.training.loop import train
from tests.data.pictures import write_pictures
from tests.small_models import save_small_vae

LATENT = "--model Diffit-S --network.input_size 8 --network.hidden_size 16 --network.depth 1 --network.num_heads 2"
PIXELS = "--model ImageDiffit-Tiny --network.input_size 16 --process edm --codec.vae pixels --sampling.sampler heun"
SHORT = "--batch_size 4 --steps 1 --device cpu --precision fp32 --data.workers 0"


def run(folder, settings, data, *more):
    flags = [*settings.split(), *SHORT.split(), "--data.path", str(data), "--run_dir", str(folder / "run"), *more]
    return load_model(train(parse_train(flags)))[1]


@pytest.fixture
def latent(tmp_path):
    return f"{LATENT} --codec.factor 2 --codec.vae {save_small_vae(tmp_path / 'vae')}"


def test_classes_are_those_of_the_data(tmp_path, latent):
    trained = run(tmp_path, latent, write_pictures(tmp_path / "images", {"cat": 3, "dog": 2, "owl": 2}))
    assert (trained.network.num_classes, trained.class_names) == (3, ("cat", "dog", "owl"))


def test_a_flat_folder_makes_an_unconditional_model(tmp_path, latent):
    trained = run(tmp_path, latent, write_pictures(tmp_path / "images", {"": 5}))
    assert (trained.network.num_classes, trained.class_names) == (0, ())


def test_pixels_of_a_folder(tmp_path):
    images = write_pictures(tmp_path / "images", {"cat": 3, "dog": 2})
    trained = run(tmp_path / "with", f"{PIXELS} --codec.factor 1", images)
    assert (trained.network.num_classes, trained.class_names) == (2, ("cat", "dog"))  # of every size
    trained = run(tmp_path / "without", f"{PIXELS} --codec.factor 1 --network.num_classes 0", images)
    assert (trained.network.num_classes, trained.class_names) == (0, ())


def test_a_label_beyond_the_classes_is_refused(tmp_path):
    images = write_pictures(tmp_path / "images", {"cat": 3, "dog": 2, "owl": 1})
    with pytest.raises(ValueError, match="the data has a label 2, but the network has 2 classes"):
        run(tmp_path, f"{PIXELS} --codec.factor 1 --network.num_classes 2", images)


def test_a_run_that_began_with_another_order_of_classes_keeps_it(tmp_path, latent, monkeypatch):
    """Folders of numbers were once sorted as texts. Latents and pixels, whose order is read anew at every start."""
    images = write_pictures(tmp_path / "images", {"10": 1, "9": 2, "0": 3})
    for number, settings in enumerate((latent, f"{PIXELS} --codec.factor 1 --network.num_classes 3")):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr("diffit.data.files.are_numbers", lambda names: False)
            assert run(folder, settings, images).class_names == ("0", "10", "9")
        cache = folder / "run" / "cache"
        if cache.exists():  # encoded again, by today's order
            shutil.rmtree(cache)
        assert run(folder, settings, images, "--steps", "2").class_names == ("0", "10", "9")
        config = parse_train([*settings.split(), "--data.path", str(images)]).config
        codec = create_codec(config.codec, torch.device("cpu"))
        data = open_training_set(config.data, codec, 16, 3, seed=0, run_dir=folder / "run", world=World())
        assert data.class_names == ("0", "10", "9")
        assert data.labels.tolist() == [0] * 3 + [1] + [2] * 2
        assert data[Key(3, False, 0)][1] == 1


def test_more_classes_than_the_data_has_are_allowed():
    config = TrainConfig(model="Diffit-S", network={"num_classes": 12})
    assert config.checkpoint_config(("cat", "dog"), "").network.num_classes == 12
