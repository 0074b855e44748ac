"""Checkpoints: what goes in comes out, and everything that can be wrong with a file is said in one sentence."""

import os
import subprocess
import sys
import zlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from diffit import load_model
from diffit.checkpoint.config import METADATA_KEY, default_config
from diffit.checkpoint.resolve import find_checkpoint
from diffit.checkpoint.weights import CheckpointConfig, load_weights, save_checkpoint
from diffit.models.config import DiffiTConfig
from diffit.nn.attention import relative_position_index
from tests.conftest import ROOT
from tests.small_models import NETWORK, random_network, save_small_checkpoint


@pytest.fixture
def small(tmp_path):
    return save_small_checkpoint(tmp_path, vae="somewhere/vae")


def official_state(model):
    """The state dict as the released files store it: with the index in every block."""
    index = relative_position_index(NETWORK.input_size // NETWORK.patch_size)
    blocks = range(NETWORK.depth)
    return model.state_dict() | {f"blocks.{i}.attn.relative_position_index": index.clone() for i in blocks}


CONFIG = CheckpointConfig("Diffit-S", NETWORK)


def test_round_trip(small):
    model, config = load_model(small)
    assert not model.training
    assert config.network == NETWORK
    assert config.class_names == ("Cat", "Dog", "Night owl")
    assert CheckpointConfig.from_json(config.to_json()) == config
    for name, value in random_network().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_are_those_of_the_library(tmp_path, dtype):
    """Byte for byte, though written tensor by tensor; the checksum is that of the file."""
    odd = {"é": torch.zeros(0), "scalar": torch.tensor(2.0), "turned": torch.arange(6.0).view(2, 3).T}
    state = random_network().state_dict() | odd
    state = {name: value.to(dtype) for name, value in state.items()} | {"wide": torch.ones(3, dtype=torch.float64)}
    config = replace(CONFIG, class_names=("Zoë",))
    checksum = save_checkpoint(tmp_path / "a.safetensors", state, config)
    content = (tmp_path / "a.safetensors").read_bytes()
    dense = {name: value.contiguous() for name, value in state.items()}
    assert content == save(dense, {METADATA_KEY: config.to_json()})
    assert checksum == zlib.crc32(content)


def test_position_embedding_stays_fixed(small):
    model, _ = load_model(small)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested.pt"])
def test_official_layout_loads_strictly(tmp_path, kind):
    reference = random_network()
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(official_state(reference), path)
    else:
        state = official_state(reference)
        torch.save({"ema": state} if "nested" in kind else state, path)
    model = load_weights(path, CONFIG)
    assert model.state_dict().keys() == reference.state_dict().keys()
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_different_index_is_refused(tmp_path):
    state = official_state(random_network())
    state["blocks.1.attn.relative_position_index"] += 1
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn"):
        load_weights(tmp_path / "weights.safetensors", CONFIG)


def test_fp16_files_load_as_fp32(tmp_path):
    save_checkpoint(tmp_path / "half.safetensors", random_network().half().state_dict(), CONFIG)
    model, _ = load_model(tmp_path / "half.safetensors")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def broken(tmp_path, change):
    state = random_network().state_dict()
    change(state)
    path = tmp_path / "broken.safetensors"
    save_checkpoint(path, state, CONFIG)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("final_layer.linear.bias"), "final_layer.linear.bias is missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "extra is not part of it"),
        (lambda s: s.update({"blocks.0.mlp.fc1.bias": torch.zeros(5)}), r"fc1.bias is \[5\] instead of \[128\]"),
        (lambda s: s.update(pos_embed=torch.zeros(1, 64, 32)), "trained for 128x128 images, not 64x64"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(broken(tmp_path, change))


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_truncated_files(small, tmp_path, kept, suffix):
    path = tmp_path / f"cut.{suffix}"
    if suffix == "pt":
        torch.save(random_network().state_dict(), path)
        content = path.read_bytes()
    else:
        content = small.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_weights(path, find_checkpoint(path=path)[1] if suffix == "safetensors" else CONFIG)


@pytest.mark.parametrize("checksums", [True, False])
def test_a_changed_bit_in_a_pt_file(tmp_path, checksums):
    """torch.load takes it; files that were written without checksums are taken too."""
    path, wrote = tmp_path / "weights.pt", torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save(random_network().state_dict(), path)
    torch.serialization.set_crc32_options(wrote)
    load_weights(path, CONFIG)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if checksums:
        with pytest.raises(ValueError, match=r"weights.pt is damaged or incomplete: copy or download it again"):
            load_weights(path, CONFIG)


def test_files_are_known_by_their_bytes_not_their_names(small, tmp_path):
    """safetensors called .pt with all that their metadata say, and what torch.save wrote called .safetensors."""
    expected, config = load_model(small)
    torn, pickled = tmp_path / "torn.pt", tmp_path / "pickled.safetensors"
    torn.write_bytes(small.read_bytes())
    torch.save({"model": expected.state_dict()}, pickled)
    loaded, found = load_model(torn)
    assert found == config
    for network in (loaded, load_weights(pickled, config)):
        for (name, value), (other, right) in zip(*(x.state_dict().items() for x in (network, expected)), strict=True):
            assert name == other
            assert torch.equal(value, right)


class Malicious:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_pickled_code_is_refused(tmp_path, capfd):
    torch.save({"model": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="could run code"):
        load_weights(tmp_path / "bad.pt", CONFIG)
    assert "executed" not in capfd.readouterr().out


def test_released_files_are_known_without_a_network():
    source, config = find_checkpoint("Diffit")
    assert (str(source), config.image_size, config.guidance.scale) == ("nvidia/DiffiT/diffit_256.safetensors", 256, 4.4)
    source, config = find_checkpoint("Diffit", image_size=512)
    assert str(source) == "nvidia/DiffiT/diffit_512.safetensors"
    assert (config.network, config.guidance.scale) == (DiffiTConfig(input_size=64), 1.49)
    assert (config.guidance.schedule, config.sampling.num_sampling_steps) == ("constant", 250)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "Difit"}, "unknown model 'Difit'"),
        ({"model": "Diffit-B"}, "no weights were released for Diffit-B"),
        ({"model": "Diffit", "image_size": 300}, "choose 256 or 512"),
        ({"path": "nowhere/model.safetensors"}, "no checkpoint file nowhere/model.safetensors"),
        ({"model": "Diffit-Fashion", "image_size": 64}, "32x32, not 64x64"),
    ],
)
def test_what_does_not_exist(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_checkpoint(**arguments)


def test_name_and_file_must_agree(small):
    with pytest.raises(ValueError, match="holds Diffit-S, not Diffit"):
        find_checkpoint("Diffit", small)
    with pytest.raises(ValueError, match="16x16, not 256x256"):
        find_checkpoint(None, small, 256)


def test_silent_files_need_a_name(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(random_network().state_dict(), path)
    with pytest.raises(ValueError, match="name it with --model"):
        find_checkpoint(path=path)
    assert find_checkpoint("Diffit", path, 512)[1] == default_config("Diffit", 512)


def test_unreachable_hub(tmp_path):
    """In a process of its own, since the Hub's library reads its settings at import; the address refuses at once.

    The library waits ever longer between its attempts, which is left out here.
    """
    code = "import time\ntime.sleep = lambda seconds: None\nfrom diffit import load_model\n"
    code += "try: load_model('nvidia/DiffiT')\nexcept ValueError as e: print(e)"
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "diffit_256.safetensors" in result.stdout, result.stderr
    assert "--model_path" in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1
    asked = "looking for nvidia/DiffiT/diffit_256.safetensors on the Hugging Face Hub"
    assert result.stderr == f"{asked} (HF_HUB_OFFLINE=1: on this disk alone)\n"


def test_a_failed_write_leaves_the_old_file(small, monkeypatch):
    before = small.read_bytes()

    def refuse(*args):
        raise OSError("disk failed")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk failed"):
        save_checkpoint(small, random_network(seed=1).state_dict(), CONFIG)
    assert small.read_bytes() == before
    assert [path.name for path in small.parent.iterdir()] == [small.name]


def test_bundled_model_is_small_and_complete():
    from diffit.checkpoint.resolve import BUNDLED
    from diffit.codec import BUNDLED_VAES

    files = [*BUNDLED.values(), *(file for folder in BUNDLED_VAES.values() for file in folder.iterdir())]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    for name, path in BUNDLED.items():
        model, config = load_model(name)
        assert config.model == name
        assert {value.dtype for value in load_file(path).values()} == {torch.float16}
        assert all(value.isfinite().all() for value in model.state_dict().values())
