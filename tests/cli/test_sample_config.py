"""sample.py's command line: upstream's flags, precedence, and refusals. The public flags are frozen here."""

from dataclasses import replace

import pytest
import yaml

from diffit import load_model
from diffit.checkpoint.weights import save_checkpoint
from diffit.cli.sample import parse_sample
from diffit.cli.settings import settings_of, yaml_lines
from diffit.diffusion.config import SamplingConfig
from diffit.sampling.config import SampleConfig
from diffit.system.files import as_tree
from tests.small_models import save_small_checkpoint, save_small_image_checkpoint

FLAGS = {
    "": "model model_path image_size log_dir num_samples batch_size seed class_labels class_cond vae device precision "
    "fast save_png overwrite dry_run",
    "diffusion.": "noise_schedule diffusion_steps learn_sigma",
    "sampling.": "sampler num_sampling_steps eta clip_denoised",
    "guidance.": "scale enabled schedule power channels interval skip_below",
}


def sample_config(line: str) -> SampleConfig:
    return parse_sample(line.split()).config


def refusal(line: str, capsys) -> str:
    """The one sentence with which a command line is refused."""
    with pytest.raises(SystemExit) as caught:
        parse_sample(line.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    return error


def test_public_flags():
    flags = {setting.key for setting in settings_of(SampleConfig)}
    assert {prefix + name for prefix, names in FLAGS.items() for name in names.split()} <= flags


def test_the_published_command():
    config = sample_config(
        "--log_dir DIR --cfg_scale 4.4 --image_size 256 --model Diffit --num_sampling_steps 250 --num_samples 50000 "
        "--cfg_cond True"
    )
    assert (config.log_dir, config.num_samples, config.model) == ("DIR", 50000, "Diffit")
    assert (config.guidance.scale, config.guidance.enabled, config.guidance.schedule) == (4.4, True, "power_cosine")
    assert (config.sampling.sampler, config.sampling.num_sampling_steps, config.guidance.channels) == ("ddpm", 250, 3)


def test_every_upstream_flag():
    config = sample_config(
        "--model Diffit --batch_size 4 --use_ddim True --clip_denoised True --class_cond False --cfg_scale 1.49 "
        "--cfg_cond False --scale_pow 2 --vae_decoder mse --use_fp16 True --noise_schedule squaredcos_cap_v2 "
        "--diffusion_steps 500 --learn_sigma False --world_size 1 --local_rank -1 --rank 0 --dist_url env:// "
        "--dist_on_itp False --mask_ratio None --decode_layer None"
    )
    assert (config.batch_size, config.class_cond, config.vae) == (4, False, "stabilityai/sd-vae-ft-mse")
    assert (config.sampling.sampler, config.sampling.clip_denoised, config.precision) == ("ddim", True, "fp16")
    assert (config.guidance.scale, config.guidance.enabled, config.guidance.power) == (1.49, False, 2)
    assert as_tree(config.diffusion) == {
        "noise_schedule": "squaredcos_cap_v2",
        "diffusion_steps": 500,
        "learn_sigma": False,
    }


@pytest.mark.parametrize(
    "flag",
    [
        "--world_size 8",
        "--local_rank 3",
        "--rank 1",
        "--dist_url tcp://x",
        "--dist_on_itp True",
        "--mask_ratio 0.5",
        "--decode_layer 4",
    ],
)
def test_meaningless_upstream_flags(flag, capsys):
    assert f"{flag} has no meaning here" in refusal(flag, capsys)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--model Difit", "unknown model 'Difit'"),
        ("--num_samples 0", "--num_samples must be at least 1"),
        ("--num_samples -5", "--num_samples must be at least 1"),
        ("--batch_size 0", "--batch_size must be at least 1"),
        ("--seed -1", "--seed must be between"),
        ("--guidance.scael 3", "there is no setting --guidance.scael: did you mean --guidance.scale?"),
        ("--bogus 1", "--bogus"),
        ("--cfg_scale much", "--guidance.scale must be a number, not much"),
        ("--sampler euler", "dpm++"),
        ("--vae_decoder big", "ema, mse"),
        ("--image_size 300 --model Diffit", "choose 256 or 512"),
        ("--class_labels --seed 1", "at least one class"),
        ("--guidance.skip_below -1", "--guidance.skip_below must be between 0 and 1e+06, not -1.0"),
    ],
)
def test_refusals(line, words, capsys):
    assert words in refusal(line, capsys)


def test_precedence(tmp_path):
    """Checkpoint, then --config, then flags, wherever --config stands."""
    checkpoint = save_small_checkpoint(tmp_path, "vae")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("guidance:\n  scale: 3.0\nsampling:\n  sampler: ddim\n  eta: 0.5\n")
    line = f"--model_path {checkpoint} --cfg_scale 5 --config {recipe}"
    config = sample_config(line)
    assert (config.model, config.image_size) == ("Diffit-S", 16)
    assert config.sampling.num_sampling_steps == 3  # the checkpoint's
    assert config.sampling.eta == 0.5  # the file's
    assert config.guidance.scale == 5  # the flag's
    assert sample_config(f"--model_path {checkpoint}").guidance.scale == 2


def test_what_a_checkpoint_recommends_for_its_own_sampler(tmp_path, capsys):
    """Another sampler that does not read it leaves it out; named by the user it is refused."""
    checkpoint = save_small_checkpoint(tmp_path, "vae")
    weights, config = load_model(checkpoint)
    ddim = replace(config, sampling=SamplingConfig("ddim", 5, eta=0.5))
    save_checkpoint(checkpoint, weights.state_dict(), ddim)
    line = f"--model_path {checkpoint}"
    assert sample_config(line).sampling == ddim.sampling
    assert sample_config(f"{line} --sampler dpm++").sampling == SamplingConfig("dpm++", 5)
    assert "dpm++ sampler" in refusal(f"{line} --sampler dpm++ --sampling.eta 0.5", capsys)


def test_fast_skips_guidance_unless_told_otherwise(tmp_path):
    assert sample_config("").guidance.skip_below == 0
    assert sample_config("--fast True").guidance.skip_below == 1e-3
    assert sample_config("--fast True --guidance.skip_below 0").guidance.skip_below == 0
    pixels = save_small_image_checkpoint(tmp_path)
    assert sample_config(f"--model_path {pixels} --fast True").guidance.skip_below == 0


def test_a_misspelt_key_in_a_file(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("guidance:\n  scael: 3.0\n")
    assert "there is no setting --guidance.scael: did you mean" in refusal(f"--config {recipe}", capsys)


def test_what_does_not_apply_is_not_printed():
    shown = yaml.safe_load("\n".join(yaml_lines(sample_config("--sampler dpm++"), 10)))
    assert {"diffusion", "sampling", "guidance"} < set(shown)
    assert not {"edm", "flow"} & set(shown)
    assert shown["sampling"] == {"sampler": "dpm++", "num_sampling_steps": 50}
    assert "guidance" not in yaml.safe_load("\n".join(yaml_lines(sample_config(""), 0)))


def test_the_printed_config_reads_back(tmp_path):
    config = sample_config("--cfg_scale 3 --class_labels 3 7 --guidance.interval [100,900] --guidance.channels all")
    recipe = tmp_path / "printed.yaml"
    recipe.write_text("\n".join(yaml_lines(config, 10)))
    assert sample_config(f"--config {recipe}") == config
    assert config.class_labels == ["3", "7"]
    assert config.guidance.interval == (100, 900)
