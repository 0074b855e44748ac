"""tools/vae.py on small images: a trained VAE is scored, and the score is what its reconstructions say."""

import json

import numpy as np
import pytest
import vae
from diffusers import AutoencoderKL
from PIL import Image

from tests.evaluation.conftest import CLASSIFIER


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_vae_is_trained_on_images_of_their_kind_and_scored(mode, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    ramp = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3)
    for number in range(12):
        Image.fromarray(np.roll(ramp, number, axis=1).astype(np.uint8)).convert(mode).save(folder / f"{number}.png")
    monkeypatch.setattr(vae, "BATCH_SIZE", 4)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["vae.py", *words, "--data.path", str(folder), "--device", "cpu"])
        vae.main()
        return capsys.readouterr().out.splitlines()[-1]

    run("train", "--epochs", "1", "--out", str(tmp_path / "vae"))
    trained = AutoencoderKL.from_pretrained(tmp_path / "vae", low_cpu_mem_usage=False)
    assert trained.config.in_channels == (1 if mode == "L" else 3)
    assert len(trained.config.latents_mean) == 4
    pairs = tmp_path / "pairs.png"
    words = ["score", "--codec.vae", str(tmp_path / "vae"), "--features", CLASSIFIER, "--out", str(pairs)]
    with pytest.warns(UserWarning, match="covariance"):
        line = run(*words)
    scores = json.loads(line.partition(" ")[2])
    assert scores["images"] == 12
    assert scores["frechet"] > 0
    with Image.open(pairs) as picture:
        assert picture.size == (552, 632)  # four rows of four

    # Of a VAE that gives back what it saw there is nothing to complain about
    monkeypatch.setattr(vae.VAECodec, "encode_moments", lambda self, x: x.permute(0, 3, 1, 2).repeat(1, 8, 1, 1)[:, :8])
    monkeypatch.setattr(vae.VAECodec, "latents", lambda self, moments, noise: moments)
    channels = trained.config.in_channels
    back = lambda self, z: z[:, :channels].permute(0, 2, 3, 1).byte()  # noqa: E731
    monkeypatch.setattr(vae.VAECodec, "decode", back)
    with pytest.warns(UserWarning, match="covariance"):
        perfect = json.loads(run(*words).partition(" ")[2])
    assert perfect["psnr"] == pytest.approx(100)
    assert perfect["frechet"] == pytest.approx(0, abs=1e-3)
