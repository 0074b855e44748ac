"""Sampling end to end with small real parts: what a sample depends on, and what it must not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from shutil import which

import numpy as np
import pytest
import torch

from diffit.cli.sample import parse_sample
from diffit.sampling import generate as generate_module
from diffit.sampling.config import SampleConfig
from diffit.sampling.folder import SampleFolder
from diffit.sampling.generate import generate, resolve_labels
from diffit.sampling.images import resolve_compile
from diffit.system.files import as_tree
from tests.conftest import ROOT
from tests.small_models import CLASSES, save_small_checkpoint, save_small_vae


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return save_small_checkpoint(folder, save_small_vae(folder / "vae"))


@pytest.fixture
def sample(checkpoint, tmp_path):
    """Runs sample.py's work with some flags in this process; returns (images, labels, folder)."""
    count = iter(range(100))

    def run(flags="", folder=None):
        folder = folder or tmp_path / str(next(count))
        task = parse_sample(f"--model_path {checkpoint} --device cpu --log_dir {folder} {flags}".split())
        with np.load(generate(task)) as file:
            return file["arr_0"], file.get("arr_1"), folder

    return run


def differing(a, b):
    """Share of values that differ, and by how much at most."""
    distance = np.abs(a.astype(int) - b.astype(int))
    return (distance > 0).mean(), distance.max()


def test_output(sample):
    images, labels, folder = sample("--num_samples 7 --save_png True")
    assert (images.shape, images.dtype, labels.shape) == ((7, 16, 16, 3), np.uint8, (7,))
    assert images.std() > 5
    assert set(labels) <= {0, 1, 2}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["settings"]["guidance"]["scale"] == 2.0
    assert manifest["settings"]["sampling"]["num_sampling_steps"] == 3
    assert manifest["seconds_per_image"] > 0
    assert len(manifest["settings"]["weights_sha256"]) == 64
    assert len(list((folder / "png").glob("*.png"))) == 7
    assert (folder / "grid.png").stat().st_size > 0


def test_batch_size_changes_only_rounding(sample):
    """Sizes of matrix products may change the order of additions: one grey level, in at most one value of 1000."""
    images, labels, _ = sample("--num_samples 12 --batch_size 12")
    for batch_size in (1, 5):
        others, other_labels, _ = sample(f"--num_samples 12 --batch_size {batch_size}")
        np.testing.assert_array_equal(labels, other_labels)
        share, most = differing(images, others)
        assert share < 1e-3
        assert most <= 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_samples_are_reproducible_and_seeded(sample, sampler):
    flags = f"--num_samples 4 --sampler {sampler} --num_sampling_steps 4"
    first, second, other = sample(flags)[0], sample(flags)[0], sample(flags + " --seed 1")[0]
    np.testing.assert_array_equal(first, second)
    assert differing(first, other)[0] > 0.5


def test_more_samples_begin_with_the_same(sample):
    few, many = sample("--num_samples 4 --batch_size 4")[0], sample("--num_samples 8 --batch_size 4")[0]
    np.testing.assert_array_equal(few, many[:4])


def test_classes(sample):
    labels = sample("--num_samples 5 --class_labels 2 dog")[1]
    assert labels.tolist() == [2, 1, 2, 1, 2]
    cat, owl = (sample(f"--num_samples 2 --class_labels {name}")[0] for name in (0, 2))
    assert differing(cat, owl)[0] > 0.1
    unconditional, no_labels, _ = sample("--num_samples 2 --class_cond False")
    assert no_labels is None
    assert differing(unconditional, cat)[0] > 0.01


def test_class_names():
    assert resolve_labels(["night owl", "0", "DOG"], CLASSES) == [2, 0, 1]
    for wrong in ("3", "-1", "horse"):
        with pytest.raises(ValueError, match="Cat, Dog, Night owl"):
            resolve_labels([wrong], CLASSES)


def test_guidance_is_on_when_a_scale_is_named(sample):
    plain = sample("--num_samples 3 --cfg_cond False")[0]
    np.testing.assert_array_equal(plain, sample("--num_samples 3 --cfg_scale 1")[0])
    constant = "--num_samples 3 --cfg_scale 4.4 --guidance.schedule constant"
    assert differing(plain, sample(constant)[0])[0] > 0.5
    assert differing(sample(constant)[0], sample(constant + " --guidance.channels all")[0])[0] > 0.1


