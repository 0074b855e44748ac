"""Autoguidance through every door: the guide's prediction, and both weights' hashes in the manifest."""

import hashlib
import json

import numpy as np
import pytest

from diffit import DiffiTPipeline, ImageSampler, load_model, sample_images
from diffit.checkpoint.weights import save_checkpoint
from diffit.cli.sample import parse_sample
from diffit.sampling.generate import generate
from tests.small_models import save_small_image_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network and a smaller one, of the same images and classes."""
    folder = tmp_path_factory.mktemp("weights")
    model = save_small_image_checkpoint(folder, num_classes=3)
    (folder / "guide").mkdir()
    return model, save_small_image_checkpoint(folder / "guide", num_classes=3, channels=(32, 32))


def sampled(weights, folder, *flags):
    task = parse_sample(["--model_path", str(weights[0]), "--device", "cpu", "--log_dir", str(folder), *flags])
    with np.load(generate(task)) as file:
        return file["arr_0"]


def test_all_doors_draw_the_same_and_the_manifest_has_both_hashes(weights, tmp_path):
    guide = ["--guidance.guide", str(weights[1])]
    images = sampled(weights, tmp_path / "out", *guide, "--num_samples", "5", "--batch_size", "2")
    ours, _ = sample_images(*load_model(weights[0]), 5, guide=str(weights[1]), batch_size=2)
    np.testing.assert_array_equal(images, ours)
    pipeline = DiffiTPipeline.from_pretrained(str(weights[0]))
    theirs = pipeline(num_images=5, guide=str(weights[1]), output_type="np").images
    np.testing.assert_allclose(theirs * 255, images, atol=1)
    whole, _ = sample_images(*load_model(weights[0]), 5, guide=str(weights[1]))
    assert np.abs(whole.astype(int) - ours).max() <= 1  # a sample does not depend on its batch
    free, _ = sample_images(*load_model(weights[0]), 5, batch_size=2)
    assert np.abs(free.astype(int) - ours).max() > 1
    settings = json.loads((tmp_path / "out" / "manifest.json").read_text())["settings"]
    for key, path in zip(("weights_sha256", "guide_sha256"), weights, strict=True):
        assert settings[key] == hashlib.sha256(path.read_bytes()).hexdigest()
    fast = sampled(weights, tmp_path / "fast", *guide, "--num_samples", "5", "--fast", "True", "--precision", "fp32")
    assert np.abs(fast.astype(int) - ours).max() <= 2

    other = tmp_path / "other.safetensors"
    model, config = load_model(weights[1])
    save_checkpoint(other, {name: 1.01 * value for name, value in model.state_dict().items()}, config)
    with pytest.raises(ValueError, match="guide_sha256"):
        sampled(weights, tmp_path / "out", "--guidance.guide", str(other), "--num_samples", "5")


def test_a_scale_of_one_is_the_model_alone(weights):
    ours, _ = sample_images(*load_model(weights[0]), 3, guide=str(weights[1]), cfg_scale=1)
    alone, _ = sample_images(*load_model(weights[0]), 3, cfg_scale=1)
    np.testing.assert_array_equal(ours, alone)


def test_the_guide_is_chosen_when_a_sampler_is_made(weights):
    pictures, indices = ImageSampler.load(weights[0], guide=weights[1], device="cpu"), range(3)
    images, _ = sample_images(*load_model(weights[0]), 3, guide=str(weights[1]))
    np.testing.assert_array_equal(pictures.draw(indices, pictures.labels(indices, 0)).numpy(), images)
    assert pictures.with_settings(cfg_scale=3).guide is pictures.guide
    with pytest.raises(ValueError, match="another guide"):
        pictures.with_settings(guide="Diffit-Fashion")


def test_networks_without_classes_are_guided_too(tmp_path):
    model = save_small_image_checkpoint(tmp_path, num_classes=0)
    (tmp_path / "guide").mkdir()
    guide = str(save_small_image_checkpoint(tmp_path / "guide", num_classes=0, channels=(32, 32)))
    free, _ = sample_images(*load_model(model), 2)
    ours, _ = sample_images(*load_model(model), 2, guide=guide, cfg_scale=2)
    assert (free != ours).any()
    np.testing.assert_array_equal(
        sampled((model,), tmp_path / "out", "--guidance.guide", guide, "--guidance.scale", "2", "--num_samples", "2"),
        ours,
    )


def test_a_guide_of_other_data_is_refused_before_anything_is_sampled(weights, tmp_path, capsys):
    other = save_small_image_checkpoint(tmp_path, num_classes=2)
    for name, sentence in ((str(other), "(classes: 2, not 3)"), ("nowhere", "--guidance.guide takes")):
        with pytest.raises(SystemExit):
            parse_sample(["--model_path", str(weights[0]), "--guidance.guide", name])
        assert sentence in capsys.readouterr().err
        with pytest.raises(ValueError, match="--guidance"):
            sample_images(*load_model(weights[0]), 2, guide=name)
