"""Starting from another network's weights: other classes, another resolution."""

import numpy as np
import pytest
import torch

from diffit.checkpoint.weights import CheckpointConfig, save_checkpoint
from diffit.models.config import DiffiTConfig, build_model
from diffit.nn.attention import relative_position_bias
from diffit.training.init import adapt_state, resize_bias
from tests.small_models import random_network
from tests.training.runs import begun

SMALL = DiffiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=3)


def states(**changes):
    source = random_network(SMALL).state_dict()
    target = build_model(DiffiTConfig(**(vars(SMALL) | changes))).state_dict()
    return source, target, *adapt_state(source, target)


def test_the_same_network_is_taken_as_it_is():
    source, _, adapted, said = states()
    assert said == []
    for name, value in source.items():
        assert torch.equal(adapted[name], value)


def test_resizing_to_the_same_window_is_the_identity():
    table = torch.randn(49, 3)
    assert torch.equal(resize_bias(table, 4), table)


@pytest.mark.parametrize("window", [8, 7, 3])
def test_a_linear_bias_stays_linear_in_the_picture(window):
    """A bias of a * dy + b * dx per part of the picture reads the same at any number of tokens, up to the border."""
    old = np.arange(-3, 4)
    table = torch.tensor([[2.0 * y + 5.0 * x] for y in old for x in old])
    resized = resize_bias(table, window).reshape(2 * window - 1, 2 * window - 1)
    offsets = np.arange(1 - window, window) * 4 / window
    inside = np.abs(offsets) <= 3
    expected = 2 * offsets[:, None] + 5 * offsets[None]
    np.testing.assert_allclose(resized.numpy()[np.ix_(inside, inside)], expected[np.ix_(inside, inside)], atol=1e-5)
    assert resized[window - 1, window - 1] == 0


def test_a_distance_bias_still_falls_with_distance():
    old = torch.arange(-3.0, 4)
    table = -(old[:, None] ** 2 + old[None] ** 2).sqrt().reshape(-1, 1)
    bias = relative_position_bias(resize_bias(table, 8), 8)[0]  # from the first token to each of 64
    assert (bias[0].reshape(8, 8)[0, :7].diff() < 0).all()


def test_256_to_512_says_what_it_does():
    source, target, adapted, said = states(input_size=16)
    assert said == [
        "the position embedding was computed for a grid of 8 instead of 4",
        "2 relative position biases were interpolated from windows of 4 to 8",
    ]
    assert torch.equal(adapted["pos_embed"], target["pos_embed"])
    model = build_model(DiffiTConfig(**(vars(SMALL) | {"input_size": 16})))
    model.load_state_dict(adapted)
    changed = [name for name, value in adapted.items() if value.shape != source[name].shape]
    assert [name.rsplit(".", 1)[-1] for name in changed] == ["pos_embed", *2 * ["relative_position_bias_table"]]


def test_other_classes_keep_the_null_class():
    source, target, adapted, said = states(num_classes=5)
    name = "y_embedder.embedding_table.weight"
    assert said == ["the label table was made anew for 5 classes instead of 3; its null class is kept"]
    assert torch.equal(adapted[name][5], source[name][3])
    assert torch.equal(adapted[name][:5], target[name][:5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_size": 32}, "do not fit: pos_embed is"), ({"depth": 3}, "of another network: they lack blocks.2")],
)
def test_anything_else_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        states(**changes)


def test_a_run_starts_from_another_resolution_and_says_so(flags, tmp_path, capsys):
    first = begun(flags, tmp_path / "first")
    path = tmp_path / "other.safetensors"
    network = first.config.checkpoint_config(("",) * 10, "").network
    changed = type(network)(**(vars(network) | {"num_classes": 4, "window_size": 4}))
    torch.manual_seed(5)
    save_checkpoint(
        path, build_model(changed).state_dict(), CheckpointConfig("ImageDiffit-Tiny", changed, process="edm")
    )
    second = begun(flags, tmp_path / "second", "--init_from", str(path))
    out = capsys.readouterr().out
    assert "made anew for 10 classes instead of 4" in out
    assert "interpolated from windows of 4 to 2" in out
    torch.manual_seed(5)
    expected = build_model(changed).state_dict()["tokenizer.weight"]
    assert torch.equal(second.state.model.state_dict()["tokenizer.weight"], expected)