def test_auto_is_power_cosine_for_small_latents(sample):
    """Its effect on a random network is small, but equal settings give equal bits, so any difference is guidance."""
    flags = "--num_samples 2 --num_sampling_steps 50 --cfg_scale 99"
    auto = sample(flags)[0]
    np.testing.assert_array_equal(auto, sample(flags + " --guidance.schedule power_cosine")[0])
    assert differing(auto, sample("--num_samples 2 --num_sampling_steps 50 --cfg_cond False")[0])[0] > 0


def test_an_interrupted_run_ends_with_the_same_file(sample, tmp_path):
    _, _, whole = sample("--num_samples 10 --batch_size 3")
    expected = (whole / "samples_10x16x16x3.npz").read_bytes()

    folder = tmp_path / "interrupted"
    settings = json.loads((whole / "manifest.json").read_text())["settings"]
    interrupted = SampleFolder(folder, 10)
    interrupted.prepare(settings, overwrite=False)
    with np.load(whole / "samples_10x16x16x3.npz") as file:  # two of the four batches were made
        for first, count in ((0, 3), (6, 3)):
            part = slice(first, first + count)
            interrupted.add(first, file["arr_0"][part], file["arr_1"][part])
    sample("--num_samples 10 --batch_size 3", folder)
    assert (folder / "samples_10x16x16x3.npz").read_bytes() == expected


@pytest.mark.parametrize("last", [False, True])
def test_a_folder_deleted_on_the_way_is_said(sample, tmp_path, monkeypatch, last):
    save, folder = generate_module._save, tmp_path / "deleted"

    def save_and_delete(into, config, indices, *batch):
        save(into, config, indices, *batch)
        if (indices[-1] == 3) == last:
            shutil.rmtree(folder)

    monkeypatch.setattr(generate_module, "_save", save_and_delete)
    with pytest.raises(ValueError, match="deleted was deleted, or taken over"):
        sample("--num_samples 4 --batch_size 2 --save_png True", folder)
    assert not list(folder.glob("*"))


def test_killed_after_the_file_before_the_manifest(sample):
    _, _, folder = sample("--num_samples 2")
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"settings": content["settings"], "complete": False}))
    (folder / "shards").mkdir()
    sample("--num_samples 2", folder)
    assert json.loads(manifest.read_text()) == content | {"seconds_per_image": None}
    assert sorted(path.name for path in folder.iterdir()) == ["grid.png", "manifest.json", "samples_2x16x16x3.npz"]


def test_finished_folders_are_left_alone_and_others_refused(sample):
    _, _, folder = sample("--num_samples 2")
    before = (folder / "manifest.json").stat().st_mtime_ns
    sample("--num_samples 2 --batch_size 1", folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="seed: 0, now 5"):
        sample("--num_samples 2 --seed 5", folder)
    replaced, _, _ = sample("--num_samples 2 --seed 5 --overwrite True", folder)
    np.testing.assert_array_equal(replaced, sample("--num_samples 2 --seed 5")[0])


def test_a_setting_that_an_older_folder_lacks_had_its_default(sample):
    """Every setting of the manifest, also within a group, is left out by itself; only values by default may be."""
    _, _, folder = sample("--num_samples 2 --guidance.power 3")
    path = folder / "manifest.json"
    defaults = as_tree(SampleConfig()) | {"precision": "fp32", "compile": False, "conversion": "truncated"}
    text = path.read_text()
    names = [(key, inner) for key, value in json.loads(text)["settings"].items() for inner in (None, *_keys(value))]
    fits = set()
    for key, inner in names:
        manifest = json.loads(text)
        group, name, usual = manifest["settings"], key, defaults
        if inner is not None:
            group, name, usual = group[key], inner, defaults[key]
        if group.pop(name) == usual.get(name):
            fits.add((key, inner))
        path.write_text(json.dumps(manifest))
        if (key, inner) in fits:
            sample("--num_samples 2 --guidance.power 3", folder)
            assert json.loads(path.read_text()) == manifest
        else:
            with pytest.raises(ValueError, match=rf"made with other settings \({name if inner is None else key}"):
                sample("--num_samples 2 --guidance.power 3", folder)
    assert {("compile", None), ("precision", None), ("fast", None), ("guidance", "skip_below")} <= fits
    assert not {("guidance", None), ("guidance", "power"), ("num_samples", None), ("weights_sha256", None)} & fits


