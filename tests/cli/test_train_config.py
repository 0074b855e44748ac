"""train.py's command line: defaults that follow the model, what a run starts from, and what is refused before it."""

import re
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from diffit.checkpoint.resolve import find_checkpoint
from diffit.checkpoint.weights import save_checkpoint
from diffit.cli.train import check_data, parse_train
from diffit.config import PIXELS, STABILITY_VAE
from diffit.diffusion.config import DiffusionConfig, EDMConfig, SamplingConfig
from tests.conftest import ROOT
from tests.data.pictures import write_pictures
from tests.small_models import save_small_checkpoint, save_small_image_checkpoint

VAE = STABILITY_VAE.format("ema")


def train_config(line: str):
    return parse_train(line.split()).config


def refusal(line: str, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        parse_train(line.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("line", "process", "codec", "sampler"),
    [
        ("", "gaussian", (VAE, 8), ("ddpm", 250)),
        ("--model Diffit-S", "gaussian", (VAE, 8), ("ddpm", 250)),
        ("--model ImageDiffit-Tiny", "edm", (PIXELS, 1), ("heun", 18)),
        ("--model ImageDiffit-FFHQ64", "edm", (PIXELS, 1), ("heun", 40)),
        ("--model ImageDiffit-Tiny --network.input_size 64", "edm", (PIXELS, 1), ("heun", 40)),
        ("--model ImageDiffit-Tiny --process flow", "flow", (PIXELS, 1), ("euler", 50)),
        ("--model Diffit-S --process flow", "flow", (VAE, 8), ("euler", 50)),
        ("--model Diffit-S --process flow --sampling.sampler heun", "flow", (VAE, 8), ("heun", 50)),
        ("--model ImageDiffit-Tiny --sampling.num_sampling_steps 5", "edm", (PIXELS, 1), ("heun", 5)),
        ("--codec.vae Diffit-Fashion-VAE --codec.factor 4", "gaussian", ("Diffit-Fashion-VAE", 4), ("ddpm", 250)),
    ],
)
def test_a_model_knows_its_process(line, process, codec, sampler):
    config = train_config(line)
    assert config.process == process
    assert (config.codec.vae, config.codec.factor) == codec
    assert (config.sampling.sampler, config.sampling.num_sampling_steps) == sampler


def test_a_file_overrides_what_follows_from_the_model(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: ImageDiffit-Tiny\nprocess: flow\nsampling:\n  num_sampling_steps: 7\n")
    config = train_config(f"--config {recipe}")
    assert (config.process, config.codec.vae) == ("flow", PIXELS)
    assert (config.sampling.sampler, config.sampling.num_sampling_steps) == ("euler", 7)
    assert train_config(f"--config {recipe} --process edm").sampling.sampler == "heun"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--model ImageDiffit-Tiny --process gaussian", "needs --process edm or flow and a --codec.vae of pixels"),
        ("--model Diffit-S --process edm", "needs --process gaussian or flow and a --codec.vae of latents"),
        ("--model ImageDiffit-Tiny --codec.vae x/y", "needs --process edm or flow and a --codec.vae of pixels"),
        ("--network.depth many", "--network.depth must be a whole number, not many"),
        ("--network.deepness 3", "unknown network setting 'deepness' for Diffit"),
        ("--model ImageDiffit-Tiny --network.channels 3", "--network.channels must be one or more whole numbers"),
        ("--init_from Diffit-S", "no weights were released for Diffit-S: give yours with --init_from"),
        (
            "--init_from nowhere.safetensors",
            "there is no checkpoint file nowhere.safetensors: --init_from takes",
        ),
        ("--init_from Diffit-Fashion --model Diffit", "Diffit-Fashion holds Diffit-Fashion, not Diffit: drop --model"),
        ("--init_from Diffit --model ImageDiffit-Tiny", "nvidia/DiffiT/diffit_256.safetensors holds Diffit, not Im"),
        ("--init_from Diffit-Fashion --network.depth 3", "of depth 12 instead of 3: .* leave --network.depth out"),
        ("--init_from Diffit-Fashion --process flow", "of learn_sigma True instead of False: .* leave --process out"),
        ("--init_from Diffit-Fashion --codec.vae pixels", "gaussian or flow and a --codec.vae of latents"),
    ],
)
def test_refusals(line, words, capsys):
    error = refusal(line, capsys)
    assert re.search(words.replace("(", r"\("), error)
    assert "--model_path" not in error


