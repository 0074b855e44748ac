"""The image-space model from recipe to samples: published settings, resume, what a sample depends on, refusals."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from diffit.cli.sample import parse_sample
from diffit.cli.train import parse_train
from diffit.data.datasets import cifar10
from diffit.models.config import model_config
from diffit.sampling.folder import SampleFolder
from diffit.sampling.generate import generate
from diffit.training.loop import train
from tests.conftest import ROOT
from tests.data.pictures import write_pictures, zipped
from tests.small_models import save_small_image_checkpoint, write_cifar10_files

NARROW = {"cifar10": "channels: [16, 32], blocks: [1, 1]", "ffhq64": "channels: [8, 16, 16, 16]"}
LOGGED = ("step", "images", "lr", "loss", "grad_norm")


def small_run(recipe, dropout, run_dir, *more):
    """A published recipe with a narrow network, small batches and few steps; all else is as published."""
    flags = ["--config", str(ROOT / "configs" / f"{recipe}.yaml")]
    flags += ["--network", f"{{{NARROW[recipe]}, head_dim: 8, cond_dim: 32, dropout: {dropout}, num_classes: 0}}"]
    small = "--batch_size 8 --steps 4 --save_every 2 --log_every 1 --precision fp32 --device cpu --optimizer.warmup 2"
    return train(parse_train([*flags, *small.split(), "--run_dir", str(run_dir), *more]))


def log_of(run_dir):
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [[line[key] for key in LOGGED] for line in lines]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield ["--data.path", str(write_cifar10_files(tmp_path_factory.mktemp("cifar"), patch))]


@pytest.fixture(scope="module")
def cifar_run(cifar, tmp_path_factory):
    """The weights that a short run of configs/cifar10.yaml leaves behind."""
    return small_run("cifar10", 0.13, tmp_path_factory.mktemp("run"), *cifar)


PUBLISHED = {  # batch, rate, ramp in steps, augmentation, dropout, blocks, window, Heun steps
    "cifar10": (512, 1e-3, 19531, 0.12, 0.13, (2, 2, 2), 4, 18),
    "ffhq64": (256, 2e-4, 39063, 0.15, 0.05, (1, 2, 2, 2), 8, 40),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_as_published(name):
    config = parse_train(["--config", str(ROOT / "configs" / f"{name}.yaml")]).config
    network = model_config(config.model, **config.network)
    optimizer, steps = config.optimizer, config.sampling.num_sampling_steps
    ours = (config.batch_size, optimizer.lr, optimizer.warmup, config.data.augment, network.dropout)
    assert (*ours, network.blocks, network.window_size, steps) == PUBLISHED[name]
    assert (config.process, config.sampling.sampler, config.codec.vae) == ("edm", "heun", "pixels")
    assert (config.steps, config.ema_half_life, optimizer.schedule) == (200_000, 500_000, "constant")
    assert (network.num_classes, optimizer.betas, optimizer.weight_decay) == (0, (0.9, 0.999), 0)


def test_a_cifar10_run_resumes_bit_for_bit(cifar, cifar_run, tmp_path):
    """With dropout and augmentation on."""
    small_run("cifar10", 0.13, tmp_path, *cifar)
    shutil.rmtree(tmp_path / "checkpoints" / "00000004")
    resumed = small_run("cifar10", 0.13, tmp_path, *cifar)
    assert resumed.read_bytes() == cifar_run.read_bytes()
    assert log_of(tmp_path) == log_of(cifar_run.parents[2])
    assert [line[0] for line in log_of(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("pack", [lambda folder: folder, lambda folder: zipped(folder, folder.with_suffix(".zip"))])
def test_an_ffhq64_run(tmp_path, pack):
    """A folder or ZIP of pictures through the recipe, bit-equal after a resume, to samples of 64 pixels."""
    data = ["--data.path", str(pack(write_pictures(tmp_path / "faces", {"": 12}))), "--data.workers", "0"]
    whole = small_run("ffhq64", 0.05, tmp_path / "whole", *data, "--steps", "3")
    small_run("ffhq64", 0.05, tmp_path / "again", *data, "--steps", "3")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "00000003")
    resumed = small_run("ffhq64", 0.05, tmp_path / "again", *data, "--steps", "3")
    assert resumed.read_bytes() == whole.read_bytes()
    task = parse_sample(f"--model_path {whole} --num_samples 2 --device cpu --log_dir {tmp_path / 'out'}".split())
    assert task.config.sampling.num_sampling_steps == 40
    with np.load(generate(task)) as samples:
        assert samples["arr_0"].shape == (2, 64, 64, 3)
        assert samples["arr_0"].std() > 5


def test_dropout_and_augmentation_act(cifar, cifar_run, tmp_path):
    """The head starts at zero, so that dropout is seen from the second step on; augmentation is at once."""
    small_run("cifar10", 0.0, tmp_path / "no dropout", *cifar)
    small_run("cifar10", 0.13, tmp_path / "no augmentation", *cifar, "--data.augment", "0")
    both, no_dropout, no_augmentation = (
        [line[3] for line in log_of(run)]
        for run in (cifar_run.parents[2], tmp_path / "no dropout", tmp_path / "no augmentation")
    )
    assert no_dropout[0] == both[0]
    assert no_dropout[2] != both[2]
    assert no_augmentation[0] != both[0]


def test_a_checkpoint_needs_no_flag_but_its_path(cifar_run, tmp_path):
    """sample.py does what the checkpoint says: 18 Heun steps, no guidance, pixels; 3 channels, and no labels."""
    command = [sys.executable, str(ROOT / "sample.py"), "--model_path", str(cifar_run)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    folder = tmp_path / "logs" / "ImageDiffit-CIFAR10"
    with np.load(folder / "samples_16x32x32x3.npz") as samples:
        assert (samples["arr_0"].shape, samples["arr_0"].dtype) == ((16, 32, 32, 3), np.uint8)
        assert samples.files == ["arr_0"]
        assert (samples["arr_0"].std((1, 2, 3)) > 5).all()
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    assert (settings["process"], settings["sampling"]["sampler"]) == ("edm", "heun")
    assert (settings["sampling"]["num_sampling_steps"], settings["guidance"]["scale"]) == (18, 1.0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random networks without and with classes, by their number."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {count: save_small_image_checkpoint(folder, num_classes=count) for count in (0, 3)}


@pytest.fixture
def sample(checkpoints, tmp_path):
    """Runs sample.py's work with some flags in this process; returns (images, labels)."""
    count = iter(range(100))

    def run(flags="", classes=0):
        folder = tmp_path / str(next(count))
        task = parse_sample(f"--model_path {checkpoints[classes]} --device cpu --log_dir {folder} {flags}".split())
        with np.load(generate(task)) as file:
            return file["arr_0"].astype(int), file.get("arr_1")

    return run