def _keys(value):
    return value if isinstance(value, dict) else ()


def test_16_bit_precision_stays_close(sample):
    exact, half = sample("--num_samples 4")[0], sample("--num_samples 4 --precision bf16")[0]
    share, _ = differing(exact, half)
    assert share > 0
    assert np.abs(exact.astype(int) - half.astype(int)).mean() < 3


def test_fast_stays_close_and_says_so(sample):
    exact, _, _ = sample("--num_samples 6")
    fast, _, folder = sample("--num_samples 6 --fast True --precision bf16")
    share, _ = differing(exact, fast)
    assert share > 0
    assert np.abs(exact.astype(int) - fast.astype(int)).mean() < 3
    settings = json.loads((folder / "manifest.json").read_text())["settings"]
    assert (settings["fast"], settings["precision"], settings["guidance"]["skip_below"]) == (True, "bf16", 1e-3)
    with pytest.raises(ValueError, match="fast: True, now False"):
        sample("--num_samples 6 --precision bf16", folder)


def test_fast_in_float32_differs_by_rounding_alone(sample):
    exact, _, _ = sample("--num_samples 6")
    fast, _, _ = sample("--num_samples 6 --fast True --precision fp32 --guidance.skip_below 0 --batch_size 4")
    share, largest = differing(exact, fast)
    assert share < 1e-3
    assert largest <= 1


@pytest.mark.parametrize(("flags", "precision"), [("avx512_bf16", "bf16"), ("avx2", "fp32"), ("", "fp32")])
def test_the_precision_of_a_device(sample, monkeypatch, flags, precision):
    monkeypatch.setattr("diffit.models.fast.cpu_info", lambda *fields: flags)
    settings = json.loads((sample("--num_samples 1 --fast True")[2] / "manifest.json").read_text())["settings"]
    assert settings["precision"] == precision
    assert json.loads((sample("--num_samples 1")[2] / "manifest.json").read_text())["settings"]["precision"] == "fp32"


@pytest.mark.parametrize("fast", ["--fast True", ""])
def test_one_shape_where_the_network_is_compiled(sample, monkeypatch, fast):
    """A short batch is filled up for the network, and what was not asked for is not written."""
    flags = f"--num_samples 6 --batch_size 4 --precision fp32 {fast}"
    expected, labels, plain = sample(flags)
    assert json.loads((plain / "manifest.json").read_text())["settings"]["compile"] is False
    sizes = set()

    def compiled(network):
        def call(x, t, y):
            sizes.add(len(x))
            return network(x, t, y)

        return call

    monkeypatch.setattr("diffit.sampling.images.compiled", compiled)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **settings: None)
    filled, same_labels, folder = sample(f"{flags} --compile True")
    assert sizes
    assert sizes <= {4, 8}  # with the null half and without
    np.testing.assert_array_equal(same_labels, labels)
    share, largest = differing(expected, filled)
    assert share < 1e-3
    assert largest <= 1
    sizes.clear()
    sample(f"--num_samples 2 --batch_size 4 --compile True --precision fp32 {fast}")
    assert sizes <= {2, 4}  # no more than were asked for
    assert json.loads((folder / "manifest.json").read_text())["settings"]["compile"] is True
    with pytest.raises(ValueError, match=r"made with other settings \(compile: True, now False\)"):
        sample(flags, folder)


def test_fast_compiles_where_it_pays(monkeypatch):
    assert [resolve_compile(asked, True, torch.device("cpu")) for asked in (None, False)] == [False, False]
    monkeypatch.setattr("diffit.sampling.images.compiles", lambda device: True)
    assert [resolve_compile(asked, True, torch.device("cuda")) for asked in (None, False)] == [True, False]
    assert resolve_compile(None, False, torch.device("cuda")) is False
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="--compile True needs Triton on a GPU and a C"):
        resolve_compile(True, False, torch.device("cpu"))


