"""The pipeline draws what sample_images draws, survives its folder bit for bit, and loads in plain diffusers."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from diffit import DiffiTPipeline, hub, load_model, sample_images
from diffit.checkpoint.config import CheckpointConfig
from diffit.cli.pipeline import main
from diffit.codec import create_codec
from diffit.components import DiffiTTransformer2DModel
from diffit.config import CodecConfig
from diffit.sampling.folder import draw_grid
from diffit.system.console import printable
from tests.conftest import ROOT
from tests.local_hub import local_hub
from tests.small_models import CLASSES, NETWORK, save_small_checkpoint, save_small_image_checkpoint, save_small_vae
from tests.training.runs import run, tiny_flags

COMMON = {
    "README.md",
    "samples.png",
    "model_index.json",
    "pipeline.py",
    "transformer/config.json",
    "transformer/modeling_diffit.py",
}
COMMON |= {"transformer/diffusion_pytorch_model.safetensors"}
VAE = {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    latent = save_small_checkpoint(folder, save_small_vae(folder / "vae"), made_by="configs/small.yaml, 7 steps")
    return {"latent": latent, "image": save_small_image_checkpoint(folder, num_classes=3)}


@pytest.fixture(scope="module")
def pipelines(checkpoints):
    pipelines = {kind: DiffiTPipeline.from_pretrained(path) for kind, path in checkpoints.items()}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def test_opening_a_checkpoint_prints_nothing(checkpoints):
    code = "import sys; from diffit import DiffiTPipeline; DiffiTPipeline.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, str(checkpoints["latent"])]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def saved(pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for kind, pipeline in pipelines.items():
        pipeline.save_pretrained(folder / kind)
    return folder


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def arrays(pipeline, *arguments, **settings):
    return pipeline(*arguments, output_type="np", **settings).images


def python(code, *arguments, **environment):
    """What a fresh Python prints as JSON on its last line."""
    base = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=base | environment,
        cwd=environment["HF_HOME"],
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["latent", "image"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"class_labels": np.array([1, 0])}, {"num_samples": 2, "class_labels": [1, 0]}),
        ({"class_labels": ["Dog", 2, "0"]}, {"num_samples": 3, "class_labels": ["Dog", 2, "0"]}),
        (
            {"class_labels": torch.tensor([2, 1]), "num_inference_steps": 2, "guidance_scale": 3.0, "seed": 4},
            {"num_samples": 2, "class_labels": [2, 1], "num_sampling_steps": 2, "cfg_scale": 3.0, "seed": 4},
        ),
        (
            {"class_labels": "Night owl", "num_images": 18, "num_inference_steps": 2},
            {"num_samples": 18, "class_labels": "Night owl", "num_sampling_steps": 2},
        ),
        ({"class_labels": None, "guidance_scale": 1}, {"num_samples": 1, "cfg_scale": 1}),
    ],
)
def test_images_are_those_of_sample_images(checkpoints, pipelines, kind, ours, theirs):
    images, _ = sample_images(*load_model(checkpoints[kind]), **theirs)
    drawn = arrays(pipelines[kind], **ours)
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, images.astype(np.float32) / 255)


def test_the_sampler_can_be_named(checkpoints, pipelines):
    images, _ = sample_images(*load_model(checkpoints["latent"]), 1, class_labels=1, sampler="ddim")
    np.testing.assert_array_equal(arrays(pipelines["latent"], 1, sampler="ddim"), images.astype(np.float32) / 255)


def test_output_types(pipelines):
    pipeline = pipelines["latent"]
    pictures = pipeline(["Cat", "Dog"]).images
    array, (tensor,) = arrays(pipeline, ["Cat", "Dog"]), pipeline(["Cat", "Dog"], output_type="pt", return_dict=False)
    assert [picture.size for picture in pictures] == [(16, 16), (16, 16)]
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in pictures]) / np.float32(255), array)
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    with pytest.raises(ValueError, match="no output_type 'jpeg': choose pil, np, pt or latent"):
        pipeline(["Cat"], output_type="jpeg")
    latents = pipeline(["Cat", "Dog"], output_type="latent").images
    decoded = create_codec(pipeline._settings.codec, torch.device("cpu"), vae=pipeline.vae).decode(latents)
    np.testing.assert_array_equal(decoded.numpy() / np.float32(255), array)
    with pytest.raises(ValueError, match="must be at least 1"):
        pipeline([])


def test_classes_by_name(pipelines):
    pipeline = pipelines["latent"]
    assert pipeline.labels == {"Cat": 0, "Dog": 1, "Night owl": 2}
    assert pipeline.get_label_ids(["night owl", "Cat"]) == [2, 0]
    with pytest.raises(ValueError, match="there is no class 'horse'"):
        pipeline(["horse"])


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_a_saved_pipeline_draws_the_same(pipelines, saved, kind):
    assert files_of(saved / kind) == (COMMON | VAE if kind == "latent" else COMMON)
    again = DiffiTPipeline.from_pretrained(saved / kind)
    assert (again.vae is None) == (kind == "image")
    np.testing.assert_array_equal(arrays(again, ["Dog", "Cat"]), arrays(pipelines[kind], ["Dog", "Cat"]))


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_the_picture_on_the_card_is_of_eight_samples(pipelines, saved, kind):
    labels = [0, 0, 0, 1, 1, 1, 2, 2]
    images = [np.asarray(image) for image in pipelines[kind](labels).images]
    with Image.open(saved / kind / "samples.png") as picture:
        expected = draw_grid(images, [CLASSES[label] for label in labels])
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))
    assert "![Samples](samples.png)" in (saved / kind / "README.md").read_text()


def test_what_cannot_be_drawn_can_be_saved(checkpoints, tmp_path):
    pipeline = DiffiTPipeline.from_pretrained(checkpoints["image"])
    pipeline.transformer.train()
    pipeline.save_pretrained(tmp_path)
    assert files_of(tmp_path) == COMMON - {"samples.png"}
    assert "![Samples]" not in (tmp_path / "README.md").read_text()


def test_saving_again_changes_nothing(saved, tmp_path):
    """Not even after sampling, which lays the VAE's weights out anew."""
    again = DiffiTPipeline.from_pretrained(saved / "latent")
    again("Cat")
    again.save_pretrained(tmp_path / "latent")
    for name in sorted(COMMON | VAE):
        one, two = (path.read_bytes() for path in (saved / "latent" / name, tmp_path / "latent" / name))
        if name.endswith(".json"):
            one, two = ({k: v for k, v in json.loads(text).items() if k != "_name_or_path"} for text in (one, two))
        assert one == two, name


