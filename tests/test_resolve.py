"""One resolver: every kind of weights at every door, and what people's files look like."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from diffit import DiffiTPipeline, load_model
from diffit.checkpoint.config import METADATA_KEY
from diffit.checkpoint.resolve import checksum, find_checkpoint
from diffit.checkpoint.weights import load_weights, save_checkpoint
from diffit.cli.app import parse_app
from diffit.cli.sample import parse_sample
from diffit.cli.train import parse_train
from diffit.config import CodecConfig
from diffit.models.config import DiffiTConfig, build_model
from diffit.nn.attention import relative_position_index
from diffit.training.config import find_start
from tests.conftest import GOLDEN, ROOT
from tests.small_models import random_network, save_small_checkpoint, save_small_image_checkpoint

WEIGHTS = random_network()


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """The same network of pixels in every kind of place, and other weights in a damaged checkpoint that is newer."""
    folder = tmp_path_factory.mktemp("places")
    file = save_small_image_checkpoint(folder, num_classes=3)
    model, config = load_model(file)
    checkpoints = folder / "run" / "checkpoints"
    for step, change in ((1, 0.0), (2, 1.0)):
        checkpoint = checkpoints / f"{step:08d}"
        checkpoint.mkdir(parents=True)
        state = {name: value + change for name, value in model.state_dict().items()}
        save_checkpoint(checkpoint / "ema.safetensors", state, config)
        torch.save({"model": model.state_dict(), "optimizer": {"state": {}}}, checkpoint / "state.pt")
        dcp.save({"model": model.state_dict()}, checkpoint_id=checkpoint / "state", no_dist=True)
        marked = {name: checkpoint / name for name in ("ema.safetensors", "state.pt")}
        marker = {name: [path.stat().st_size, checksum(path)] for name, path in marked.items()}
        (checkpoint / "complete.json").write_text(json.dumps(marker))
    newest = checkpoints / "00000002" / "ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\xff")
    DiffiTPipeline.from_pretrained(file).save_pretrained(folder / "saved")
    whole = checkpoints / "00000001"
    return {
        "file": file,
        "run": folder / "run",
        "checkpoints of a run": checkpoints,
        "checkpoint": whole,
        "its EMA": whole / "ema.safetensors",
        "state.pt": whole / "state.pt",
        "shards": whole / "state",
        "saved pipeline": folder / "saved",
    }


def doors(word: str):
    """(source, config) or (network, config) of every door that can be opened without drawing."""
    task = parse_sample(["--model_path", word])
    yield load_weights(task.source.fetch(), task.checkpoint), task.checkpoint
    task = parse_app(["--model_path", word])
    yield load_weights(task.source.fetch(), task.checkpoint), task.checkpoint
    yield load_model(word)
    pipeline = DiffiTPipeline.from_pretrained(word)
    yield pipeline.transformer, pipeline._settings
    network = json.dumps({"num_classes": 3})
    flags = f"--model ImageDiffit-Tiny --data.path . --network {network.replace(' ', '')} --init_from {word}".split()
    source, config = find_start(parse_train(flags).config)
    yield load_weights(source.fetch(), config), config


KINDS = ["file", "run", "checkpoints of a run", "checkpoint", "its EMA", "state.pt", "shards", "saved pipeline"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_every_door(places, kind):
    assert set(places) == set(KINDS)
    expected, expected_config = load_model(places["file"])
    for model, config in doors(str(places[kind])):
        assert not model.training
        assert config == expected_config
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value)


def test_a_hub_file_and_a_hub_pipeline(places, tmp_path):
    """In a process of its own, since the Hub's library reads its settings at import."""
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    commit = "0123456789" * 4
    cache = tmp_path / "home" / "hub" / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    shutil.copytree(places["saved pipeline"], cache / "snapshots" / commit)
    (cache / "snapshots" / commit / "folder").mkdir()
    shutil.copy(places["file"], cache / "snapshots" / commit / "folder" / "w.safetensors")
    code = (
        "import sys; from diffit import load_model; from diffit.checkpoint import find_checkpoint\n"
        "for word in ('someone/small', 'someone/small/folder/w.safetensors'):\n"
        "    model, config = load_model(word)\n"
        "    source, _ = find_checkpoint(path=word, revision='main', token=False)\n"
        "    print(source, config.model, model.state_dict()['head.weight'].abs().sum().item())\n"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=tmp_path)
    total = load_model(places["file"])[0].state_dict()["head.weight"].abs().sum().item()
    words = ("someone/small", "someone/small/folder/w.safetensors")
    assert run.stdout.splitlines() == [f"{word} ImageDiffit-Tiny {total}" for word in words], run.stderr


