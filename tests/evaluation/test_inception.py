"""The Inception backends on a graph of the real names and shapes with random weights; the oracle is TensorFlow.

PyTorch reads the weights without TensorFlow. The comparison runs where both are installed (extras eval, tensorflow).
"""

import importlib.util
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from diffit.evaluation.features import create_backend
from diffit.evaluation.inception import block_names, fold_batch_norms, load_state
from diffit.evaluation.scores import load_reference, score_images
from diffit.evaluation.statistics import SingularCovarianceWarning
from tests.conftest import GOLDEN, ROOT
from tests.evaluation.random_graph import RandomInception

# Not imported here: TensorFlow and PyTorch's compiler can crash in one process.
needs_torch_fidelity = pytest.mark.skipif(not importlib.util.find_spec("torch_fidelity"), reason="needs torch-fidelity")
needs_tensorflow = pytest.mark.skipif(not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow")
SIZES = (32, 64, 75, 128, 256, 299, 512)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    pytest.importorskip("tensorboard")
    return RandomInception().write(tmp_path_factory.mktemp("graph") / "graph.pb")


def images_of(size, count, seed=0):
    """Half noise, half smooth colours."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, size)
    smooth = random.random((count, 1, 1, 3)) * ramp[:, None, None] + random.random((count, 1, 1, 3)) * ramp[:, None]
    noise = random.random((count, size, size, 3))
    return (127 * np.where(np.arange(count)[:, None, None, None] % 2, smooth, 2 * noise)).astype(np.uint8)


def test_block_names():
    blocks = json.loads((GOLDEN / "inception_names.json").read_text())["blocks"]
    assert block_names() == {block["torch_fidelity"]: block["tf"] for block in blocks}


@pytest.mark.parametrize("scaled", [True, False])
def test_weights_are_read_without_tensorflow(tmp_path, scaled):
    pytest.importorskip("tensorboard")
    built = RandomInception(scale_after_normalization=scaled)
    nodes = {node.name: node for node in built.graph.node}
    state = load_state(built.write(tmp_path / "graph.pb"))

    def stored(name):
        return np.frombuffer(nodes[name].attr["value"].tensor.tensor_content, np.float32)

    assert len(state) == 2 + 94 * 6
    kernel = state["Mixed_6d.branch7x7_2.conv.weight"]  # [160, 160, 1, 7]
    np.testing.assert_array_equal(
        kernel.permute(2, 3, 1, 0).numpy().ravel(), stored("mixed_6/tower/conv_1/conv2d_params")
    )
    gamma = state["Conv2d_1a_3x3.bn.weight"].numpy()
    np.testing.assert_array_equal(gamma, stored("conv/batchnorm/gamma") if scaled else np.ones(32))
    np.testing.assert_array_equal(state["fc.weight"].T.numpy().ravel(), stored("softmax/weights"))


@needs_torch_fidelity
def test_converted_weights_are_the_same(graph, tmp_path):
    """torch-fidelity's file, read back, gives what the graph gives."""
    torch.save(load_state(graph), tmp_path / "converted.pth")
    images = images_of(40, 2)
    direct, converted = (create_backend(weights=path)(images) for path in (graph, tmp_path / "converted.pth"))
    np.testing.assert_array_equal(direct.pool, converted.pool)
    np.testing.assert_array_equal(direct.spatial, converted.spatial)
    assert direct.pool.shape == (2, 2048)
    assert direct.spatial.shape == (2, 2023)
    np.testing.assert_allclose(direct.probabilities.sum(1), 1, rtol=1e-5)


@needs_torch_fidelity
def test_features_are_those_of_the_network_as_it_comes(graph, tmp_path):
    """Folded, channels-last and in pieces, they equal torch-fidelity's own to rounding."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(load_state(graph), tmp_path / "converted.pth")
    plain = FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(tmp_path / "converted.pth")
    )
    mixed = []
    plain.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: mixed.append(output))
    images = images_of(64, 17)
    pool, logits = plain(torch.from_numpy(images).permute(0, 3, 1, 2))
    found = create_backend(weights=graph)(images)
    assert found.pool.shape == (17, 2048)
    assert relative_error(found.pool, pool.numpy()) < 1e-5
    assert relative_error(found.spatial, mixed[0][:, :7].permute(0, 2, 3, 1).flatten(1).numpy()) < 1e-5
    assert np.abs(found.probabilities - logits.softmax(1).numpy()).max() < 1e-5
    fold_batch_norms(plain)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    """TensorFlow's process imports the script that started it, which would start another one."""
    (tmp_path / "graph.pb").write_bytes(b"")
    script = tmp_path / "script.py"
    script.write_text(
        "from diffit.evaluation.features import create_backend\n"
        f"create_backend('tensorflow', {str(tmp_path / 'graph.pb')!r})\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert 'do the work of the script under `if __name__ == "__main__":`' in last
    assert "is not the Inception graph" not in done.stderr


@needs_torch_fidelity
def test_altered_weights_are_refused(graph, tmp_path):
    path = tmp_path / "graph.pb"
    content = bytearray(graph.read_bytes())
    path.write_bytes(content)
    create_backend(weights=path)
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="altered or damaged"):
        create_backend(weights=path)


@needs_torch_fidelity
def test_other_files_are_refused(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "text.pb").write_text("no graph")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pb").touch()
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name, message in (
        ("text.pb", "not a frozen"),
        ("text.pth", "cannot be read"),
        ("empty.pb", "no node"),
        ("other.pth", "does not hold the weights"),
    ):
        with pytest.raises(ValueError, match=message):
            create_backend(weights=tmp_path / name)
    with pytest.raises(ValueError, match="choose torch or tensorflow"):
        create_backend("jax")
    with pytest.raises(ValueError, match="reads a frozen graph"):
        create_backend("tensorflow", weights=tmp_path / "other.pth")


def relative_error(found, oracle):
    return np.abs(found - oracle).max() / np.abs(oracle).max()


@needs_torch_fidelity
@needs_tensorflow
@pytest.mark.parametrize("scaled", [True, False])
def test_both_backends_give_the_same_features(tmp_path, scaled):
    path = RandomInception(seed=1, scale_after_normalization=scaled).write(tmp_path / "graph.pb")
    ours, oracle = (create_backend(kind, path) for kind in ("torch", "tensorflow"))
    for size in SIZES if scaled else SIZES[:1]:
        a, b = ours(images_of(size, 4)), oracle(images_of(size, 4))
        for name in ("pool", "spatial", "probabilities"):
            error = relative_error(getattr(a, name), getattr(b, name))
            print(f"{size} px, {name}: relative error {error:.1e}")
            assert error < 1e-4, (size, name)


@needs_torch_fidelity
@needs_tensorflow
@pytest.mark.parametrize("size", [32, 256])
def test_both_backends_give_the_same_scores(graph, tmp_path, size):
    np.savez(tmp_path / "reference.npz", arr_0=images_of(size, 20, seed=1))
    images = images_of(size, 16, seed=2) // 2
    scores = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularCovarianceWarning)
        for kind in ("torch", "tensorflow"):
            backend = create_backend(kind, graph)
            reference = load_reference(tmp_path / "reference.npz", backend)
            scores.append(score_images([images], reference, backend))
    for name in ("fid", "sfid", "inception_score"):
        # The Inception Score of random weights is hardly above 1: what it says is the part above.
        ours, oracle = (getattr(score, name) - (name == "inception_score") for score in scores)
        print(f"{size} px, {name}: {ours} against {oracle}")
        assert ours == pytest.approx(oracle, rel=1e-3), name
    assert scores[0].precision == scores[1].precision
    assert scores[0].recall == scores[1].recall