def test_the_folder_speaks_of_itself_as_diffusers_folders_do(saved):
    index = json.loads((saved / "latent" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "DiffiTPipeline"]
    assert index["transformer"] == ["modeling_diffit", "DiffiTTransformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["checkpoint"]["sampling"]["num_sampling_steps"] == 3
    network = DiffiTTransformer2DModel.from_pretrained(saved / "latent", subfolder="transformer")
    assert (network.config.hidden_size, network.config.num_classes) == (32, 3)
    assert not network.training


def test_the_network_keeps_the_names_of_its_parameters(checkpoints, saved):
    ours = load_file(saved / "image" / "transformer" / "diffusion_pytorch_model.safetensors")
    theirs = load_file(checkpoints["image"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_bundled_model_and_its_card(tmp_path):
    pipeline = DiffiTPipeline.from_pretrained("Diffit-Fashion")
    images = pipeline(["Sneaker"], 3).images
    assert (len(images), images[0].mode, images[0].size) == (1, "L", (32, 32))
    pipeline.save_pretrained(tmp_path, repo_id="someone/fashion")
    card = (tmp_path / "README.md").read_text()
    for words in (
        "\nlibrary_name: diffusers\nlicense: apache-2.0\npipeline_tag: unconditional-image-generation\ntags:\n",
        'DiffiTPipeline.from_pretrained("someone/fashion")',
        "configs/fashion_mnist.yaml, 4114 steps of 1024 images",
        "| Classified as asked | Inception Score | FID | Precision | Recall |\n| --- | --- | --- | --- | --- |\n",
        "| 0.949 | 6.77 | 0.1971 | 0.881 | 0.7063 |",
        "50 steps of ddpm, guidance at 1.5",
        "![Samples](samples.png)",
    ):
        assert words in card
    data = ModelCard(card).data
    assert (data.datasets, data.license) == (["zalando-datasets/fashion_mnist"], "apache-2.0")


STRANGE = [
    "a|b",
    "*bold* ~~no~~ $x$",
    "[x](y)",
    "<b>&amp;<!--",
    "two\nlines",
    "\x1b[31mred",
    "`code",
    "_in_",
    "\\|",
    "![i](j)",
]


def test_a_card_shows_the_names_of_strangers_as_they_are():
    """As a reader of Markdown sees them; control characters, which no page shows, as the console does."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"linkify": False})
    network = dataclasses.replace(NETWORK, num_classes=len(STRANGE))
    for name in STRANGE:
        config = CheckpointConfig("Diffit-S", network, CodecConfig(name), class_names=tuple(STRANGE), made_by=name)
        scores = {"fid": 1.5, "samples": name, "reference": name, "features": name}
        card = ModelCard(hub.model_card(config, f"who/{name}", 10**6, name, scores, picture=False))
        assert card.data.model_name == name
        assert card.data.eval_results[0].dataset_name == name
        parts = [block.children for block in markdown.parse(card.text) if block.type == "inline"]
        known = {"text", "code_inline", "link_open", "link_close"}  # the card's own
        assert {part.type for parts_of_one in parts for part in parts_of_one} == known
        lines = ["".join(part.content for part in line) for line in parts]
        for expected in (name, f"10 classes: {', '.join(STRANGE)}", f"The weights are under {name}."):
            assert printable(expected) in lines
        assert (
            f"By ADM's protocol, on {printable(name)} against {printable(name)}, features: {printable(name)}." in lines
        )
        assert sum(line == printable(name) for line in lines) == 3  # title, recipe, VAE
        code = card.text.split("```python\n")[1].split("```")[0]
        assert f"{STRANGE[0]!r}, {STRANGE[-1]!r}" in code
        compile(code, "card", "exec")


def test_the_lines_on_the_card_work(saved, monkeypatch):
    card = (saved / "latent" / "README.md").read_text()
    assert "No licence has been chosen" in card
    assert "Scores" not in card
    names: dict = {}
    monkeypatch.chdir(saved)
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert [image.size for image in names["images"]] == [(16, 16), (16, 16)]


def test_scores_beside_the_weights_are_on_the_card(checkpoints, tmp_path):
    (tmp_path / "small.safetensors").write_bytes(checkpoints["image"].read_bytes())
    (tmp_path / "scores.json").write_text(
        '{"fid": 2.34567, "samples": "logs/a.npz", "reference": "b.npz", "sfid": null}'
    )
    DiffiTPipeline.from_pretrained(tmp_path / "small.safetensors").save_pretrained(tmp_path / "one")
    DiffiTPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for name in ("one", "two"):
        card = (tmp_path / name / "README.md").read_text()
        (result,) = ModelCard(card).data.eval_results
        found = (
            result.dataset_name,
            result.metric_type,
            result.metric_name,
            result.metric_value,
            result.dataset_config,
        )
        assert found == ("b.npz", "fid", "FID", 2.34567, None)
        assert ModelCard(card).data.model_name == name
        assert "on a.npz against b.npz" in card
        assert "| FID |\n| --- |\n| 2.346 |" in card
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ValueError, match=r"scores\.json is damaged"):
        DiffiTPipeline.from_pretrained(tmp_path / "small.safetensors")


def test_what_was_trained_on_from_nvidias_weights_keeps_their_licence(tmp_path):
    made_by = "configs/mine.yaml, 7 steps of 8 images, after nvidia/DiffiT/diffit_256.safetensors"
    path = save_small_checkpoint(tmp_path, save_small_vae(tmp_path / "vae"), made_by=made_by)
    DiffiTPipeline.from_pretrained(path).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card
    assert f"| recipe | {made_by} |" in card
    assert "| data | 3 classes: Cat, Dog, Night owl |" in card


def test_a_model_without_classes(tmp_path):
    pipeline = DiffiTPipeline.from_pretrained(save_small_image_checkpoint(tmp_path, num_classes=0))
    assert len(pipeline(num_images=2).images) == 2
    pipeline.save_pretrained(tmp_path / "saved")
    assert "pipeline().images" in (tmp_path / "saved" / "README.md").read_text()
    with pytest.raises(ValueError, match="knows no classes"):
        pipeline([1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["latent", "image"])
def test_16_bits_draw_nearly_the_same(pipelines, saved, checkpoints, kind, dtype):
    exact = arrays(pipelines[kind], ["Dog", "Cat"])
    spread = exact.std()
    loaded = DiffiTPipeline.from_pretrained(saved / kind, dtype=dtype)
    made = DiffiTPipeline.from_pretrained(checkpoints[kind], torch_dtype=dtype)
    moved = DiffiTPipeline.from_pretrained(checkpoints[kind]).to("cpu", dtype)
    for pipeline in (loaded, made, moved):
        assert {p.dtype for p in pipeline.transformer.parameters()} == {dtype}
        assert pipeline.dtype == dtype
        assert 0 < np.abs(arrays(pipeline, ["Dog", "Cat"]) - exact).mean() < 0.1 * spread


def test_a_bar_in_a_log_is_lines(saved, capsys):
    """A log file shows none of the returns by which a bar is drawn over itself."""
    pipeline = DiffiTPipeline.from_pretrained(saved / "image")
    pipeline.set_progress_bar_config(desc="two\nnames")
    pipeline(["Cat"], 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "2/2" in line]
    assert "\r" not in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["latent", "image"])
def test_weights_stored_in_8_bits_draw_nearly_the_same(pipelines, saved, kind, dtype, recwarn):
    exact = arrays(pipelines[kind], ["Dog", "Cat"])
    pipeline = DiffiTPipeline.from_pretrained(saved / kind, dtype=dtype)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    assert 0 < np.abs(arrays(pipeline, ["Dog", "Cat"]) - exact).mean() < 0.5 * exact.std()
    assert [warning for warning in recwarn if "autocast" in str(warning.message)] == []


def test_bar_and_callback(pipelines, saved):
    pipeline = DiffiTPipeline.from_pretrained(saved / "image")
    text, seen = io.StringIO(), []
    pipeline.set_progress_bar_config(file=text)

    def look(one, step, timestep, state):
        seen.append((one is pipeline, step, timestep, tuple(state["latents"].shape)))
        return state

    pipeline(["Cat"], num_images=17, num_inference_steps=2, callback_on_step_end=look)
    assert seen == [(True, step, None, (count, 3, 32, 32)) for count in (16, 1) for step in (0, 1)]
    assert "4/4" in text.getvalue()
    with pytest.raises(ValueError, match="cannot be replaced"):
        pipeline(["Cat"], callback_on_step_end=lambda one, step, t, state: {"latents": state["latents"].clone()})


def test_labels_and_seeds_are_whole_numbers_of_any_kind(pipelines):
    pipeline = pipelines["latent"]
    expected = arrays(pipeline, [1, 2], seed=5)
    for labels in (np.array([1, 2]), torch.tensor([[1], [2]]), [np.int64(1), torch.tensor(2)], ("Dog", np.uint8(2))):
        for seed in (5, np.int64(5), torch.tensor(5)):
            np.testing.assert_array_equal(arrays(pipeline, labels, seed=seed), expected)
    for label in (np.int64(1), torch.tensor(1), np.array(1)):
        np.testing.assert_array_equal(arrays(pipeline, label, seed=5), expected[:1])
    for wrong in (1.5, torch.tensor(1.5), None, "1"):
        with pytest.raises(ValueError, match="the seed must be a whole number, not"):
            pipeline(1, seed=wrong)
    for wrong in (1.5, [None], [torch.tensor(1.5)]):
        with pytest.raises(ValueError, match="a class label is a name or a whole number, not"):
            pipeline(wrong)


@pytest.mark.parametrize(
    ("name", "words"),
    [("generator", "pass seed"), ("latents", "seed"), ("num_images_per_prompt", "num_images"), ("x", "")],
)
def test_habits_of_other_pipelines_are_named(pipelines, name, words):
    with pytest.raises(TypeError, match=f"DiffiTPipeline takes no {name}.*{words}"):
        pipelines["image"]("Cat", **{name: 1})
    with pytest.raises(ValueError, match=r"pass sampler='dpm\+\+'"):
        pipelines["image"].scheduler = object()
    assert not hasattr(pipelines["image"], "scheduler")
    for offload in (pipelines["image"].enable_model_cpu_offload, pipelines["image"].enable_sequential_cpu_offload):
        with pytest.raises(ValueError, match=r"offers no offloading: move it by pipeline\.to"):
            offload(device="cpu")


def test_a_callback_changes_nothing_and_may_stop(pipelines):
    pipeline, seen = pipelines["image"], []

    def spoil(one, step, t, state):
        seen.append(step)
        state["latents"].zero_()
        return state

    np.testing.assert_array_equal(arrays(pipeline, "Cat", callback_on_step_end=spoil), arrays(pipeline, "Cat"))

    def stop(one, step, t, state):
        seen.append(state["latents"])
        one._interrupt = step == 1

    stopped = pipeline("Cat", num_images=20, output_type="latent", callback_on_step_end=stop).images
    assert len(seen) == 4 + 2
    assert torch.equal(stopped, seen[-1])
    np.testing.assert_array_equal(arrays(pipeline, "Cat"), arrays(pipeline, "Cat", callback_on_step_end=spoil))


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_float64_and_a_vae_of_another_dtype(checkpoints, pipelines, kind):
    expected, pipeline = arrays(pipelines[kind], ["Dog", "Cat"]), DiffiTPipeline.from_pretrained(checkpoints[kind])
    pipeline.transformer.to(torch.float64)
    assert np.abs(arrays(pipeline, ["Dog", "Cat"]) - expected).max() <= 2 / 255
    pipeline.to(torch.float64)
    assert np.abs(arrays(pipeline, ["Dog", "Cat"]) - expected).max() <= 2 / 255


def test_download_settings_are_harmless_for_what_is_here(checkpoints, saved, tmp_path):
    settings = {"revision": "main", "token": False, "cache_dir": tmp_path, "local_files_only": True}
    for name in ("Diffit-Fashion", checkpoints["image"], saved / "image"):
        DiffiTPipeline.from_pretrained(name, **settings)


def test_another_vae(checkpoints, tmp_path):
    vae = AutoencoderKL.from_pretrained(save_small_vae(tmp_path / "vae", scaling_factor=0.5), low_cpu_mem_usage=False)
    pipeline = DiffiTPipeline.from_pretrained(checkpoints["latent"], vae=vae)
    assert pipeline.vae is vae
    ours = arrays(pipeline, ["Cat"])
    assert np.abs(ours - arrays(DiffiTPipeline.from_pretrained(checkpoints["latent"]), ["Cat"])).max() > 0
    pipeline.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(arrays(DiffiTPipeline.from_pretrained(tmp_path / "saved"), ["Cat"]), ours)
    with pytest.raises(ValueError, match="the VAE has 2 latent channels, Diffit-S needs 4"):
        DiffiTPipeline.from_pretrained(checkpoints["latent"], vae=AutoencoderKL(latent_channels=2))


def test_refusals(checkpoints, saved, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model_index.json").write_text((saved / "image" / "model_index.json").read_text())
    for name, settings, words in (
        ("Difit", {}, r"there is no checkpoint Difit: from_pretrained takes a name \(Diffit-Fashion"),
        (tmp_path / "none", {}, "there is no checkpoint"),
        (tmp_path / "none.safetensors", {}, "there is no checkpoint file"),
        (tmp_path / "empty", {}, "is neither a run nor a checkpoint"),
        (tmp_path / "damaged", {}, "cannot load the pipeline in .*damaged"),
        (checkpoints["image"], {"variant": "fp16"}, "is a checkpoint, not a saved pipeline: it takes no variant"),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            DiffiTPipeline.from_pretrained(name, **settings)
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"make it with DiffiTPipeline\.from_pretrained"):
        DiffiTPipeline(DiffiTTransformer2DModel(depth=1, hidden_size=32, num_heads=4), None)
    pipeline = DiffiTPipeline.from_pretrained(saved / "image")
    with pytest.raises(ValueError, match="cannot write the pipeline to"):
        pipeline.save_pretrained(checkpoints["image"] / "folder")
    with pytest.raises(ValueError, match=r"call push_to_hub\(repo_id\)"):
        pipeline.save_pretrained(tmp_path / "pushed", push_to_hub=True)


def test_plain_diffusers_asks_before_it_runs_the_folders_code(saved):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(str(saved / "latent"), low_cpu_mem_usage=False)


OFFLINE = """
import json, sys
import numpy as np
from diffusers import DiffusionPipeline
folder, cached = sys.argv[1:]
found = {}
for name in (folder, cached):
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    found[name] = (255 * pipeline(["Dog"], output_type="np").images).round().astype(int).tolist()
from diffit import DiffiTPipeline
assert type(pipeline) is DiffiTPipeline
pipeline = DiffiTPipeline.from_pretrained(cached, revision="main")
found["ours"] = (255 * pipeline(["Dog"], output_type="np").images).round().astype(int).tolist()
for ask in (lambda: DiffiTPipeline.from_pretrained("someone/else"), lambda: pipeline.push_to_hub("someone/small"),
            lambda: DiffiTPipeline.from_pretrained("nvidia/DiffiT")):
    try:
        ask()
    except ValueError as error:
        found.setdefault("errors", []).append(str(error))


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffit":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)


for name in list(sys.modules):
    if name.partition(".")[0] == "diffit":
        del sys.modules[name]
sys.meta_path.insert(0, Hide())
try:
    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
except ImportError as error:
    found["hidden"] = str(error)
print(json.dumps(found))
"""


def test_plain_diffusers_with_and_without_diffit_and_the_hub_without_a_network(pipelines, saved, tmp_path):
    """The Hub's cache holds what was downloaded before; HF_HUB_OFFLINE is the client's own mode."""
    commit = "0123456789" * 4
    cache = tmp_path / "hub" / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / commit).symlink_to(saved / "latent")
    home = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = python(OFFLINE, saved / "latent", "someone/small", **home)
    expected = (255 * arrays(pipelines["latent"], ["Dog"])).round().astype(int).tolist()
    assert found[str(saved / "latent")] == found["someone/small"] == found["ours"] == expected
    unknown, not_uploaded, released = found["errors"]
    assert unknown.startswith("cannot reach the Hub for someone/else: unset HF_HUB_OFFLINE, or")
    assert not_uploaded.startswith("someone/small was not uploaded (")
    assert released.startswith("cannot reach the Hub for nvidia/DiffiT/diffit_256.safetensors")
    assert all(len(error.splitlines()) == 1 for error in found["errors"])
    assert found["hidden"] == "this pipeline needs the package diffit: pip install diffit"


def test_push_to_hub_uploads_the_folder(saved, tmp_path):
    code = """
import json, sys
from diffit import DiffiTPipeline
print(json.dumps(DiffiTPipeline.from_pretrained(sys.argv[1]).push_to_hub("someone/small", token="hf_none")))
"""
    with local_hub() as (address, files):
        python(code, saved / "latent", HF_HOME=str(tmp_path), HF_ENDPOINT=address)
    assert files.keys() == COMMON | VAE
    assert b'from_pretrained("someone/small")' in files["README.md"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert files[weights] == (saved / "latent" / weights).read_bytes()


def test_a_run_is_converted_by_one_command(tmp_path, monkeypatch, capsys):
    weights = run(tiny_flags(tmp_path), tmp_path / "run", "--steps", "2")
    command = [sys.executable, "-m", "diffit.pipeline", "run", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == 'out: DiffiTPipeline.from_pretrained("out") samples from it\n'
    assert files_of(tmp_path / "out") == COMMON
    pipeline = DiffiTPipeline.from_pretrained(tmp_path / "out")
    images, _ = sample_images(*load_model(weights), 2, class_labels=[3, 4])
    np.testing.assert_array_equal(arrays(pipeline, [3, 4]), images.astype(np.float32) / 255)

    ema, raw = (DiffiTPipeline.from_pretrained(weights.parent / name) for name in ("", "state"))
    one, two = (each.transformer.state_dict() for each in (ema, raw))
    dcp_to_torch_save(weights.with_name("state"), tmp_path / "state.pt")
    trained = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(torch.equal(value, trained[f"model.{name}"]) for name, value in two.items())
    assert any(not torch.equal(one[name], two[name]) for name in one)

    (weights.parent / "progress.json").write_text("")  # the marker knows better
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "run"), "out"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert f"error: {tmp_path}/run holds no whole checkpoint: train until" in capsys.readouterr().err


def test_a_checkpoint_config_survives(checkpoints, saved):
    """All that the checkpoint recommends comes back, whatever the JSON in between made of it."""
    _, config = load_model(checkpoints["latent"])
    loaded = DiffiTPipeline.from_pretrained(saved / "latent")._settings
    assert isinstance(loaded, CheckpointConfig)
    assert loaded == config