def test_pixels_that_were_truncated_are_not_gone_on_with(checkpoints, tmp_path):
    """As older versions did it, whose manifests do not say so; nor are they left for those of now."""
    folder = tmp_path / "out"
    task = parse_sample(f"--model_path {checkpoints[3]} --num_samples 2 --device cpu --log_dir {folder}".split())
    with np.load(generate(task)) as file:
        images, labels = file["arr_0"], file["arr_1"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"].pop("conversion") == "rounded"
    older = SampleFolder(folder, 2)
    older.write_manifest(manifest | {"complete": False})
    with pytest.raises(ValueError, match=r"other settings \(conversion: truncated, now rounded\): choose another"):
        generate(task)
    next(folder.glob("samples_*.npz")).unlink()
    older = SampleFolder(folder, 2, older.prepare(manifest["settings"], overwrite=False))
    older.add(0, images[:1], labels[:1])
    with pytest.raises(ValueError, match=r"other settings \(conversion: truncated, now rounded\): choose another"):
        generate(task)


CHURN = "--sampling.s_churn 40 --sampling.s_min 0.05 --sampling.s_max 50 --sampling.s_noise 1.003"


@pytest.mark.parametrize("churn", ["", CHURN])
def test_a_sample_depends_on_seed_and_number_alone(sample, churn):
    """Not on batch size (but for rounding: one grey level in at most one value of 1000) or how many there are."""
    together = sample(f"--num_samples 5 --batch_size 5 {churn}")[0]
    np.testing.assert_array_equal(together, sample(f"--num_samples 5 --batch_size 5 {churn}")[0])
    apart = np.abs(together[:3] - sample(f"--num_samples 3 --batch_size 2 {churn}")[0])
    assert (apart > 0).mean() < 1e-3
    assert apart.max() <= 1
    assert (together != sample(f"--num_samples 5 --batch_size 5 --seed 1 {churn}")[0]).mean() > 0.5


@pytest.mark.parametrize("change", ["s_churn 1", "s_min 1", "s_max 1", "s_noise 1.1", "num_sampling_steps 7"])
def test_every_setting_of_heun_acts(sample, change):
    flags = f"--num_samples 2 --sampler heun {CHURN}"
    plain = sample(flags)[0]
    changed = sample(f"{flags} --sampling.{change}")[0]
    assert (plain != changed).mean() > 0.1


def test_without_churn_no_other_churn_setting_matters(sample):
    flags = "--num_samples 2 --sampling.s_min 1 --sampling.s_max 2 --sampling.s_noise 1.5"
    np.testing.assert_array_equal(sample("--num_samples 2")[0], sample(flags)[0])


def test_classes_and_guidance(sample):
    images, labels = sample("--num_samples 3 --class_labels 2 dog", classes=3)
    assert labels.tolist() == [2, 1, 2]
    plain = sample("--num_samples 3 --class_labels 2 dog --cfg_cond False", classes=3)[0]
    assert (images != plain).mean() > 0.1
    np.testing.assert_array_equal(plain, sample("--num_samples 3 --class_labels 2 dog --cfg_scale 1", classes=3)[0])
    unconditional, no_labels = sample("--num_samples 3 --class_cond False", classes=3)
    assert no_labels is None
    assert (unconditional != plain).mean() > 0.1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sampler ddpm", "the ddpm sampler does not fit the edm process: choose heun"),
        ("--sampling.s_churn -1", "s_churn must be between 0 and 1e+06, not -1.0"),
        ("--sampling.s_min -0.1", "s_min must be between 0 and 1e+12"),
        ("--sampling.s_noise -1", "s_noise must be between 0 and"),
        ("--sampling.s_min 3 --sampling.s_max 2", "s_max must be at least 3.0, not 2.0"),
        ("--sampling.eta 0.5", "the heun sampler of the edm process does not read --sampling.eta: leave it out"),
        ("--clip_denoised True", "heun sampler of the edm process does not read --sampling.clip_denoised"),
        ("--guidance.schedule power_cosine", "has no timesteps"),
        ("--process gaussian", "was trained for the edm process"),
        ("--vae somewhere", "leave --vae out"),
        ("--class_labels 1", "knows no classes: leave --class_labels out"),
    ],
)
def test_refusals(checkpoints, flags, words, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_sample(["--model_path", str(checkpoints[0]), *flags.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ")
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_steps_that_are_no_number_are_refused(sample):
    with pytest.raises(ValueError, match="of heun must be a whole number, not 'ddim50'"):
        sample("--num_sampling_steps ddim50")


def test_classes_need_conditional_sampling(checkpoints, capsys):
    with pytest.raises(SystemExit):
        parse_sample(f"--model_path {checkpoints[3]} --class_labels 1 --class_cond False".split())
    assert "leave it or --class_labels out" in capsys.readouterr().err


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # where nobody listens
    with pytest.raises(ValueError, match=r"CIFAR-10 cannot be downloaded .*: check the network") as caught:
        cifar10()
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="does not hold CIFAR-10"):
        cifar10(tmp_path)
