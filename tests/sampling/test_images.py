"""sample_images draws what sample.py draws, for the latent and the image-space model, and says what does not fit."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from diffit import DiffiTPipeline, ImageSampler, load_model, sample_images
from diffit.cli.sample import parse_sample
from diffit.diffusion.config import SAMPLERS, SamplingConfig
from diffit.sampling.generate import generate
from tests.small_models import save_small_checkpoint, save_small_image_checkpoint, save_small_vae


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    latent = save_small_checkpoint(folder, save_small_vae(folder / "vae"))
    return {"latent": latent, "image": save_small_image_checkpoint(folder, num_classes=3)}


def sampled(path, folder, flags):
    """Images and labels that sample.py writes."""
    task = parse_sample(f"--model_path {path} --device cpu --log_dir {folder} {flags}".split())
    with np.load(generate(task)) as file:
        return file["arr_0"], file["arr_1"]


@pytest.mark.parametrize("kind", ["latent", "image"])
@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--num_samples 5 --batch_size 2", {"num_samples": 5, "batch_size": 2}),
        ("--num_samples 3 --seed 4 --cfg_scale 3", {"num_samples": 3, "seed": 4, "cfg_scale": 3.0}),
        (
            "--num_samples 3 --class_labels dog 2 --num_sampling_steps 2",
            {"num_samples": 3, "class_labels": ["dog", 2], "num_sampling_steps": 2},
        ),
    ],
)
def test_samples_are_those_of_the_script(checkpoints, tmp_path, kind, flags, settings):
    images, labels = sampled(checkpoints[kind], tmp_path, flags)
    ours, our_labels = sample_images(*load_model(checkpoints[kind]), **settings)
    np.testing.assert_array_equal(ours, images)
    np.testing.assert_array_equal(our_labels, labels)
    assert (ours.dtype, our_labels.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize(("kind", "sampler"), [("latent", "ddim"), ("image", "heun")])
def test_the_sampler_can_be_named(checkpoints, tmp_path, kind, sampler):
    images, _ = sampled(checkpoints[kind], tmp_path, f"--num_samples 2 --sampler {sampler} --num_sampling_steps 3")
    ours, _ = sample_images(*load_model(checkpoints[kind]), 2, sampler=sampler, num_sampling_steps=3)
    np.testing.assert_array_equal(ours, images)


def test_the_callback_sees_every_state(checkpoints):
    """The last state of each batch is what the images are decoded from; the model's own states, not copies."""
    model, config = load_model(checkpoints["image"])
    seen = []
    images, _ = sample_images(
        model, config, 3, batch_size=2, callback=lambda step, steps, x: seen.append((step, steps, x.clone()))
    )
    assert [(step, steps) for step, steps, _ in seen] == 2 * [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(x) for _, _, x in seen] == [2] * 4 + [1] * 4
    last = torch.cat([seen[3][2], seen[7][2]]).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(images, (last * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy())


@pytest.mark.parametrize("kind", ["latent", "image"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_draw_nearly_the_same(checkpoints, kind, dtype):
    """Fast too, where blocks are computed in a dtype of their own."""
    expected, _ = sample_images(*load_model(checkpoints[kind]), 2)
    model, config = load_model(checkpoints[kind])
    images, _ = sample_images(model.to(dtype), config, 2)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    sampler = ImageSampler.create(model, config, torch.device("cpu"), fast=True, precision="fp32")
    fast = sampler.draw(range(2), sampler.labels(range(2), 0)).numpy()
    for close in (images, fast):
        assert np.abs(close.astype(int) - expected).mean() < (0.01 if dtype == torch.float64 else 4)


def test_one_class_may_stand_alone(checkpoints):
    model, config = load_model(checkpoints["latent"])
    assert sample_images(model, config, 2, class_labels="Night owl")[1].tolist() == [2, 2]
    assert sample_images(model, config, 2, class_labels=1)[1].tolist() == [1, 1]
    for zero in (0, "0", [0], (0,), np.int64(0), np.array(0), np.array([0]), torch.tensor(0), torch.tensor([[0]])):
        assert sample_images(model, config, 4, class_labels=zero, num_sampling_steps=2)[1].tolist() == 4 * [0]
    for name in ("num_samples", "batch_size"):
        for number in (0, -1, 1.5, float("nan"), "2", True):
            with pytest.raises(ValueError, match=f"{name} must be"):
                sample_images(model, config, **{name: number})


def test_a_model_without_classes(tmp_path):
    model, config = load_model(save_small_image_checkpoint(tmp_path, num_classes=0))
    images, labels = sample_images(model, config, 2)
    assert images.shape == (2, 32, 32, 3)
    assert labels.tolist() == [0, 0]
    with pytest.raises(ValueError, match="knows no classes"):
        sample_images(model, config, 2, class_labels=[1])


def test_refusals(checkpoints):
    model, config = load_model(checkpoints["latent"])
    for settings, words in (
        ({"sampler": "heun"}, "the heun sampler does not fit the gaussian process: choose ddpm or"),
        ({"class_labels": ["horse"]}, "there is no class 'horse'"),
        ({"num_samples": 0}, "must be at least 1"),
        ({"seed": -1}, "the seed must be between 0 and"),
        ({"num_sampling_steps": 5000}, "must be between 1 and 1000, not 5000"),
    ):
        with pytest.raises(ValueError, match=words):
            sample_images(model, config, **settings)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        sample_images(model.train(), config)


@pytest.mark.parametrize("kind", ["latent", "image"])
@pytest.mark.parametrize("fast", [False, True])
def test_an_image_sampler_draws_what_the_script_draws(checkpoints, tmp_path, kind, fast):
    """Also one step at a time; the labels are drawn, repeated in turn, or null."""
    pictures = ImageSampler.load(checkpoints[kind], fast=fast, device="cpu")
    images, labels = sampled(checkpoints[kind], tmp_path, f"--num_samples 3 --seed 4 --fast {fast}")
    y = pictures.labels(range(3), 4)
    np.testing.assert_array_equal(y, labels)
    np.testing.assert_array_equal(pictures.draw(range(3), y, 4), images)
    states = list(pictures.states(range(3), y, 4))
    assert [state.step for state in states] == list(range(1, states[0].num_steps + 1))
    np.testing.assert_array_equal(pictures.codec.decode(states[-1].x), images)
    assert pictures.labels(range(1, 5), 4, [2, 0]).tolist() == [0, 2, 0, 2]
    few = pictures.with_settings(num_sampling_steps=2, cfg_scale=1.0)
    assert len(list(few.states([0], y[:1], 4))) == 2
    assert few.config.guidance.scale == 1
    with pytest.raises(ValueError, match="does not fit"):
        pictures.with_settings(sampler="euler")


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_gradients_are_off_within_a_step_and_nowhere_else(checkpoints, kind):
    """Whoever reads the states may compute gradients between two of them, and may stop reading at any."""
    model, config = load_model(checkpoints[kind])
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    within = []
    model.register_forward_hook(lambda module, inputs, output: within.append(output.requires_grad))
    pictures = ImageSampler.create(model, config, torch.device("cpu"))
    for state in pictures.states(range(2), pictures.labels(range(2), 0)):
        assert torch.is_grad_enabled()
        assert (weight.sum() * 2).requires_grad
        assert not any(each.requires_grad for each in (state.x, state.pred_xstart))
    states = pictures.states(range(2), pictures.labels(range(2), 0))
    next(states)
    states.close()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        states = pictures.states(range(2), pictures.labels(range(2), 0))
        next(states)
    next(states)
    assert torch.is_grad_enabled()
    assert within
    assert not any(within)


PROCESSES = {"gaussian": "latent", "edm": "image", "flow": "image"}


@pytest.mark.parametrize(("process", "sampler"), [(name, each) for name in PROCESSES for each in SAMPLERS[name]])
def test_a_state_that_is_not_finite_is_named(checkpoints, process, sampler):
    """The network fails for one sample of three, at its last call but one."""
    model, config = load_model(checkpoints[PROCESSES[process]])
    sampling = SamplingConfig(sampler, 5)
    guidance = replace(config.guidance, enabled=False)
    config = replace(config, process=process, sampling=sampling, guidance=guidance)
    pictures, calls = ImageSampler.create(model, config, torch.device("cpu"), precision="bf16"), []
    states = list(pictures.states(range(7, 10), torch.tensor([0, 1, 2])))
    assert len(states) == 5

    def counting(x, t, y):
        calls.append(len(x))
        return torch.zeros(len(x), 2 * x.shape[1] if process == "gaussian" else x.shape[1], *x.shape[2:])

    def failing(x, t, y):
        output = counting(x, t, y)
        output[1] = float("nan") if len(calls) == total - 1 else 0
        return output

    list(replace(pictures, network=counting).states(range(7, 10), torch.tensor([0, 1, 2])))
    total, calls = len(calls), []
    with pytest.raises(ValueError, match=r"sample 8 is not finite after step [45] of 5 in bf16: use a smaller"):
        replace(pictures, network=failing).draw(range(7, 10), torch.tensor([0, 1, 2]))
    assert len(calls) == total  # all steps were taken: none waited for the device


@pytest.mark.parametrize("kind", ["latent", "image"])
@pytest.mark.parametrize("door", ["sample_images", "pipeline", "page"])
def test_no_door_draws_a_black_picture(checkpoints, kind, door):
    """A scale without bounds is refused, and so is what a damaged network draws."""
    if door == "sample_images":
        model, config = load_model(checkpoints[kind])
        draw = partial(sample_images, model, config, 1)
    elif door == "pipeline":
        pipeline = DiffiTPipeline.from_pretrained(checkpoints[kind])
        model = pipeline.transformer

        def draw(cfg_scale=None):
            return pipeline([1], guidance_scale=cfg_scale)
    else:
        demo = pytest.importorskip("diffit.demo", reason="needs Gradio")
        pictures = ImageSampler.load(checkpoints[kind], device="cpu")
        model = pictures.network

        def draw(cfg_scale=None):
            return list(demo.denoise(pictures, {"seed": 0, "cfg_scale": cfg_scale}))

    for scale in (1e30, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"guidance\.scale"):
            draw(cfg_scale=scale)
    draw()
    next(parameter for parameter in model.parameters() if parameter.is_floating_point()).data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"not finite.*: use a smaller guidance scale"):
        draw()


def test_a_vae_that_fails_is_no_black_picture(checkpoints):
    model, config = load_model(checkpoints["latent"])
    pictures = ImageSampler.create(model, config, torch.device("cpu"))
    next(iter(pictures.codec.vae.decoder.parameters())).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="an image is not finite"):
        pictures.draw(range(2), torch.tensor([0, 1]))


@pytest.mark.parametrize("sampler", ["dpm++", "unipc"])
def test_solvers_take_less_steps_than_there_are_timesteps(checkpoints, sampler):
    model, config = load_model(checkpoints["latent"])
    config = replace(config, diffusion=replace(config.diffusion, diffusion_steps=25))
    sample_images(model, config, 1, sampler=sampler, num_sampling_steps=24)
    with pytest.raises(ValueError, match="must be a whole number between 1 and 24, not '25'"):
        sample_images(model, config, 1, sampler=sampler, num_sampling_steps=25)