def test_an_ambiguous_word_has_one_meaning(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Diffit-Fashion", "nvidia/DiffiT", "Diffit-S", "someone/run"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).symlink_to(places["run"])
    assert load_model("Diffit-Fashion")[1].model == "Diffit-Fashion"
    assert find_checkpoint(path="nvidia/DiffiT")[0].path is None
    for word in ("./Diffit-Fashion", "./nvidia/DiffiT", "Diffit-S", "someone/run"):
        assert load_model(word)[1].model == "ImageDiffit-Tiny"
    with pytest.raises(ValueError, match="no weights were released for Diffit-S"):
        find_checkpoint("Diffit-S")
    with pytest.raises(ValueError, match="there is no checkpoint someone/else: --model_path takes a name"):
        load_model("someone/else")


@pytest.mark.parametrize("size", [256, 512])
def test_the_official_names_load(tmp_path, size):
    """All 346 names, types and shapes of the released files, here of 3 blocks to be quick."""
    official = json.loads((GOLDEN / "official_state_dict.json").read_text())[f"diffit_{size}"]["state_dict"]
    narrow = {1152: 32, 3456: 96, 4608: 128, 16: 2}  # hidden size and heads
    state = {}
    for name, (shape, dtype) in official.items():
        shape = [n if name == "pos_embed" and i == 1 else narrow.get(n, n) for i, n in enumerate(shape)]
        if name.endswith("relative_position_index"):
            state[name] = relative_position_index(round(shape[0] ** 0.5)).clone()
            assert dtype == str(state[name].dtype).removeprefix("torch.")
        else:
            state[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
    network = DiffiTConfig(input_size=size // 8, hidden_size=32, num_heads=2)
    _, config = find_checkpoint("Diffit", image_size=size)
    path = tmp_path / f"diffit_{size}.safetensors"
    save_file(state, path)
    found, named = find_checkpoint(path=path)
    assert (found.path, named) == (path, config)
    model = load_weights(path, type(config)("Diffit", network))
    assert len(state) == 346
    assert len(model.state_dict()) == len(build_model(network).state_dict()) == 346 - 28
    state["blocks.27.attn.relative_position_index"][0, 0] += 1
    save_file(state, path)
    with pytest.raises(ValueError, match=r"blocks\.27\.attn\.relative_position_index"):
        load_weights(path, type(config)("Diffit", network))


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
@pytest.mark.parametrize("door", ["sample", "app", "python"])
def test_a_known_name_brings_all_it_knows(tmp_path, suffix, door):
    bundled, known = load_model("Diffit-Fashion")
    path = tmp_path / f"plain.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(bundled.state_dict(), path)
    parse = {"sample": parse_sample, "app": parse_app}.get(door)
    if parse:
        config = parse(["--model", "Diffit-Fashion", "--model_path", str(path)]).checkpoint
    else:
        config = load_model(path, model="Diffit-Fashion")[1]
    assert vars(config) == vars(known) | {"made_by": ""}
    assert config.codec == CodecConfig("Diffit-Fashion-VAE", 4)
    with pytest.raises(ValueError, match="does not say which model it holds: name it with --model, one of Diffit,"):
        load_model(path)


def prefixed(prefix):
    return {prefix + name: value for name, value in WEIGHTS.state_dict().items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.", "net_", "blocks.", "a.b.c.d."])
@pytest.mark.parametrize(
    "keys", [(), ("ema",), ("model_ema",), ("model",), ("model_state_dict",), ("state_dict", "model")]
)
def test_names_as_wrappers_write_them(tmp_path, prefix, keys):
    tree: dict = prefixed(prefix)
    for key in reversed(keys):
        tree = {"epoch": 3, key: tree, "optimizer": {"state": {}}, "ema": None} | {key: tree}
    torch.save(tree, tmp_path / "w.pt")
    model = load_weights(tmp_path / "w.pt", find_checkpoint(path=save_small_checkpoint(tmp_path, "vae"))[1])
    for name, value in WEIGHTS.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert all(not p.requires_grad for name, p in model.named_parameters() if name == "pos_embed")


def changed(**values):
    return WEIGHTS.state_dict() | values


NAME = "blocks.1.mlp.fc1.bias"
HOLDS_ITSELF: dict[str, object] = {}
HOLDS_ITSELF["model"] = HOLDS_ITSELF


def is_plain(value):
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged or incomplete"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 7\n", "is a git-LFS pointer"),
        (b"<!DOCTYPE html><html>", "damaged or incomplete"),
        ({"weights": WEIGHTS.state_dict(), "epoch": 1}, "no weights under ema, .*state_dict, but weights, epoch"),
        ([1, 2], "but list"),
        ({}, "but nothing"),
        (argparse.Namespace(a=1), r"loading argparse\.Namespace could run code"),
        (WEIGHTS, r"loading diffit\.models\.latent\.DiffiT could run code"),
        (changed(**{NAME: torch.full([128], torch.nan)}), f"{NAME} is torch.float.* and not finite"),
        (changed(**{NAME: torch.full([128], -torch.inf)}), f"{NAME} is torch.float.* and not finite"),
        (changed(**{NAME: torch.full([128], 1e300, dtype=torch.float64)}), f"{NAME} is torch.float.* and not finite"),
        (changed(**{NAME: torch.zeros(128, dtype=torch.int8)}), f"{NAME} is torch.int8 and no floating"),
        (changed(**{NAME: torch.zeros(128, dtype=torch.bool)}), f"{NAME} is torch.bool and no floating"),
        (changed(**{NAME: torch.zeros(128, dtype=torch.complex64)}), f"{NAME} is torch.complex64 and no floating"),
        (changed(n_averaged=torch.tensor(3)), "n_averaged is not part of it"),
        (changed(**{"": torch.tensor(3)}), "is not part of it"),
        (changed(**{NAME: torch.eye(128)[0].to_sparse()}), f"{NAME} is torch.float32 and not dense"),
        (changed(**{NAME: torch.zeros(128, device="meta")}), f"{NAME} is torch.float32 and not dense"),
        (HOLDS_ITSELF, "but nothing"),
    ],
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "SAFETENSORS"])
def test_files_that_cannot_be_used_are_one_sentence(tmp_path, content, words, suffix):
    path = tmp_path / f"w.{suffix}"
    config = find_checkpoint(path=save_small_checkpoint(tmp_path, "vae"))[1]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif suffix == "pt":
        torch.save(content, path)
    elif isinstance(content, dict) and all(is_plain(value) for value in content.values()):
        save_file(content, path, {METADATA_KEY: config.to_json()})
    else:
        pytest.skip("safetensors holds nothing but dense tensors")
    with pytest.raises(ValueError, match=words) as raised:
        load_weights(path, config)
    assert str(path) in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