@pytest.mark.skipif(which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_compiled_samples_differ_by_rounding_alone(sample):
    share, largest = differing(sample("--num_samples 2")[0], sample("--num_samples 2 --compile True")[0])
    assert share < 1e-3
    assert largest <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_samples_on_a_gpu(sample):
    """By a sampler that remembers predictions: CUDA graphs write every one into the same memory."""
    flags = "--device cuda --num_samples 2 --sampling.sampler dpm++ --sampling.num_sampling_steps 5"
    share, largest = differing(sample(flags)[0], sample(f"{flags} --compile True")[0])
    assert share < 0.05
    assert largest <= 1


def test_a_vae_that_does_not_fit(sample, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="2 latent channels, Diffit-S needs 4"):
        sample(f"--num_samples 1 --vae {tmp_path / 'two'}")


def command(checkpoint, folder, *flags):
    return [
        str(ROOT / "sample.py"),
        "--model_path",
        str(checkpoint),
        "--device",
        "cpu",
        "--log_dir",
        str(folder),
        *flags,
    ]


def test_two_processes_equal_one(sample, checkpoint, tmp_path):
    """1 process x batch 8 = 2 gloo processes x batch 3, under torchrun; and Slurm's variables do as well."""
    images, labels, _ = sample("--num_samples 10 --batch_size 8")
    flags = ("--num_samples", "10", "--batch_size", "3")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun = [*launcher, *command(checkpoint, tmp_path / "torchrun", *flags)]
    said = subprocess.run(torchrun, check=True, capture_output=True, text=True).stdout
    assert said.count("(pictures: ") == 1  # one rank says where the samples are
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "127.0.0.1"}
    tasks = [
        subprocess.Popen(
            [sys.executable, *command(checkpoint, tmp_path / "slurm", *flags)],
            env=os.environ | slurm | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0]
    for folder in ("torchrun", "slurm"):
        with np.load(tmp_path / folder / "samples_10x16x16x3.npz") as file:
            np.testing.assert_array_equal(file["arr_1"], labels)
            share, most = differing(images, file["arr_0"])
            assert share < 1e-3
            assert most <= 1


@pytest.mark.slow
def test_killed_ten_times(checkpoint, tmp_path):
    """kill -9 at ten random moments: the same command ends with the same file."""
    flags = ("--num_samples", "60", "--batch_size", "2", "--num_sampling_steps", "100")
    whole, killed = ([sys.executable, *command(checkpoint, tmp_path / name, *flags)] for name in ("whole", "killed"))
    start = time.monotonic()
    subprocess.run(whole, check=True, capture_output=True)
    duration = time.monotonic() - start
    random = np.random.default_rng(0)
    for _ in range(10):
        process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.2, 1.1) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(killed, check=True, capture_output=True)
    name = "samples_60x16x16x3.npz"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["grid.png", "manifest.json", name]


PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    """2,000 bundled images need no more memory than 200 (+5%)."""

    def peak(count):
        flags = ["--num_samples", str(count), "--num_sampling_steps", "2", "--batch_size", "100"]
        script = [str(ROOT / "sample.py"), "--log_dir", str(tmp_path / str(count)), "--device", "cpu", *flags]
        result = subprocess.run([sys.executable, "-c", PEAK, *script], check=True, capture_output=True, text=True)
        return int(result.stdout.split()[-1])

    few, many = zip(*((peak(200), peak(2000)) for _ in range(2)), strict=True)
    assert min(many) < 1.05 * min(few)  # the smaller of two: start-up alone varies by some percent


@pytest.mark.slow
def test_the_released_network_end_to_end(tmp_path):
    """561 M random weights in the released files' layout, through sample.py and a small VAE of the right shape."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from diffit import create_model
    from diffit.nn.attention import relative_position_index

    model = create_model("Diffit")
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    index = relative_position_index(16)
    state = model.state_dict() | {f"blocks.{i}.attn.relative_position_index": index.clone() for i in range(28)}
    save_file(state, tmp_path / "diffit_256.safetensors")
    del model, state
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    flags = "--cfg_scale 4.4 --image_size 256 --model Diffit --num_sampling_steps 2 --num_samples 1 --cfg_cond True"
    run = [sys.executable, str(ROOT / "sample.py"), "--log_dir", str(tmp_path / "out"), *flags.split()]
    weights = ["--model_path", str(tmp_path / "diffit_256.safetensors"), "--vae", str(tmp_path / "vae")]
    subprocess.run([*run, *weights], check=True, capture_output=True)
    with np.load(tmp_path / "out" / "samples_1x256x256x3.npz") as file:
        assert file["arr_0"].std() > 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["settings"]["guidance"]["schedule"] == "power_cosine"
