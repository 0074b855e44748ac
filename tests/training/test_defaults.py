"""`python train.py --data.path my_images` alone: what follows from images and machine, once, and what is said of it."""

import numpy as np
import pytest
import yaml
from PIL import Image

from diffit.cli.train import main, parse_train
from diffit.config import PIXELS, STABILITY_VAE
from diffit.data.files import find_pictures
from diffit.system.files import as_tree
from diffit.training import defaults, loop
from diffit.training.defaults import choose_settings
from diffit.training.loop import train
from tests.conftest import ROOT
from tests.training.runs import begun, remembered, replaced

NARROW = "{channels: [8, 8], blocks: [1, 1], head_dim: 4, cond_dim: 8, window_size: 2, input_size: 8}"
QUICK = [*["--batch_size", "4", "--data.workers", "0", "--tracker", "none", "--device", "cpu"], "--network", NARROW]


def folder(root, names, mode="RGB", size=8, count=2):
    """Pictures of noise, `count` in each folder; the folder "" holds loose ones."""
    noise = np.random.default_rng(0)
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = noise.integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize(
    ("device", "size", "model"),
    [
        *[("cpu", size, "ImageDiffit-Small") for size in (8, 64, 200)],
        *[("mps", 200, "ImageDiffit-Small"), ("cuda", 32, "ImageDiffit-CIFAR10"), ("cuda", 64, "ImageDiffit-FFHQ64")],
        ("cuda", 200, "Diffit-S"),
    ],
)
def test_network_and_codec_follow_from_images_and_machine(device, size, model, at_hand, here, monkeypatch, capsys):
    monkeypatch.setattr(defaults, "vae_is_at_hand", lambda repo_id: at_hand)
    folder(here / "mine", "ab", size=size)
    config = parse_train(["--data.path", "mine"], device).config
    without_vae = model == "Diffit-S" and not at_hand
    assert config.model == ("ImageDiffit-FFHQ64" if without_vae else model)
    assert config.codec.vae == (STABILITY_VAE.format("ema") if config.model == "Diffit-S" else PIXELS)
    assert ("neither here nor can it be downloaded" in capsys.readouterr().err) == without_vae
    assert config.run_dir == "runs/mine"
    assert config.checkpoint_config(("a", "b"), "").network.num_classes == 2
    assert config.guidance.scale > 1
    other = "gaussian" if config.model == "Diffit-S" else "edm"
    assert parse_train(["--data.path", "mine", "--process", other], device).config.process == other


def test_named_models_recipes_and_codecs_stay_as_they_are(here):
    folder(here / "mine", "ab")
    assert parse_train(["--data.path", "mine", "--model", "Diffit-S"]).config.steps == 400_000
    recipe = ROOT / "configs" / "imagenet_256.yaml"
    assert parse_train(["--data.path", "mine", "--config", str(recipe)]).config.model == "Diffit"
    fashion = parse_train(["--data.path", "mine", "--codec.vae", "Diffit-Fashion-VAE"], "cpu").config
    network = fashion.checkpoint_config((), "").network
    assert (fashion.codec.factor, network.input_size, network.in_channels) == (4, 8, 4)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_say_whether_they_are_without_classes(recipe):
    network = parse_train(["--config", str(recipe)]).config.checkpoint_config(("a", "b"), "").network
    assert (network.num_classes == 0) == (recipe.stem in ("cifar10", "ffhq64"))


@pytest.mark.parametrize("mode", ["L", "RGB", "1", "I;16"])
def test_nothing_changes_its_kind_or_size_silently(mode, here, capsys):
    folder(here / "mine", "ab", "L" if mode == "I;16" else mode)
    if mode == "I;16":
        for path in here.glob("mine/*/*.png"):
            Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    grey = mode != "RGB"
    for channels in (None, 1, 3):
        flags = [] if channels is None else ["--network.in_channels", str(channels)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["train.py", "--data.path", "mine", "--dry_run", *flags])
            assert main() == 0
        dry = capsys.readouterr().out
        assert yaml.safe_load(dry)["network"]["in_channels"] == (channels or (1 if grey else 3))
        begun([], "run", "--data.path", "mine", *QUICK, "--network.input_size", "16", *flags)
        for said, side in ((dry, 32), (capsys.readouterr().out, 16)):
            assert f"resized to {side}x{side}" in said
            assert "sizes and kinds: 8x8 (4); " + ("grey (4)" if grey else "RGB (4)") in said
            assert ("RGB images are made grey" in said) == (channels == 1 and not grey)
            assert ("grey images are made RGB" in said) == (channels == 3 and grey)
        for path in (here / "run").glob("*"):
            path.unlink()


def test_classes_that_are_not_used_are_named(here, capsys, monkeypatch):
    folder(here / "mine", "ab")
    line = "the 2 classes of the images are not used: --network.num_classes is 0"
    monkeypatch.setattr("sys.argv", ["train.py", "--data.path", "mine", "--network.num_classes", "0", "--dry_run"])
    main()
    dry = capsys.readouterr().out
    assert line in dry
    assert yaml.safe_load(dry).keys().isdisjoint({"diffusion", "edm", "evaluation"})
    begun([], "run", "--data.path", "mine", *QUICK, "--network.num_classes", "0")
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(("names", "count"), [([""], 1), (["only"], 1), ([f"class {i}" for i in range(1000)], 1)])
def test_few_images_are_enough(names, count, here, capsys):
    folder(here / "my images", names, count=count)
    started = begun([], "my run", "--data.path", "my images", *QUICK)
    said = capsys.readouterr().out
    assert started.state.model.num_classes == (0 if names == [""] else len(names))
    assert "--model_path 'my run'" in said
    assert ("--class_labels 'class 0'" in said) == (len(names) > 1)


def test_a_run_keeps_what_was_chosen_on_another_machine(here):
    """Begun as if on a GPU and resumed as on a laptop: the same settings, and bit for bit the same steps."""
    folder(here / "mine", "ab", size=8)
    flags = ["--data.path", "mine", *QUICK, "--steps", "4", "--save_every", "2"]
    take = loop.train_step

    def stop_after_two(state, *others):
        if state.step == 2:
            raise RuntimeError("the machine is gone")
        return take(state, *others)

    first = parse_train(flags, "cuda")
    assert first.config.precision == "bf16"
    with replaced(loop, "train_step", stop_after_two), pytest.raises(RuntimeError, match="gone"):
        train(first)
    again = parse_train(["--data.path", "mine"], "cpu")
    assert again.config == first.config
    assert as_tree(again.config) == yaml.safe_load((here / "runs" / "mine" / "config.yaml").read_text())
    with remembered() as resumed:
        train(again)
    with remembered() as whole:
        train(parse_train([*flags, "--run_dir", "whole"], "cuda"))
    assert resumed == whole[2:]
    (here / "elsewhere").mkdir()
    folder(here / "elsewhere" / "mine", "ab")
    with pytest.raises(SystemExit):
        parse_train(["--data.path", "elsewhere/mine"])


def test_only_the_images_headers_are_read(here):
    folder(here / "mine", [""])
    (here / "mine" / "broken.png").write_bytes(b"nothing")
    chosen = choose_settings(find_pictures("mine"), {}, "cpu")
    assert chosen["network"] == {"in_channels": 3}
    assert "guidance.scale" not in chosen
