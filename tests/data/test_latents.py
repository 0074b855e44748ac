"""Latent caches: what is in them, who may use them, and what becomes of them when something breaks."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from diffit.cli.encode import main
from diffit.codec import CodecConfig, VAECodec
from diffit.data.config import DataConfig, ImagesConfig
from diffit.data.datasets import UnreadableImagesError, open_images
from diffit.data.encode import encode_images
from diffit.data.latent_cache import MANIFEST, LatentDataset, open_cache
from diffit.data.loader import NoisyBatches, open_training_set, training_batches
from diffit.data.sampler import BatchSampler
from diffit.diffusion import create_diffusion
from diffit.diffusion.noise import RandomStream, keyed_generator
from diffit.system.distributed import World
from tests.conftest import ROOT
from tests.data.pictures import cut_off, write_pictures, zipped
from tests.small_models import save_small_vae

CPU = torch.device("cpu")
CLASSES = {"cat": 5, "dog": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latents")


@pytest.fixture(scope="module")
def vae(folder):
    return save_small_vae(folder / "vae")


@pytest.fixture(scope="module")
def codec(vae):
    return VAECodec(CodecConfig(vae, 2), CPU)


@pytest.fixture(scope="module")
def pictures(folder):
    return write_pictures(folder / "images", CLASSES)


@pytest.fixture(scope="module")
def cache(folder, pictures, codec):
    """Eleven images in shards of 4, 4 and 3."""
    return encode(open_images("folder", str(pictures), 16, 3), codec, folder / "cache")


def encode(images, codec, folder, flip=True, world=None, **settings):
    config = ImagesConfig(**{"workers": 0} | settings)
    return encode_images(images, codec, folder, config, flip=flip, world=world or World(), shard_size=4)


def load(cache):
    """All moments, [N, F, 2c, h, w]."""
    return torch.cat([torch.from_numpy(np.load(cache.folder / shard.file)) for shard in cache.shards if shard.count])


def command(pictures, vae, out, *more):
    settings = ["--vae", vae, "--image_size", "16", "--shard_size", "4", "--device", "cpu", "--data.workers", "1"]
    return [*("-m", "diffit.data.encode", "--data.path", str(pictures), "--out", str(out)), *settings, *more]


def environment():
    """With as many threads as here: sums of other numbers of threads differ in the last bit."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.inference_mode()
def test_moments_are_the_vaes(cache, codec, pictures):
    """Within float16's half unit in the last place of what the VAE says of each image and its mirror image."""
    images = open_images("folder", str(pictures), 16, 3)
    stored = load(cache)
    assert stored.shape == (11, 2, 8, 8, 8)
    for index in range(11):
        pixels = torch.from_numpy(images[index][0])[None]
        for flip, seen in enumerate((pixels, pixels.flip(2))):
            torch.testing.assert_close(
                stored[index, flip].float(), codec.encode_moments(seen)[0], rtol=2**-11, atol=1e-6
            )
    assert (stored[:, 0] != stored[:, 1]).any()
    assert (cache.class_names, cache.labels.tolist()) == (("cat", "dog"), [0] * 5 + [1] * 6)


def test_the_manifest_says_what_it_is(cache, codec, vae):
    tree = json.loads((cache.folder / MANIFEST).read_text())
    settings = tree["settings"]
    assert (settings["vae"], settings["weights"]) == (vae, codec.weights_hash())
    assert (settings["scaling_factor"], settings["image_size"], settings["flips"]) == (0.18215, 16, 2)
    assert [shard["count"] for shard in tree["shards"]] == [4, 4, 3]
    assert sorted(contents(cache.folder)) == [
        *("labels.npy", "manifest.json", "shard-00000.npy", "shard-00001.npy", "shard-00002.npy")
    ]
    assert np.load(cache.folder / "shard-00002.npy").dtype == np.float16
    cache.verify()