def test_folders_that_hold_no_checkpoint(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "diffit_256.safetensors").write_bytes(b"1")
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    (tmp_path / "state").mkdir()
    for name, words in (
        ("some", r"neither a run nor .* name a file in it, such as diffit_256\.safetensors"),
        ("state", "neither a run nor .* it has no weights"),
        ("young", "holds no whole checkpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(tmp_path / name)


def test_inference_needs_nothing_of_training(places):
    code = """
import sys
from diffit import DiffiTPipeline, load_model, sample_images
for word in sys.argv[1:]:
    sample_images(*load_model(word), 1, num_sampling_steps=2)
DiffiTPipeline.from_pretrained(sys.argv[1])(0, 2)
print(sorted(name for name in sys.modules if name.startswith("diffit.training")))
"""
    words = [str(places[kind]) for kind in ("file", "run", "shards", "saved pipeline")]
    command = [sys.executable, "-c", code, *words]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == "[]\n"


def leaves(tree, path=()):
    """Every value of a JSON tree, and every node, with its path."""
    for key, value in tree.items():
        yield (*path, key), value
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def changed_tree(tree, path, value):
    tree = json.loads(json.dumps(tree))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


def of_another_type(value):
    """What JSON can have in place of a value, of a type that does not fit, whatever the field."""
    if isinstance(value, str):
        return [3.5, [], {}]
    if isinstance(value, (bool, dict)):
        return ["yes", 3.5, []]
    if isinstance(value, list):
        return [3, "ten", {}, [{}]]
    return [[{}], {}, float("nan"), -(10**12)]


@pytest.mark.parametrize("kind", ["latent", "image"])
def test_metadata_are_input(tmp_path, kind):
    """Every field of a checkpoint with values of other types or far out of range: one sentence that names the file."""
    small = save_small_checkpoint(tmp_path, "vae") if kind == "latent" else save_small_image_checkpoint(tmp_path)
    state = load_file(small)
    tree = json.loads(find_checkpoint(path=small)[1].to_json())
    texts = ["", "{", "[" * 100_000, "[]", "3", "null", "{}", '"text"']
    for where, value in leaves(tree):
        texts += [json.dumps(changed_tree(tree, where, bad)) for bad in of_another_type(value)]
    path = tmp_path / "bad.safetensors"
    for text in texts:
        save_file(state, path, {"diffit": text})
        with pytest.raises(ValueError, match=re.escape(str(path))) as raised:
            load_model(path)
        assert len(str(raised.value).splitlines()) == 1, text