def test_a_start_from_a_file_is_checked(tmp_path, capsys):
    latents, pixels = save_small_checkpoint(tmp_path, "vae"), save_small_image_checkpoint(tmp_path)
    assert "holds Diffit-S, not ImageD" in refusal(f"--model ImageDiffit-Tiny --init_from {latents}", capsys)
    assert "holds ImageDiffit-Tiny, not Diffit-S" in refusal(f"--model Diffit-S --init_from {pixels}", capsys)
    (tmp_path / "nameless.pt").write_bytes(b"something")
    error = refusal(f"--init_from {tmp_path / 'nameless.pt'}", capsys)
    assert "does not say which model it holds: name it with --model" in error


def test_names_and_released_weights_are_a_start():
    fashion = f"--config {ROOT / 'configs' / 'fashion_mnist.yaml'} --init_from Diffit-Fashion"
    assert train_config(fashion).init_from == "Diffit-Fashion"
    for name in ("Diffit", "nvidia/DiffiT"):  # of 256 pixels, for any resolution
        config = train_config(f"--init_from {name} --network.input_size 64")
        assert config.init_from == name
        assert config.checkpoint_config((), "").image_size == 512
        assert (config.guidance.scale, config.guidance.schedule) == (4.4, "power_cosine")


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_a_start_brings_its_settings_and_flags_override_them(tmp_path, kind):
    """Field by field of everything that a checkpoint says, but for names and number of classes."""
    latent = kind == "latent"
    small = save_small_checkpoint(tmp_path, "vae") if latent else save_small_image_checkpoint(tmp_path, num_classes=3)
    _, start = find_checkpoint(path=small)
    sampling = replace(start.sampling, num_sampling_steps=7, clip_denoised=latent, s_churn=0.0 if latent else 1.0)
    guidance = replace(start.guidance, scale=3.5, skip_below=0.0)
    nodes = {"diffusion": DiffusionConfig("squaredcos_cap_v2", 500), "edm": EDMConfig(sigma_max=70.0)}
    start = replace(start, sampling=sampling, guidance=guidance, **nodes)
    path = tmp_path / "start.safetensors"
    save_checkpoint(path, load_file(small), start)
    brought = train_config(f"--init_from {path}").checkpoint_config(("", "", ""), start.made_by)
    assert replace(brought, class_names=start.class_names) == start
    other = train_config(f"--init_from {path} --guidance.scale 2 --network.num_classes 5")
    assert (other.guidance, other.network["num_classes"]) == (replace(guidance, scale=2.0), 5)
    if kind == "image":
        assert train_config(f"--init_from {path} --process flow").sampling == SamplingConfig("euler", 50)


def test_data_are_asked_for_before_anything_is_loaded(tmp_path):
    """Unless a recipe brings them, or a folder of latents is there in their place."""
    with pytest.raises(ValueError, match=r"--data.path FOLDER_OR_ZIP; or take a recipe .* configs/debug.yaml"):
        check_data(train_config(f"--run_dir {tmp_path / 'run'}"))
    with pytest.raises(FileNotFoundError, match=r"there are no images at .*nowhere: check --data.path"):
        check_data(train_config(f"--data.path {tmp_path / 'nowhere'}"))
    check_data(train_config(f"--data.path {write_pictures(tmp_path / 'mine', {'': 1})}"))
    for images in ("", f"--config {ROOT / 'configs/imagenet_256.yaml'}", f"--data.path {tmp_path / 'nowhere'}"):
        check_data(train_config(f"{images} --data.cache {tmp_path}"))
    with pytest.raises(ValueError, match="name the images"):
        check_data(train_config(f"--model ImageDiffit-Tiny --data.cache {tmp_path}"))
    for recipe in ("debug", "fashion_mnist", "fashion_mnist_flow", "fashion_mnist_image", "cifar10"):
        check_data(train_config(f"--config {ROOT / 'configs' / recipe}.yaml"))