def test_draws_are_from_the_posterior(cache, codec):
    """latents = (mean + deviation * noise) * factor, with the noise of the image seen; whichever rank and worker."""
    keys = BatchSampler(11, 6, seed=2, flip=True, steps=range(4), rank=1, world_size=2)
    batches = NoisyBatches(LatentDataset(cache, codec, 2), 2, create_diffusion(), 2, 0.1)
    stored = load(cache).float()
    for workers in (0, 2):
        for step, batch in enumerate(training_batches(batches, keys, workers, CPU)):
            expected = []
            for image, flip, seen in keys.keys(step):
                assert seen in range(6 * step + 3, 6 * step + 6)
                mean, log_variance = stored[image, int(flip)].chunk(2)
                noise = keyed_generator(2, seen, RandomStream.POSTERIOR).standard_normal((4, 8, 8), np.float32)
                expected.append((mean + (log_variance / 2).exp() * torch.from_numpy(noise)) * 0.18215)
            torch.testing.assert_close(batch.x_start, torch.stack(expected))
            assert batch.conditions["y"].tolist() == [cache.labels[key.image] for key in keys.keys(step)]


def test_a_zip_makes_the_same_cache(cache, codec, pictures, tmp_path):
    archive = open_images("folder", str(zipped(pictures, tmp_path / "a.zip")), 16, 3)
    encode(archive, codec, tmp_path / "cache", workers=1)
    assert contents(tmp_path / "cache") == contents(cache.folder)


