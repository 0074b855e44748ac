"""The validation loss: the training loss on held-out images, at times and noise that belong to each of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffit import load_model
from diffit.cli.train import parse_train
from diffit.codec import VAECodec
from diffit.config import CodecConfig
from diffit.data.datasets import FASHION_CLASSES, fashion_mnist
from diffit.diffusion import create_process
from diffit.diffusion.noise import RandomStream, keyed_generator
from tests.small_models import save_small_vae
from tests.training.runs import log_of, run

CHECKPOINT = "checkpoints/00000006/ema.safetensors"


def expected(checkpoint, images, numbers, codec=None):
    """Losses and times of these images, uint8 [N, H, W, C], one by one."""
    model, config = load_model(checkpoint)
    process, network = create_process(config.process_config), config.network
    losses, times = [], []
    for number in numbers:
        draw = keyed_generator(0, number, RandomStream.VALIDATION)
        t = torch.from_numpy(process.draw_t(draw, 1))
        shape = (1, network.in_channels, network.input_size, network.input_size)
        noise, posterior = (torch.from_numpy(draw.standard_normal(shape, np.float32)) for _ in range(2))
        image = torch.from_numpy(images.images[number][None])
        x = image.permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            x = codec.latents(codec.encode_moments(image), posterior) if codec else x
            y = torch.tensor([images.labels[number]])
            losses.append(process.training_losses(lambda x, t, y=y: model(x, t, y), x, t, noise).loss.item())
        times.append(t.item())
    return np.array(losses), np.array(times)


def validated(run_dir):
    return [line for line in log_of(run_dir) if "val_loss" in line]


def test_it_is_the_training_loss_of_the_first_ema_and_disturbs_nothing(flags, tmp_path):
    run(flags, tmp_path / "run", "--validation.every", "3", "--ema_decay", "[0.9, 0.2]", "--validation.images", "40")
    run(flags, tmp_path / "plain", "--ema_decay", "[0.9, 0.2]")
    found = validated(tmp_path / "run")
    assert [line["step"] for line in found] == [3, 6]
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == (tmp_path / "plain" / CHECKPOINT).read_bytes()
    images = fashion_mnist(flags[flags.index("--data.path") + 1], train=False)
    losses, times = expected(tmp_path / "run" / CHECKPOINT, images, [number * 70 // 40 for number in range(40)])
    assert found[1]["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    eighths = losses[np.argsort(times, kind="stable")].reshape(8, 5).mean(1)
    np.testing.assert_allclose([found[1][f"val_loss_{number}"] for number in range(1, 9)], eighths, rtol=1e-5)
    assert found[0]["val_loss"] != found[1]["val_loss"]


def test_a_resumed_run_and_another_seed_validate_alike(flags, tmp_path):
    """At learning rate 0 every step has the same weights, and so the same loss."""
    every = ["--validation.every", "2"]
    run(flags, tmp_path / "whole", *every)
    run(flags, tmp_path / "half", *every, "--steps", "4")
    run(flags, tmp_path / "half", *every)
    assert validated(tmp_path / "half") == validated(tmp_path / "whole")
    start = ["--init_from", str(tmp_path / "whole"), "--optimizer.lr", "0", "--seed", "7", "--steps", "4"]
    run(flags, tmp_path / "still", *every, *start)
    drop = {"step", "images"}
    still = [{key: value for key, value in line.items() if key not in drop} for line in validated(tmp_path / "still")]
    last = {key: value for key, value in validated(tmp_path / "whole")[-1].items() if key not in drop}
    assert len(still) == 2
    for line in still:
        assert line == pytest.approx(last, rel=1e-6)


def test_a_folder_is_held_out_and_its_classes_are_the_training_datas(flags, tmp_path):
    """Classes by name: the folder has two of them, in an order of its own."""
    images = fashion_mnist(flags[flags.index("--data.path") + 1], train=False)
    (bag, coat), folder = (FASHION_CLASSES.index(name) for name in ("Bag", "Coat")), tmp_path / "held_out"
    chosen = [number for wanted in (bag, coat) for number in np.flatnonzero(images.labels == wanted)]
    for number in chosen:
        path = folder / FASHION_CLASSES[images.labels[number]] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[number, ..., 0]).save(path)
    held_out = ["--validation.every", "6", "--validation.path", str(folder)]
    run(flags, tmp_path / "run", *held_out)
    subset = type(images)(images.images[chosen], images.labels[chosen], images.class_names)
    losses, _ = expected(tmp_path / "run" / CHECKPOINT, subset, range(len(chosen)))
    assert validated(tmp_path / "run")[0]["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)

    (folder / "Bag").rename(folder / "Basket")
    with pytest.raises(ValueError, match=r"--validation\.path have a class 'Basket'"):
        run(flags, tmp_path / "other", *held_out)
    path.write_bytes(b"no picture")
    (folder / "Basket").rename(folder / "Bag")
    with pytest.raises(ValueError, match=r"--validation\.path: cannot read 1 image: .*" + path.name):
        run(flags, tmp_path / "damaged", *held_out)


def test_latents_of_held_out_images_are_drawn_once_and_for_all(flags, tmp_path):
    vae = save_small_vae(tmp_path / "vae", channels=1)
    files = flags[flags.index("--data.path") + 1]
    network = "{hidden_size: 16, depth: 1, num_heads: 2, input_size: 16, in_channels: 4}"
    latent = ["--model", "Diffit-S", "--network", network, "--codec.vae", str(vae), "--codec.factor", "2"]
    run(
        [*latent, "--data.name", "fashion_mnist", "--data.path", files, "--device", "cpu", "--tracker", "none"],
        tmp_path / "run",
        *["--steps", "6", "--batch_size", "4", "--data.workers", "0", "--validation.every", "6"],
        *["--validation.images", "9"],
    )
    images = fashion_mnist(files, train=False)
    codec = VAECodec(CodecConfig(vae=str(vae), factor=2), torch.device("cpu"))
    losses, _ = expected(tmp_path / "run" / CHECKPOINT, images, [number * 70 // 9 for number in range(9)], codec)
    assert validated(tmp_path / "run")[0]["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_images_without_a_test_split_need_a_path(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_train(["--model", "Diffit", "--data.path", str(tmp_path), "--validation.every", "2"])
    assert "--validation.path" in capsys.readouterr().err