def test_two_processes_make_the_same_cache(cache, vae, pictures, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = run(*launcher, *command(pictures, vae, tmp_path / "cache", "--verify", "true"))
    assert "11 images in 2 classes, with mirror images" in result.stdout, result.stderr
    assert contents(tmp_path / "cache") == contents(cache.folder)


def test_killed_and_run_again_makes_the_same_cache(cache, vae, pictures, tmp_path):
    """kill -9 as soon as the first shard is there."""
    out = tmp_path / "cache"
    arguments = [sys.executable, *command(pictures, vae, out)]
    process = subprocess.Popen(arguments, env=environment(), stderr=subprocess.DEVNULL)
    while not (out / "shard-00000.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / MANIFEST).exists()
    kept = (out / "shard-00000.npy").stat()
    (out / "shard-00002.npy.123.part").write_bytes(b"half")
    result = run(*command(pictures, vae, out))
    assert result.returncode == 0, result.stderr
    assert (out / "shard-00000.npy").stat().st_mtime_ns == kept.st_mtime_ns
    assert contents(out) == contents(cache.folder)


def test_an_unfinished_cache_is_no_cache(cache, codec, pictures, tmp_path):
    with pytest.raises(ValueError, match="holds no finished latent cache"):
        open_cache(tmp_path)


def test_damage_is_found_and_only_it_is_made_anew(cache, codec, pictures, tmp_path):
    images = open_images("folder", str(pictures), 16, 3)
    copy = encode(images, codec, tmp_path / "cache")
    shard = copy.folder / "shard-00001.npy"
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of 3 shards .* damaged \(shard-00001.npy\): delete them"):
        open_cache(copy.folder).verify()
    shard.unlink()
    (copy.folder / "labels.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 files .* missing or damaged \(shard-00001.npy, labels.npy\)"):
        open_cache(copy.folder)
    untouched = (copy.folder / "shard-00000.npy").stat().st_mtime_ns
    encode(images, codec, copy.folder).verify()
    assert contents(copy.folder) == contents(cache.folder)
    assert (copy.folder / "shard-00000.npy").stat().st_mtime_ns == untouched
    cut_off(copy.folder / "shard-00000.npy")
    with pytest.raises(ValueError, match=r"1 files .* \(shard-00000.npy\)"):
        open_cache(copy.folder)
    (copy.folder / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="is damaged or of another version"):
        open_cache(copy.folder)
    with pytest.raises(ValueError, match=r"manifest.json is damaged: delete .* and encode again"):
        encode(images, codec, copy.folder)


def test_other_caches_are_refused(cache, codec, pictures, tmp_path):
    other = VAECodec(CodecConfig(save_small_vae(tmp_path / "vae", layers_per_block=2), 2), CPU)
    with pytest.raises(ValueError, match=r"were made with the VAE .*/vae \(weights .*\), not .*: set --codec.vae"):
        cache.check(other, 16, flip=True)
    with pytest.raises(ValueError, match="are of images of 16x16, but the network wants 32x32"):
        cache.check(codec, 32, flip=True)
    images = open_images("folder", str(pictures), 16, 3)
    plain = encode(images, codec, tmp_path / "plain", flip=False)
    assert load(plain).shape == (11, 1, 8, 8, 8)
    plain.check(codec, 16, flip=False)
    with pytest.raises(ValueError, match=r"hold no mirror images: add --data\.flip False"):
        plain.check(codec, 16, flip=True)
    with pytest.raises(ValueError, match=r"made with other settings \(flips: 1, now 2\)"):
        encode(images, codec, tmp_path / "plain")


def test_the_same_vae_under_another_name_is_the_same(cache, codec, vae, pictures, tmp_path):
    (tmp_path / "alias").symlink_to(vae)
    alias = VAECodec(CodecConfig(str(tmp_path / "alias"), 2), CPU)
    cache.check(alias, 16, flip=True)
    assert encode(open_images("folder", str(pictures), 16, 3), alias, cache.folder).settings.vae == vae


def test_unreadable_images_are_named_then_left_out_if_asked(codec, tmp_path):
    root = write_pictures(tmp_path / "images", CLASSES)
    for name in ("cat/001.png", "dog/004.png"):
        cut_off(root / name)
    images = open_images("folder", str(root), 16, 3)
    with pytest.raises(UnreadableImagesError, match=r"cannot read 2 images: .*cat/001.png \(.*dog/004.png \("):
        encode(images, codec, tmp_path / "cache")
    assert not (tmp_path / "cache" / MANIFEST).exists()
    cache = encode(images, codec, tmp_path / "cache", skip_unreadable=True)
    assert [image.name for image in cache.unreadable] == [f"{root}/cat/001.png", f"{root}/dog/004.png"]
    assert cache.labels.tolist() == [0] * 4 + [1] * 5
    whole = write_pictures(tmp_path / "whole", CLASSES)
    (whole / "cat" / "001.png").unlink()
    (whole / "dog" / "004.png").unlink()
    expected = load(encode(open_images("folder", str(whole), 16, 3), codec, tmp_path / "expected")).float()
    torch.testing.assert_close(load(cache).float(), expected, rtol=1e-3, atol=1e-3)


def test_mended_images_are_encoded(cache, codec, pictures, tmp_path):
    root = write_pictures(tmp_path / "images", CLASSES)
    mended = (root / "dog" / "005.png").read_bytes()
    cut_off(root / "dog" / "005.png")
    images = open_images("folder", str(root), 16, 3)
    with pytest.raises(UnreadableImagesError):
        encode(images, codec, tmp_path / "cache")
    (root / "dog" / "005.png").write_bytes(mended)
    encode(images, codec, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(cache.folder)


def test_nothing_but_unreadable_images(codec, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImagesError, match="3 images"):
        encode(open_images("folder", str(tmp_path), 16, 3), codec, tmp_path / "cache", skip_unreadable=True)


def test_training_makes_finds_and_needs_only_the_cache(cache, codec, pictures, tmp_path, capsys):
    def prepare(**settings):
        config = DataConfig(**{"workers": 0} | settings)
        return open_training_set(config, codec, 16, 4, seed=0, run_dir=tmp_path / "run", world=World())

    made = prepare(path=str(pictures))
    assert (tmp_path / "run" / "cache" / MANIFEST).exists()
    assert made.class_names == ("cat", "dog")
    assert len(prepare().labels) == 11
    assert len(prepare(cache=str(cache.folder), flip=False).labels) == 11  # of other shards, and with both flips
    assert len(prepare(path="imagenet/train", cache=str(cache.folder)).labels) == 11  # as a recipe names it
    assert "there are no images at imagenet/train: the latents in" in capsys.readouterr().out
    others = write_pictures(tmp_path / "others", {"bird": 2})
    with pytest.raises(ValueError, match="are of other images"):
        prepare(path=str(others))
    with pytest.raises(ValueError, match="name the images"):
        prepare(cache=str(tmp_path / "nowhere"))


def test_errors_of_the_command_are_one_line(vae, tmp_path, monkeypatch, capsys):
    root = write_pictures(tmp_path / "images", {"": 2})
    cut_off(root / "001.png")
    for arguments, words in (
        (command(root, vae, tmp_path / "cache"), "cannot read 1 image: "),
        (command(tmp_path / "nowhere", vae, tmp_path / "cache"), "there are no images at"),
        (["-m", "diffit.data.encode", "--data.path", str(root)], "say where the latents go"),
        (
            command(root, vae, tmp_path / "cache", "--data.nmae", "folder"),
            "there is no setting --data.nmae: did you mean",
        ),
    ):
        monkeypatch.setattr(sys, "argv", arguments[1:])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {words}")
